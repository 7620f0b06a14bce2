"""Calls the writer of sample clips at the right steps, with the averaged weights in place."""

from collections.abc import Callable

import lightning.pytorch as pl

from avlit.module import AVModule
from callbacks.ema import EMA


class Samples(pl.Callback):
    """Samples every `every` steps (0: never between) and at the end.

    write: (step, whether it is the last) -> metrics measured on the clips; it samples, writes and reports them.
    """

    def __init__(
        self,
        write: Callable[[int, bool], dict[str, float]],
        *,
        every: int,
        ema: EMA,
        report: Callable[[dict[str, float], int], None],
    ):
        self.write = write
        self.every = every
        self.ema = ema
        self.report = report
        self.last: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule)
        step = module.steps_done(trainer)
        is_last = step == module.total_steps
        if not module.has_stepped(trainer, batch_idx) or not (is_last or (self.every and step % self.every == 0)):
            return
        if trainer.is_global_zero:
            module.eval()
            with self.ema.applied(module):
                self.last = self.write(step, is_last)
            module.train()
            self.report(self.last, step)
        trainer.strategy.barrier()
