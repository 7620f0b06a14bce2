"""Ends a run on a signal to any rank: the step under way is finished, the run saved, and training stops."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from avlit.module import AVModule
from avlit.ranks import is_distributed

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequestedError(Exception):
    """Work that can be done again after a resume (samples, a measurement) gives way to a stop."""


class Stopping(pl.Callback):
    """Looks at the end of every step, as the last of the callbacks, whether any rank was asked to stop.

    save: writes the state of a step, on all ranks. `stopped_by` is the signal that ended the run. A second SIGINT ends
    it at once, without waiting for anything.
    """

    def __init__(self, save: Callable[[pl.Trainer, AVModule, int], None]):
        self.save = save
        self.asked: signal.Signals | None = None
        self.stopped_by: signal.Signals | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """StopRequestedError if this rank was asked to stop: for work between two steps that takes long."""
        if self.asked is not None:
            raise StopRequestedError

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        # Lightning's own handlers communicate from inside the handler, and end the run without saving it.
        trainer._signal_connector.register_signal_handlers = lambda: None
        if is_distributed():
            self.hosts: Any = torch.distributed.new_group(backend="gloo")  # asks the other hosts, never the device
        self.previous = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Only takes note: what a handler may do safely is little."""
        if number == signal.SIGINT and self.asked is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one needs no Python to work
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule)
        if not module.has_stepped(trainer, batch_idx):
            return
        number = int(self.asked or 0)
        if is_distributed():
            flag = torch.tensor(number)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.hosts)
            number = int(flag)
        if number:
            self.stopped_by = signal.Signals(number)
            self.save(trainer, module, module.steps_done(trainer))
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
