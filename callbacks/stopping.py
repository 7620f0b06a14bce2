"""Ends a run on a signal to any rank: the step under way is finished, the run saved, and training stops."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from avlit.module import AVModule
from avlit.ranks import is_distributed, is_sharded

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ASKED = "avlit/stop_asked"
"""Key in the ranks' common store under which one that waits for the first tells it of a signal."""


class StopRequestedError(Exception):
    """Work that can be done again after a resume (samples, a measurement) gives way to a stop."""


class Stopping(pl.Callback):
    """Looks before the first and at the end of every step, as the last of the callbacks, whether any rank was asked to.

    save: writes the state of a step, on all ranks. `stopped_by` is the signal that ended the run. A second SIGINT ends
    it at once, without waiting for anything.
    """

    def __init__(self, save: Callable[[pl.Trainer, AVModule, int], None]):
        self.save = save
        self.asked: signal.Signals | None = None
        self.stopped_by: signal.Signals | None = None
        self.module: AVModule | None = None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Inside, the signals are taken note of; outside they do what they did before."""
        previous = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Only takes note: what a handler may do safely is little."""
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one needs no Python to work
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.module = module if isinstance(module, AVModule) else None
        # Lightning's own handlers communicate from inside the handler, and end the run without saving it.
        trainer._signal_connector.register_signal_handlers = lambda: None
        if is_distributed():  # over the hosts, never the devices; whoever waits there does so as long as it takes
            self.hosts: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            self.store: Any = dist.distributed_c10d._get_default_store()

    def check(self) -> None:
        """StopRequestedError if the run is to stop: for work between two steps that takes long.

        It is the first rank's, or that of all, each for itself; where the model is sharded they do it in step, and stop
        together.
        """
        if self.module is not None and is_sharded(self.module.model):
            if self._any_rank_asked():
                raise StopRequestedError
        elif self.asked is not None or (is_distributed() and self.store.check([ASKED])):
            raise StopRequestedError

    def meet(self) -> None:
        """Wait until all ranks are here; one that is sent a signal meanwhile lets the first know, for its `check`."""
        if not is_distributed():
            return
        meeting = dist.barrier(group=self.hosts, async_op=True)
        assert meeting is not None
        while not meeting.is_completed():  # not `wait`, which handles no signal before it returns
            if self.asked is not None:
                self.store.set(ASKED, str(int(self.asked)))
            time.sleep(0.02)
        meeting.wait()

    def finish(self) -> None:
        """Take note of what was asked after the last step."""
        self.stopped_by = self.asked

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A signal that came during the first measurements: they are made up for, so no step must come before."""
        if self._any_rank_asked():
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule)
        if module.has_stepped(trainer, batch_idx) and self._any_rank_asked():
            self.save(trainer, module, module.steps_done(trainer))
            trainer.should_stop = True

    def _any_rank_asked(self) -> bool:
        number = int(self.asked or 0)
        if is_distributed():
            flag = torch.tensor(number)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.hosts)
            number = int(flag)
        if number:
            self.stopped_by = signal.Signals(number)
        return bool(number)
