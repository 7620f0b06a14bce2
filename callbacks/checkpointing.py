"""Saves the run every so many steps, at the end and when asked to stop; the writing goes on behind the training."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from avlit.checkpoints import CheckpointState, CheckpointWriter, free_bytes_needed
from avlit.commit import check_writable
from avlit.inherit import flatten_optimizer
from avlit.module import AVModule
from callbacks.ema import EMA

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Checkpointing(pl.Callback):
    """Commits weights, average, optimizer and counters.

    state: step -> the state that goes with the tensors. every: steps between saves; 0 saves at the end only.
    On SIGINT, SIGTERM or SIGUSR1 the step under way is finished, the run is saved and training ends; `stopped_by` is
    then the signal. A second SIGINT ends it at once.
    """

    def __init__(
        self, writer: CheckpointWriter, *, every: int, ema: EMA, state: Callable[[int], CheckpointState], keep: int
    ):
        self.writer = writer
        self.every = every
        self.ema = ema
        self.state = state
        self.keep = keep
        self.stopped_by: signal.Signals | None = None
        self.saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        weights = module.saved_weights()
        trained = list(module.trained_parameters.values())
        moments = {f"{i}/{slot}": p for i, p in enumerate(trained) for slot in ("exp_avg", "exp_avg_sq")}
        if trainer.is_global_zero:
            check_writable(self.writer.folder, free_bytes_needed(weights, moments, self.ema.average, keep=self.keep))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.hosts: Any = torch.distributed.new_group(backend="gloo")  # asks the other hosts, never the device
        # Only a flag is set in the handler; Lightning's own would end the run without saving it.
        self.previous = {number: signal.signal(number, self._ask_to_stop) for number in STOP_SIGNALS}

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = signal.Signals(number)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule)
        if not module.has_stepped(trainer, batch_idx):
            return
        step = module.steps_done(trainer)
        if self._any_rank_stops():
            self.save(trainer, module, step)
            trainer.should_stop = True
        elif step == module.total_steps or (self.every and step % self.every == 0):
            self.save(trainer, module, step)

    def _any_rank_stops(self) -> bool:
        asked = self.stopped_by is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(float(self.stopped_by or 0))
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.hosts)
            asked = flag.item() > 0
            if asked:
                self.stopped_by = signal.Signals(int(flag.item()))
        return asked

    def save(self, trainer: pl.Trainer, module: AVModule, step: int) -> None:
        """Copy the state now, write it behind; a step is saved once."""
        if step == self.saved_step:
            return
        self.saved_step = step
        if trainer.is_global_zero:
            optimizer = trainer.optimizers[0]
            tensors, meta = flatten_optimizer(optimizer, module.trained_parameters)
            state = self.state(step)
            state.optimizer.update(meta)
            average: dict[str, Tensor] = self.ema.average
            self.writer.save(weights=module.saved_weights(), optimizer=tensors, ema=average, state=state)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.writer.wait()
        self._restore_signals()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.writer.wait()
        self._restore_signals()

    def _restore_signals(self) -> None:
        for number, handler in getattr(self, "previous", {}).items():
            signal.signal(number, handler)
        self.previous = {}
