"""The loss on fixed held-out clips, noise and noise levels: the curve to trust, from before the first step on."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch

from avlit.batch import AVBatch
from avlit.module import AVModule
from avlit.randomness import Draws
from callbacks.ema import EMA
from callbacks.training_log import LossSums


class HeldoutLoss(pl.Callback):
    """Measures at step 0, every `every` steps (0: never between) and at the end, with the averaged weights."""

    def __init__(
        self,
        report: Callable[[dict[str, float], int], None],
        *,
        batches: Callable[[], list[AVBatch]],
        every: int,
        subsets: list[str],
        ema: EMA,
    ):
        self.report = report
        self.load = batches
        self.every = every
        self.subsets = subsets
        self.ema = ema
        self.history: dict[int, dict[str, float]] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        self.batches = self.load()
        self.measure(trainer, module, module.start_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule)
        step = module.steps_done(trainer)
        is_last = step == module.total_steps
        if module.has_stepped(trainer, batch_idx) and (is_last or (self.every and step % self.every == 0)):
            self.measure(trainer, module, step)

    @torch.no_grad()
    def measure(self, trainer: pl.Trainer, module: AVModule, step: int) -> None:
        """Log the means over all held-out clips as val/loss/… at `step`."""
        sums = LossSums(self.subsets, module.device)
        module.eval()
        with self.ema.applied(module), trainer.precision_plugin.forward_context():
            for batch in self.batches:
                on_device = batch.to(module.device)
                draws = Draws(module.seed, on_device.step, on_device.slots, is_training=False)
                sums.add(module.step(on_device, draws), on_device.subsets)
        module.train()
        self.history[step] = metrics = sums.read("val/loss")
        if trainer.is_global_zero:
            self.report(metrics, step)
