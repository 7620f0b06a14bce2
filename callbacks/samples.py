"""Calls the writer of sample clips at the right steps, with the averaged weights in place."""

from collections.abc import Callable

import lightning.pytorch as pl

from avlit.module import AVModule
from avlit.ranks import gather, is_sharded
from callbacks.ema import EMA
from callbacks.stopping import StopRequestedError


class Samples(pl.Callback):
    """Samples every `every` steps (0: never between) and at the end.

    write: (step, whether it is the last) -> metrics measured on the clips; it samples, writes and reports them, and
    raises StopRequestedError where the run was asked to stop. written: the metrics of a step whose clips are there,
    None where a stop or a kill prevented them: they are made when the run is resumed. meet: waits for all ranks.
    last: the latest metrics.
    """

    def __init__(
        self,
        write: Callable[[int, bool], dict[str, float]],
        *,
        every: int,
        ema: EMA,
        written: Callable[[int], dict[str, float] | None] = lambda step: None,
        meet: Callable[[], None] = lambda: None,
    ):
        self.write = write
        self.every = every
        self.ema = ema
        self.written = written
        self.meet = meet
        self.last: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        if module.start_step:
            self.make_if_due(trainer, module, module.start_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule)
        if module.has_stepped(trainer, batch_idx):
            self.make_if_due(trainer, module, module.steps_done(trainer))

    def make_if_due(self, trainer: pl.Trainer, module: AVModule, step: int) -> None:
        """Make the clips, unless none are planned at `step`: the first rank does, or all where the model is sharded."""
        is_last = step == module.total_steps
        if not (is_last or (self.every and step % self.every == 0)):
            return
        if trainer.is_global_zero or is_sharded(module.model):
            self.last = self._made(module, step, is_last)
        self.meet()

    def _made(self, module: AVModule, step: int, is_last: bool) -> dict[str, float]:
        metrics = self.written(step)
        if is_sharded(module.model):
            metrics = gather(metrics)[0]  # another rank may look when the first is already writing
        if metrics is not None:
            return metrics
        module.eval()
        try:
            with self.ema.applied(module):
                return self.write(step, is_last)
        except StopRequestedError:
            return {}
        finally:
            module.train()
