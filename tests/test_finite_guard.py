"""Updates that are not finite are named with their samples; too many in a row stop a run or bring it back."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from avlit.checkpoints import CheckpointState, CheckpointWriter, newest_valid
from benchmarks.loop import make_batches
from callbacks.checkpointing import Checkpointing
from callbacks.ema import EMA
from callbacks.finite_guard import FiniteGuard, NonFiniteTrainingError, RollBack
from tests.test_module import Poisoned, fit


def test_samples_of_an_update_that_was_left_out_are_named_with_its_step(tmp_path, capsys):
    fit(Poisoned(steps=6, at=(2, 3)), tmp_path, FiniteGuard(every=3, max_in_a_row=3))
    printed = capsys.readouterr()
    printed = printed.out + printed.err
    batches = make_batches(6)
    assert f"step 3: {', '.join(batches[2].keys)}" in printed and f"step 4: {', '.join(batches[3].keys)}" in printed
    assert "step 2:" not in printed and "step 5:" not in printed


def test_too_many_in_a_row_stop_training_and_say_what_to_do(tmp_path):
    module = Poisoned(steps=6, at=(1, 2, 3, 4, 5))
    with pytest.raises(NonFiniteTrainingError, match=r"train\.max_nonfinite=3.*step 4.*on_nonfinite=roll_back"):
        fit(module, tmp_path, FiniteGuard(every=2, max_in_a_row=3))


def test_fewer_than_that_in_a_row_do_not(tmp_path):
    module = Poisoned(steps=8, at=(1, 2, 4, 5))
    fit(module, tmp_path, FiniteGuard(every=2, max_in_a_row=3), batches=make_batches(8))
    assert module.skipped == 4


def rolled_back(
    tmp_path: Path, *, at: tuple[int, ...], steps: int, max_roll_backs: int = 2, watch: list[pl.Callback] | None = None
) -> tuple[Poisoned, FiniteGuard, Checkpointing]:
    """A run that saves every second step, looks every second, and goes back after two in a row."""
    module, ema = Poisoned(steps=steps, at=at), EMA(decay=0.9)

    def state(step: int) -> CheckpointState:
        counters = {"skipped_in_a_row": float(module.skipped_in_a_row), "ema_updates": float(ema.num_updates)}
        return CheckpointState(step=step, seed=0, recipe="none", counters=counters)

    writer = CheckpointWriter(tmp_path / "checkpoints", keep=4)
    saving = Checkpointing(writer, every=2, ema=ema, state=state, num_kept=4)
    guard = FiniteGuard(
        every=2, max_in_a_row=2, roll_back=RollBack(saving, ema), max_roll_backs=max_roll_backs
    )  # fmt: skip
    fit(module, tmp_path, ema, guard, saving, *(watch or []), batches=make_batches(steps))
    return module, guard, saving


def test_a_roll_back_restores_weights_average_and_moments_of_the_step_before_it_went_wrong(tmp_path):
    states: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            moments = [state["exp_avg_sq"].clone() for state in trainer.optimizers[0].state.values()]
            assert isinstance(pl_module, Poisoned)
            states[trainer.global_step] = ([p.detach().clone() for p in pl_module.model.parameters()], moments)

    # Steps 5 and 6 are left out (at counts from 0); seen after step 6; step 4 was saved before them.
    module, guard, saving = rolled_back(tmp_path, at=(4, 5), steps=8, watch=[Watch()])
    assert guard.num_roll_backs == 1
    for before, after in zip(states[4], states[6], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert module.skipped == 2 and not any(
        torch.equal(a, b) for a, b in zip(states[6][0], states[8][0], strict=True)
    )  # fmt: skip
    newest, _ = newest_valid(saving.writer.folder)
    assert newest is not None and newest.step == 8


def test_a_run_that_keeps_going_wrong_stops_after_the_roll_backs_it_may_have(tmp_path):
    with pytest.raises(NonFiniteTrainingError, match=r"after 2 returns to a checkpoint \(train\.max_roll_backs\)"):
        rolled_back(tmp_path, at=tuple(range(4, 20)), steps=20)


def test_without_a_checkpoint_from_before_a_roll_back_says_so(tmp_path):
    with pytest.raises(NonFiniteTrainingError, match="holds no checkpoint from before"):
        rolled_back(tmp_path, at=(0, 1), steps=4)
