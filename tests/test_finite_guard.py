"""Updates that are not finite are named with their samples; too many in a row stop a run or bring it back."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from avlit.checkpoint_writer import CheckpointWriter
from avlit.checkpoints import Checkpoint, CheckpointState, newest_valid
from avlit.commands.train import train
from avlit.commit import committed_dirs, step_of
from avlit.config import load_config
from avlit.module import AVModule
from avlit.provenance import Provenance, differences
from avlit.tracking import Tracker
from benchmarks.loop import make_batches
from callbacks.checkpointing import Checkpointing
from callbacks.ema import EMA
from callbacks.finite_guard import FiniteGuard, NonFiniteTrainingError, RollBack
from tests import kill_fuzz
from tests.test_module import Poisoned, fit
from tests.test_resume import only_run, resumed, words


def test_samples_of_an_update_that_was_left_out_are_named_with_its_step(tmp_path, capsys):
    fit(Poisoned(steps=6, at=(2, 3)), tmp_path, FiniteGuard(every=3, max_in_a_row=3))
    printed = capsys.readouterr()
    printed = printed.out + printed.err
    batches = make_batches(6)
    assert f"step 3: {', '.join(batches[2].keys)}" in printed and f"step 4: {', '.join(batches[3].keys)}" in printed
    assert "step 2:" not in printed and "step 5:" not in printed


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_too_many_in_a_row_stop_training_at_a_step_that_is_the_same_however_often_samples_are_named(tmp_path, every):
    module = Poisoned(steps=9, at=tuple(range(1, 9)))  # the second to the ninth: at the third step there were two
    with pytest.raises(NonFiniteTrainingError, match=r"last 5 .*max_nonfinite=3.*step 6.*on_nonfinite=roll_back"):
        fit(module, tmp_path, FiniteGuard(every=every, max_in_a_row=3), batches=make_batches(9))


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


# Whole runs, through the commands.


class Faults:
    """Steps, from 1, whose loss is made NaN, and steps during which the process sends itself a SIGTERM, once each."""

    def __init__(self, bad: tuple[int, ...]):
        self.bad = bad
        self.stops: set[int] = set()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    monkeypatch.setattr(Tracker, "_start_sender", Tracker._start_sender)  # put back after the test
    kill_fuzz.keep_in_spool()
    injected, training_step = Faults(bad=()), AVModule.training_step

    def faulty_step(self: AVModule, batch, batch_index):
        step, output = batch.step + 1, training_step(self, batch, batch_index)
        if step in injected.bad:
            output["loss"] = output["loss"] * float("nan")  # pyright: ignore[reportOperatorIssue]
        if step in injected.stops:
            injected.stops.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return output

    monkeypatch.setattr(AVModule, "training_step", faulty_step)
    yield injected


SHORT = (
    "recipe=mtv_stage1", "train.steps=14", "train.log_every=5", "train.max_nonfinite=2", "train.on_nonfinite=roll_back",
    "ema.decay=0.9", "checkpoint.keep=2", "checkpoint.every=6", "validation.clips=0", "sample.count=0",
    "sample.every=0",
)  # fmt: skip


def steps_saved(folder: Path) -> list[int | None]:
    return [step_of(path) for path in committed_dirs(only_run(folder).checkpoints_dir)]


def last_checkpoint(folder: Path) -> Checkpoint:
    checkpoint, skipped = newest_valid(only_run(folder).checkpoints_dir)
    assert checkpoint is not None and not skipped
    return checkpoint


def assert_equal(first: Checkpoint, second: Checkpoint) -> None:
    assert first.step == second.step and first.state.counters == second.state.counters
    for ours, theirs in (
        (first.weights(), second.weights()), (first.ema(), second.ema()), (first.optimizer(), second.optimizer())
    ):  # fmt: skip
        assert ours and ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_a_run_that_is_stopped_around_a_roll_back_equals_the_undisturbed_one(tmp_path, faults, capsys):
    faults.bad, cache = (8, 9, 10, 13), tmp_path / "cache"
    assert train(load_config(words(tmp_path / "whole", cache, *SHORT))).exit_status == 0
    assert capsys.readouterr().out.count("are those of step 6 again") == 1

    # When it is stopped after step 9, two in a row are there already; the undisturbed run looks after step 10.
    faults.stops = {7, 8, 9, 10, 13}
    stopped = tmp_path / "stopped"
    assert train(load_config(words(stopped, cache, *SHORT))).exit_status == 143
    for number in range(4):
        assert resumed(stopped) == 143, number
        assert 6 in steps_saved(stopped) or 12 in steps_saved(stopped)
    assert resumed(stopped) == 0
    printed = capsys.readouterr().out
    assert printed.count("are those of step 6 again") == 1
    for step in range(1, 15):  # each is named once, by whichever session
        assert printed.count(f" step {step}: ") == (step in faults.bad), (step, printed)
    whole = last_checkpoint(tmp_path / "whole")
    assert whole.step == 14 and whole.state.counters["roll_backs"] == 1 and whole.state.counters["skipped"] == 4
    assert_equal(last_checkpoint(stopped), whole)


def test_a_run_that_stopped_goes_on_with_a_roll_back_as_if_it_had_been_told_to_from_the_start(tmp_path, faults):
    faults.bad, cache = (7, 8, 9, 10), tmp_path / "cache"
    # Saved at every step: the newest two hold nothing to go back to when it is decided to, after step 9.
    dense = (*SHORT, "train.max_nonfinite=3", "checkpoint.every=1", "train.steps=12")
    assert train(load_config(words(tmp_path / "whole", cache, *dense))).exit_status == 0

    faults.stops = {6}
    stopped = tmp_path / "stopped"
    without = [word for word in words(stopped, cache, *dense) if not word.startswith("train.on_nonfinite")]
    assert train(load_config(without)).exit_status == 143
    for _ in range(2):  # from step 8, too
        with pytest.raises(NonFiniteTrainingError, match=r"resume with train\.on_nonfinite=roll_back"):
            resumed(stopped)
        assert steps_saved(stopped) == [8, 7, 6]
    assert resumed(stopped, "train.on_nonfinite=roll_back") == 0
    assert_equal(last_checkpoint(stopped), last_checkpoint(tmp_path / "whole"))


@pytest.mark.parametrize("key", ["max_nonfinite", "every"])
def test_what_decides_on_roll_backs_is_not_changed_unasked_in_a_run_that_has_them(key):
    def made(on_nonfinite: str, value: int) -> Provenance:
        values = {"max_nonfinite": 10, "every": 500, key: value}
        return Provenance(
            f"train: {{on_nonfinite: {on_nonfinite}, max_nonfinite: {values['max_nonfinite']}}}\n"
            f"checkpoint: {{every: {values['every']}, keep: {value}}}\n"
        )

    (line,) = differences(made("roll_back", 3), made("roll_back", 4))
    assert f"{key} was 3, is 4" in line
    assert differences(made("stop", 3), made("stop", 4)) == []
    assert differences(made("stop", 3), made("roll_back", 4)) == []
