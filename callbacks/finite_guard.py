"""Watches the updates that were left out because they were not finite: names their samples, stops or rolls back."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from tqdm import tqdm

from avlit.batch import AVBatch
from avlit.checkpoints import Checkpoint, CheckpointState, newest_valid
from avlit.errors import UserError
from avlit.inherit import restore_weights
from avlit.module import AVModule
from avlit.ranks import gather
from callbacks.checkpointing import Checkpointing
from callbacks.ema import EMA

MAX_LISTED = 2000


class NonFiniteTrainingError(UserError):
    """Too many updates in a row were left out because the loss or a gradient was not finite."""


class FiniteGuard(pl.Callback):
    """Names what was left out every `every` steps and when asked to; acts on too many in a row, at steps of its own.

    max_in_a_row: updates left out in a row at which the run stops, or is rolled back where `roll_back` is given (see
    `RollBack`) and has been used fewer than max_roll_backs times. They are counted on the device; the count is read,
    which waits for it, at multiples of max_in_a_row and at the end: which steps these are depends on nothing that
    happens to a run, so that one which was stopped or killed comes to the same decisions.
    """

    def __init__(
        self,
        *,
        every: int,
        max_in_a_row: int,
        roll_back: Callable[[pl.Trainer, AVModule], int] | None = None,
        max_roll_backs: int = 0,
    ):
        self.every = every
        self.max_in_a_row = max_in_a_row
        self.roll_back = roll_back
        self.max_roll_backs = max_roll_backs
        self.num_roll_backs = 0
        self.keys: tuple[str, ...] = ()
        self.window: list[tuple[int, tuple[str, ...], torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule) and isinstance(batch, AVBatch)
        self.keys += batch.keys
        if not module.has_stepped(trainer, batch_idx):
            return
        step = module.steps_done(trainer)
        self.window.append((step, self.keys, module.skip))
        self.keys = ()
        is_last = step == module.total_steps
        if is_last or step % self.every == 0:
            self.name()
        if is_last or step % self.max_in_a_row == 0:
            self._act(trainer, module, step)

    def name(self) -> None:
        """Name the samples of what was left out since the last time, once. Waits for the device; on all ranks.

        What is saved afterwards owes nobody a name: a resumed run starts without those of the steps before it.
        """
        if not self.window:
            return
        left_out = torch.stack([skip for _, _, skip in self.window]).tolist()  # the same on all ranks
        newest, _, _ = self.window[-1]
        bad = [(at, keys) for (at, keys, _), flag in zip(self.window, left_out, strict=True) if flag]
        self.window.clear()
        if not bad:
            return
        ranks = gather([keys for _, keys in bad])
        keys_of = {at: [key for rank in ranks for key in rank[number]] for number, (at, _) in enumerate(bad)}
        listed = "; ".join(f"step {at}: {', '.join(keys)}" for at, keys in keys_of.items())
        tqdm.write(
            f"{len(bad)} update(s) up to step {newest} were left out: the loss or a gradient was not finite. Weights "
            f"and moments are unchanged by them. {listed[:MAX_LISTED]}"
        )

    def _act(self, trainer: pl.Trainer, module: AVModule, step: int) -> None:
        in_a_row = int(module.skipped_in_a_row)
        if in_a_row < self.max_in_a_row:
            return
        self.name()
        told = f"the last {in_a_row} updates were not finite (train.max_nonfinite={self.max_in_a_row})"
        if self.roll_back is None:
            raise NonFiniteTrainingError(
                f"{told}; stopped at step {step}. Lower optimizer.lr, look at those samples, or resume with "
                "train.on_nonfinite=roll_back"
            )
        if self.num_roll_backs == self.max_roll_backs:
            raise NonFiniteTrainingError(
                f"{told} after {self.num_roll_backs} returns to a checkpoint (train.max_roll_backs); stopped at {step}"
            )
        source = self.roll_back(trainer, module)
        self.num_roll_backs += 1
        tqdm.write(
            f"{told}: weights, average and moments are those of step {source} again; training goes on with the clips "
            f"of step {step + 1}, return {self.num_roll_backs} of at most {self.max_roll_backs}"
        )


def is_sound(state: CheckpointState, *, every: int) -> bool:
    """Whether a run that saves every `every` steps may be rolled back to it: its last update was finite.

    What was saved besides, because the run was stopped there, an undisturbed one does not have.
    """
    return state.step % every == 0 and state.counters.get("skipped_in_a_row") == 0


class RollBack:
    """Brings weights, average and moments back to the last checkpoint from before the updates went wrong.

    The count of steps goes on, and with it data, noise and schedule: the window of clips that led there is not
    repeated. Which checkpoint that is depends on its step alone, so that a resumed run takes the same.
    """

    def __init__(self, saving: Checkpointing, ema: EMA):
        self.saving = saving
        self.ema = ema

    def __call__(self, trainer: pl.Trainer, module: AVModule) -> int:
        """Returns the step it went back to. NonFiniteTrainingError: there is no such checkpoint."""
        self.saving.writer.wait()
        trainer.strategy.barrier()
        folder = self.saving.writer.folder
        checkpoint, _ = newest_valid(folder, accept=lambda state: is_sound(state, every=self.saving.every))
        if checkpoint is None:
            raise NonFiniteTrainingError(
                f"{folder}: holds no checkpoint from before the updates were not finite whose step is a multiple of "
                f"checkpoint.every={self.saving.every}"
            )
        self.restore(trainer, module, checkpoint)
        return checkpoint.step

    def restore(self, trainer: pl.Trainer, module: AVModule, checkpoint: Checkpoint) -> None:
        restore_weights(module.model, checkpoint, module.saved_weights())
        module.restore_moments(trainer.optimizers[0], checkpoint)
        self.ema.restore(checkpoint)
        module.skipped_in_a_row.zero_()
