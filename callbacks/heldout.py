"""The loss on fixed held-out clips, noise and noise levels: the curve to trust, from before the first step on."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from avlit.batch import AVBatch
from avlit.errors import ConfigError
from avlit.module import AVModule
from avlit.randomness import Draws
from callbacks.ema import EMA
from callbacks.stopping import StopRequestedError
from callbacks.training_log import LossSums


class HeldoutLoss(pl.Callback):
    """Measures at step 0, every `every` steps and at the end, with the averaged weights.

    required: a metric that must be among those measured, because a setting names it. check: raises StopRequestedError
    where the run was asked to stop; what a measurement then lacks is made up for when the run is resumed.
    history: step -> metrics.
    """

    def __init__(
        self,
        report: Callable[[dict[str, float], int], None],
        *,
        batches: Callable[[], list[AVBatch]],
        every: int,
        subsets: list[str],
        ema: EMA,
        check: Callable[[], None] = lambda: None,
        required: str | None = None,
    ):
        self.report = report
        self.load = batches
        self.every = every
        self.subsets = subsets
        self.ema = ema
        self.check = check
        self.required = required
        self.batches: list[AVBatch] | None = None
        self.history: dict[int, dict[str, float]] = {}

    def state(self) -> dict[str, Any]:
        """The history, as JSON values."""
        return {str(step): metrics for step, metrics in self.history.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave."""
        self.history = {int(step): dict(metrics) for step, metrics in state.items()}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        self.measure_if_due(trainer, module, module.start_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule)
        if module.has_stepped(trainer, batch_idx):
            self.measure_if_due(trainer, module, module.steps_done(trainer))

    def measure_if_due(self, trainer: pl.Trainer, module: AVModule, step: int) -> None:
        """Measure, unless no measurement is planned at `step` or it is there already."""
        is_planned = step % self.every == 0 or step == module.total_steps
        if not is_planned or step in self.history:
            return
        try:
            metrics = self.measure(trainer, module)
        except StopRequestedError:
            return
        if self.required and self.required not in metrics:
            raise ConfigError(
                f"checkpoint.best={self.required}: no such metric; there are {', '.join(sorted(metrics))}"
            )
        self.history[step] = metrics
        if trainer.is_global_zero:
            self.report(metrics, step)

    @torch.no_grad()
    def measure(self, trainer: pl.Trainer, module: AVModule) -> dict[str, float]:
        """The means over all held-out clips as val/loss/…; the same on all ranks."""
        if self.batches is None:
            self.batches = self.load()
        sums = LossSums(self.subsets, module.device, tasks=module.tasks)
        module.eval()
        try:
            with self.ema.applied(module), trainer.precision_plugin.forward_context():
                for batch in self.batches:
                    self.check()
                    on_device = batch.to(module.device)
                    draws = Draws(module.seed, on_device.step, on_device.slots, is_training=False)
                    sums.add(module.step(on_device, draws), on_device.subsets)
        finally:
            module.train()
        return sums.read("val")
