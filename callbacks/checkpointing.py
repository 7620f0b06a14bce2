"""Saves the run every so many steps and at the end; the writing goes on behind the training."""

from collections.abc import Callable, Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from avlit.checkpoint_writer import CheckpointWriter
from avlit.checkpoints import CheckpointState, free_bytes_needed
from avlit.commit import CheckpointError, check_writable
from avlit.errors import UserError
from avlit.inherit import flatten_optimizer
from avlit.module import AVModule
from callbacks.ema import EMA


class Checkpointing(pl.Callback):
    """Commits weights, average, optimizer and counters.

    state: step -> the state that goes with the tensors; called on all ranks. every: steps between saves.
    num_kept: checkpoints that retention leaves at most, for which room must be free.
    """

    def __init__(
        self, writer: CheckpointWriter, *, every: int, ema: EMA, state: Callable[[int], CheckpointState], num_kept: int
    ):
        self.writer = writer
        self.every = every
        self.ema = ema
        self.state = state
        self.num_kept = num_kept
        self.saved_step = -1
        self.passed_step = -1  # the last one that the callbacks before this one let pass

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        self.saved_step = module.start_step
        weights, average = module.saved_weights(), self.ema.average
        moments = coming_moments(trainer.optimizers[0], module.trained_parameters)
        if trainer.is_global_zero:
            need = free_bytes_needed(weights, moments, average, keep=self.num_kept, folder=self.writer.folder)
            check_writable(self.writer.folder, need)
        self.writer.reserve(weights=weights, optimizer=moments, ema=average)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule)
        if not module.has_stepped(trainer, batch_idx):
            return
        step = module.steps_done(trainer)
        self.passed_step = step
        if step == module.total_steps or step % self.every == 0:
            self.save(trainer, module, step)

    def save(self, trainer: pl.Trainer, module: AVModule, step: int) -> None:
        """Copy the state now, write it behind; a step is saved once. Called on all ranks."""
        if step == self.saved_step:
            return
        state = self.state(step)
        weights, average = module.saved_weights(), self.ema.average
        moments, meta = flatten_optimizer(trainer.optimizers[0], module.trained_parameters)
        state.optimizer.update(meta)
        self.writer.save(weights=weights, optimizer=moments, ema=average, state=state)
        self.saved_step = step

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.writer.wait()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Nothing that was trained is lost to data that cannot be read: that ends a run between two micro-batches."""
        assert isinstance(module, AVModule)
        if isinstance(exception, KeyboardInterrupt | CheckpointError):  # "stop now", or saving is what failed
            return
        is_between_steps = isinstance(exception, UserError) and trainer.optimizers and trainer.world_size == 1
        step = module.steps_done(trainer)
        if is_between_steps and step == self.passed_step:
            self.save(trainer, module, step)
            self.writer.wait()
            tqdm.write(f"Step {step} is saved: a resume goes on from there")
        self.writer.patience_s = 10.0  # it may be another rank's end that is the exception here
        self.writer.wait()


def coming_moments(optimizer: torch.optim.Optimizer, names: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Tensors of the names, shapes and devices that `flatten_optimizer` gives after a step; not of their values."""
    tensors, _ = flatten_optimizer(optimizer, names)
    if tensors:  # of a resumed run
        return tensors
    for name, parameter in names.items():
        tensors |= {f"{name}/exp_avg": parameter.detach(), f"{name}/exp_avg_sq": parameter.detach()}
        tensors[f"{name}/step"] = torch.zeros((), device=parameter.device)  # of the fused AdamW
    return tensors
