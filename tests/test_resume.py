"""Runs that are stopped, killed or changed, through the real commands and processes: they go on as if nothing was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from avlit.checkpoints import newest_valid
from avlit.commands import curriculum, resume, session
from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
from avlit.commands.session import Outcome
from avlit.commands.train import main as train_command
from avlit.commands.train import train
from avlit.config import Config, from_yaml, load_config
from avlit.errors import UserError
from avlit.runs import Run, list_runs
from avlit.tracking import Tracker
from data.shard_index import ShardError, index_path, parse_index
from tests import kill_fuzz
from tests.kill_fuzz import fuzz, read_points, tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _keep_in_spool(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run of seconds would mostly wait for; tests/test_tracking.py sends."""
    monkeypatch.setattr(Tracker, "_start_sender", Tracker._start_sender)  # put back after the test
    kill_fuzz.keep_in_spool()


def words(folder: Path, cache: Path, *more: str) -> list[str]:
    """Words of a run of seconds with everything in `folder`; later ones replace earlier ones."""
    given = [
        *tiny(more),
        f"runs_dir={folder}/runs",
        "tracking.uri=offline",
        f"data.cache_dir={cache}",
    ]
    return list({word.partition("=")[0]: word for word in (*given, "train.accelerator=cpu", *more)}.values())


def only_run(folder: Path) -> Run:
    (run,) = list_runs(folder / "runs")
    return run


def points(run: Run) -> dict[tuple[str, int], set[float]]:
    return read_points(run.spool_dir / "metrics.jsonl")


def resumed(folder: Path, *more: str) -> int:
    return resume.main(["run=last", f"runs_dir={folder}/runs", *more])


# Kills.


@pytest.mark.parametrize(
    "settings",
    [
        ("recipe=mtv", "data.workers=2"),
        ("recipe=mtv", "train.accumulate=2"),
        ("recipe=unitalking", "data.subsets={basic_face: 1}"),
        ("recipe=jova",),
        ("recipe=mmcontrol",),
    ],
)
def test_a_curriculum_killed_at_random_moments_equals_one_that_was_not(tmp_path: Path, settings: tuple[str, ...]):
    kill_fuzz.preload()
    report = fuzz(tmp_path, ["train.steps=4", *settings], kills=3, seed=len(settings))
    assert report.differing == [] and report.doubled == []
    assert report.compared > 800 and report.sessions >= 2, report


# Signals.


class Command:
    """`python -m avlit …` as a process of its own, with what it prints."""

    def __init__(self, folder: Path, *given: str):
        self.log = folder / "printed.txt"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "avlit", *given], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        self.watchdog = threading.Timer(150, self.process.kill)
        self.watchdog.start()

    def await_step(self, runs: Path) -> None:
        """Return once a training step has been logged."""
        while self.process.poll() is None:
            if any(name == "train/lr" for path in runs.glob("*/spool/metrics.jsonl") for name, _ in read_points(path)):
                return
            time.sleep(0.05)
        raise AssertionError(f"ended before its first step:\n{self.printed()}")

    def further_ranks(self) -> list[int]:
        """Processes that Lightning started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(c) for c in children if b"avlit.__main__" in Path(f"/proc/{c}/cmdline").read_bytes()]

    def end(self) -> int:
        try:
            return self.process.wait()
        finally:
            self.watchdog.cancel()

    def printed(self) -> str:
        return self.log.read_text(errors="replace")


TWO_RANKS = (
    "train.devices=2",
    "strategy=ddp",
    "checkpoint.every=1000",
    "validation.every=1000",
    "sample.count=0",
)


@pytest.mark.parametrize(("asked", "number"), [("first", signal.SIGUSR1), ("further", signal.SIGTERM)])
def test_a_signal_to_any_rank_saves_within_a_step_and_ends_with_143(
    tmp_path: Path, cache: Path, asked: str, number: int
):
    command = Command(tmp_path, "train", *words(tmp_path, cache, "recipe=mtv_stage1", "train.steps=9000", *TWO_RANKS))
    command.await_step(tmp_path / "runs")
    (further,) = command.further_ranks()
    before = max(step for name, step in points(only_run(tmp_path)) if name == "train/lr")
    os.kill(further if asked == "further" else command.process.pid, number)
    assert command.end() == 143, command.printed()
    run = only_run(tmp_path)
    checkpoint, _ = newest_valid(run.checkpoints_dir)
    assert checkpoint is not None and before <= checkpoint.step < before + 100
    assert max(step for name, step in points(run) if name == "train/lr") == checkpoint.step
    assert run.record().status == "stopped"
    assert f"just resume run={run.id}" in command.printed()


def test_two_ranks_and_one_give_the_same_batches_and_losses_across_a_resume(tmp_path: Path, cache: Path):
    settings = ("recipe=mtv_stage1", "train.steps=40", "data.batch_size=8")
    undisturbed, changing = tmp_path / "undisturbed", tmp_path / "changing"
    changing.mkdir()
    train(load_config(words(undisturbed, cache, *settings, "checkpoint.every=1000", "sample.every=0")))
    given = words(changing, cache, *settings, *TWO_RANKS, "sample.every=0", "sample.count=1")
    command = Command(changing, "train", *given)
    command.await_step(changing / "runs")
    for process in (command.process.pid, *command.further_ranks()):  # all of them, as a scheduler does
        os.kill(process, signal.SIGTERM)
    assert command.end() == 143, command.printed()
    stopped_at = newest_valid(only_run(changing).checkpoints_dir)[0]
    assert stopped_at is not None and stopped_at.step < 40
    with pytest.raises(UserError, match=r"train\.devices was 2, is 1"):
        resumed(changing, "train.devices=1", "strategy=auto")
    assert resumed(changing, "train.devices=1", "strategy=auto", "allow_change=true") == 0
    one, two = points(only_run(undisturbed)), points(only_run(changing))
    logged = [place for place in one if place[0] == "data/key_hash"]
    assert len(logged) == 40 and all(one[place] == two[place] for place in logged)
    for place in one:
        if place[0].startswith("train/loss"):
            assert max(two[place]) == pytest.approx(max(one[place]), rel=1e-5, abs=1e-6), place


def test_one_interrupt_saves_and_says_how_to_go_on_and_a_second_ends_at_once(tmp_path: Path, cache: Path):
    given = words(tmp_path, cache, "recipe=mtv_stage1", "train.steps=9000", "checkpoint.every=1000", "sample.count=0")
    command = Command(tmp_path, "train", *given)
    command.await_step(tmp_path / "runs")
    command.process.send_signal(signal.SIGINT)
    assert command.end() == 130, command.printed()
    assert f"just resume run={only_run(tmp_path).id}" in command.printed()
    assert "Lightning" not in command.printed()  # it advertises
    saved, _ = newest_valid(only_run(tmp_path).checkpoints_dir)
    assert saved is not None

    # The second finds the first still waiting for its step: sampling of many steps is under way in it.
    slow = ["sample.every=1", "sample.steps=1000", "sample.count=16", f"run={only_run(tmp_path).id}"]
    command = Command(tmp_path, "resume", f"runs_dir={tmp_path}/runs", *slow)
    while "training" not in command.printed() and command.process.poll() is None:
        time.sleep(0.05)
    for _ in range(2):
        command.process.send_signal(signal.SIGINT)
    assert command.end() == 130, command.printed()
    assert only_run(tmp_path).record().status == "stopped"
    assert newest_valid(only_run(tmp_path).checkpoints_dir)[0] is not None


# Data.


def damage(config: Config, *, step: int) -> None:
    """Flip a byte of the first sample of a step's batch."""
    datamodule = build_datamodule(config, shard_roots(config), build_encoders(config))
    ref = datamodule.reader().order.batch(step)[0]
    shard = datamodule.shards.shards[ref.shard]
    root = shard_roots(config)[0]
    index = parse_index(index_path(root / f"{shard.name}.tar").read_bytes())
    place = index.samples[ref.index].members["safetensors"]
    with open(root / f"{shard.name}.tar", "r+b") as file:
        file.seek((place.start + place.end) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_a_run_that_data_stopped_is_saved_and_goes_on_as_if_the_damage_had_been_allowed(tmp_path: Path, capsys):
    cache = tmp_path / "cache"
    given = ("recipe=mtv_stage1", "train.steps=6", "checkpoint.every=1000", "sample.count=0", "sample.every=0")
    started(tmp_path / "first", cache)  # writes the corpus
    strict = words(tmp_path / "stopped", cache, *given, "data.max_bad=0")
    damage(load_config(strict), step=3)
    with pytest.raises(ShardError, match=r"1 of 17 samples read were damaged by step 3; data\.max_bad=0"):
        train(load_config(strict))
    assert "Step 3 is saved" in capsys.readouterr().out
    assert only_run(tmp_path / "stopped").record().status == "failed"
    assert resumed(tmp_path / "stopped", "data.max_bad=0.5") == 0
    whole = train(load_config(words(tmp_path / "whole", cache, *given, "data.max_bad=0.5"))).run
    assert points(only_run(tmp_path / "stopped")) == points(whole)


# What may change, and what may not.


def started(tmp_path: Path, cache: Path, *more: str) -> Run:
    """A run of two steps that has finished."""
    given = words(tmp_path, cache, "recipe=mtv_stage1", "train.steps=2", "sample.count=0", "sample.every=0", *more)
    return train(load_config(given)).run


def test_a_finished_run_goes_on_only_if_told_to_and_then_with_what_it_had(tmp_path: Path, cache: Path):
    run = started(tmp_path, cache, "optimizer.schedule=constant", "optimizer.warmup=0")
    with pytest.raises(UserError, match=r"has finished its 2 steps; train\.steps=MORE allow_change=true"):
        resumed(tmp_path)
    with pytest.raises(UserError, match=r"config: train\.steps was 2, is 4"):
        resumed(tmp_path, "train.steps=4")
    assert resumed(tmp_path, "train.steps=4", "allow_change=true") == 0
    longer = train(
        load_config(
            words(
                tmp_path / "longer", cache, "recipe=mtv_stage1", "train.steps=4", "sample.count=0", "sample.every=0",
                "optimizer.schedule=constant", "optimizer.warmup=0",
            )
        )
    ).run  # fmt: skip
    pair = [newest_valid(each.checkpoints_dir)[0] for each in (run, longer)]
    assert pair[0] is not None and pair[1] is not None
    ours, theirs = pair[0].weights(), pair[1].weights()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_where_things_are_and_what_is_reported_may_change_freely(tmp_path: Path, cache: Path):
    run = started(tmp_path, cache)
    run.update(status="stopped")
    assert resumed(tmp_path, "data.workers=1", "train.log_every=5", "sample.steps=2", "checkpoint.keep=3") == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=1", r"config: seed was 0, is 1"),
        ("optimizer.lr=0.5", r"config: optimizer\.lr was 0\.001, is 0\.5"),
        ("init=last", "starts a new run from weights"),
        ("train.stpes=3", r"train\.stpes: no such key"),
        ("recipe=mtv_stage2", "recipe: the run was made with recipe=mtv_stage1"),
        ("allow_change=yes", "must be true or false"),
    ],
)
def test_a_changed_config_is_refused_with_the_difference(tmp_path: Path, cache: Path, word: str, message: str):
    run = started(tmp_path, cache)
    run.update(status="stopped")
    before = run.config_path.read_text()
    with pytest.raises(UserError, match=message):
        resumed(tmp_path, word)
    assert run.config_path.read_text() == before and run.record().status == "stopped"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.num_layers=2", r"tensors are not in both|of other parameters"),
        ("model.audio_hidden=32", r"is \[.*\] there, \[.*\] in the model"),
        ("sample.scheduler=LCMScheduler", r"sample\.scheduler=LCMScheduler"),
        ("train.accelerator=gpu", r"train\.accelerator=gpu .*not possible on this machine"),
    ],
)
def test_a_change_that_cannot_be_resumed_leaves_the_run_as_it_was(tmp_path: Path, cache: Path, word: str, message: str):
    if word == "train.accelerator=gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = started(tmp_path, cache)
    before = run.config_path.read_text(), run.provenance_path.read_text(), run.record()
    run.update(status="stopped")
    with pytest.raises(UserError, match=message):
        resumed(tmp_path, word, "train.steps=3", "allow_change=true")
    assert (run.config_path.read_text(), run.provenance_path.read_text()) == before[:2]
    assert run.record().status == "stopped"
    assert resumed(tmp_path) == 0


def test_a_config_file_that_was_edited_is_refused_with_the_difference(tmp_path: Path, cache: Path):
    run = started(tmp_path, cache)
    run.update(status="stopped")
    run.config_path.write_text(run.config_path.read_text().replace("clip: 1.0", "clip: 0.25"))
    with pytest.raises(UserError, match=r"config: optimizer\.clip was 1\.0, is 0\.25"):
        resumed(tmp_path)
    assert resumed(tmp_path, "allow_change=true") == 0  # and from then on it is the run's
    run.update(status="stopped")
    assert resumed(tmp_path) == 0


def test_changed_code_libraries_and_data_are_refused_by_name(tmp_path: Path, cache: Path):
    run = started(tmp_path, cache)
    run.update(status="stopped")
    record = json.loads(run.provenance_path.read_text())
    record["code"]["avlit/objectives.py"] = "0" * 16
    record["versions"]["torch"] = "1.0"
    record["data"]["fingerprint"] = "other"
    run.provenance_path.write_text(json.dumps(record))
    with pytest.raises(UserError) as refused:
        resumed(tmp_path)
    for part in ("avlit/objectives.py (changed)", "library: torch was 1.0, is", "data: fingerprint was other, is"):
        assert part in str(refused.value)
    assert resumed(tmp_path, "allow_change=true") == 0


def test_damaged_checkpoints_are_named_and_the_one_before_is_resumed(tmp_path: Path, cache: Path, capsys):
    run = started(tmp_path, cache)
    run.update(status="stopped")
    newest = run.checkpoints_dir / "step-00000002" / "weights.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert resumed(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "checkpoint left out: step-00000002: weights.safetensors is damaged" in printed
    assert "Goes on from step 1 of 2" in printed
    assert newest_valid(run.checkpoints_dir)[0] is not None


def test_a_run_that_had_saved_nothing_begins_again_in_its_place_and_says_so(tmp_path: Path, cache: Path, capsys):
    run = started(tmp_path, cache)
    before = points(run)
    run.update(status="running")  # as if killed
    for path in run.checkpoints_dir.glob("step-*"):
        shutil.rmtree(path)
    assert resumed(tmp_path) == 0
    assert "saved nothing yet: begins again at step 0" in capsys.readouterr().out
    assert points(only_run(tmp_path)) == before


def test_without_any_whole_checkpoint_a_resume_says_so(tmp_path: Path, cache: Path):
    run = started(tmp_path, cache)
    run.update(status="stopped")
    for path in run.checkpoints_dir.glob("*/state.json"):
        path.unlink()
    with pytest.raises(UserError, match="none of its 2 checkpoints can be read"):
        resumed(tmp_path)


def test_a_stopped_curriculum_goes_on_by_the_same_words_or_by_resume_and_others_start_another(
    tmp_path: Path, cache: Path, capsys
):
    given = words(tmp_path, cache, "train.steps=1", "sample.count=0", "sample.every=0", "validation.clips=0")
    assert curriculum.main(["recipe=mtv", *given]) == 0
    parent = next(run for run in list_runs(tmp_path / "runs") if run.recipe == "mtv_curriculum")
    last = list_runs(tmp_path / "runs")[-1]
    for run in (parent, last):  # as if stopped between its last save and its end
        run.update(status="stopped")
    capsys.readouterr()
    assert curriculum.main(["recipe=mtv", *given]) == 0
    printed = capsys.readouterr().out
    assert f"Resumes the curriculum, run {parent.id}" in printed and printed.count("Finished before") == 4
    for run in (parent, last):
        run.update(status="stopped")
    assert resumed(tmp_path) == 0  # run=last is its stage, and means the whole
    assert len(list_runs(tmp_path / "runs")) == 6
    with pytest.raises(UserError, match="all its stages have finished"):
        resume.main([f"run={parent.id}", f"runs_dir={tmp_path}/runs"])
    with pytest.raises(UserError, match="whose words hold for all stages"):
        parent.update(status="stopped")
        resume.main([f"run={parent.id}", f"runs_dir={tmp_path}/runs", "train.steps=4"])


# Curricula and beginnings.


SHORT = ("train.steps=1", "sample.count=0", "sample.every=0", "validation.clips=0")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """As if a Ctrl-C came once the run of this recipe has its folder."""

    def run_session(config: Config, run: Run, *, is_resumed: bool, allow_change: bool = False) -> Outcome:
        if run.recipe == recipe:
            raise KeyboardInterrupt
        return session.run_session(config, run, is_resumed=is_resumed, allow_change=allow_change)

    for module in ("train", "resume"):
        monkeypatch.setattr(f"avlit.commands.{module}.run_session", run_session)


def test_init_last_is_the_run_before_and_a_wrong_init_leaves_no_run(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    first = started(tmp_path, cache)
    given = words(tmp_path, cache, *SHORT)
    assert train_command(["recipe=mtv_stage1", "init=last", *given]) == 0
    second = list_runs(tmp_path / "runs")[-1]
    checkpoint = str(first.checkpoints_dir / "step-00000002")
    assert (second.record().init_run, second.record().init_checkpoint) == (first.id, checkpoint)
    assert from_yaml(second.read_config()).init == checkpoint
    begins, _ = newest_valid(second.checkpoints_dir)
    assert begins is not None and begins.state.lineage == ((first.id, 2), (second.id, 1))

    for command, recipe in ((train_command, "mtv_stage1"), (curriculum.main, "mtv")):
        with pytest.raises(UserError, match=r"^init=nowhere: run=nowhere: no such run"):
            command([f"recipe={recipe}", "init=nowhere", *given])
    assert list_runs(tmp_path / "runs") == [first, second]

    interrupt_at(monkeypatch, "mtv_stage1")
    for _ in range(2):  # the second time the last run is another, and the same words go on with the same curriculum
        with pytest.raises(KeyboardInterrupt):
            curriculum.main(["recipe=mtv", "init=last", *given])
    _, _, parent, stage = list_runs(tmp_path / "runs")
    assert [run.record().init_run for run in (parent, stage)] == [second.id, second.id]


def test_a_curriculum_that_was_moved_goes_on_where_it_is(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    given = words(tmp_path, cache, *SHORT)
    with monkeypatch.context() as patched:
        interrupt_at(patched, "mtv_stage2")
        with pytest.raises(KeyboardInterrupt):
            curriculum.main(["recipe=mtv", *given])
    moved = tmp_path / "elsewhere" / "runs"
    moved.parent.mkdir()
    (tmp_path / "runs").rename(moved)
    interrupt_at(monkeypatch, "mtv_stage3")
    with pytest.raises(KeyboardInterrupt):
        resume.main(["run=last", f"runs_dir={moved}"])
    with pytest.raises(KeyboardInterrupt):  # the same words, and where it is now
        curriculum.main(["recipe=mtv", *words(tmp_path, cache, *SHORT, f"runs_dir={moved}")])
    _, *stages = list_runs(moved)
    assert [stage.recipe for stage in stages] == ["mtv_stage1", "mtv_stage2", "mtv_stage3"]
    assert not (tmp_path / "runs").exists()
    assert [stage.record().status for stage in stages[:2]] == ["finished", "finished"]
    assert from_yaml(stages[2].read_config()).runs_dir == str(moved)
    checkpoint, _ = newest_valid(stages[1].checkpoints_dir)
    assert checkpoint is not None and checkpoint.state.lineage == ((stages[0].id, 1), (stages[1].id, 1))


def test_the_folder_of_a_curriculum_appears_with_its_plan(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def die(folder: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("avlit.runs.sync_folder", die)  # the first thing after the folder has its name
        curriculum.main(["recipe=mtv", *words(tmp_path, cache, *SHORT)])
    parent = only_run(tmp_path)
    interrupt_at(monkeypatch, "mtv_stage1")
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path)
    assert [run.parent for run in list_runs(tmp_path / "runs")] == [None, parent.id]
    (parent.path / "curriculum.json").unlink()
    with pytest.raises(UserError, match=r"a curriculum whose curriculum\.json is gone cannot go on as a whole"):
        resume.main([f"run={parent.path}"])


def test_a_curriculum_that_cannot_go_on_stands_in_no_others_way(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given = ["recipe=mtv", *words(tmp_path, cache, *SHORT)]
    monkeypatch.setattr(curriculum, "train_stages", lambda *arguments, **options: 0)
    for number, damage in enumerate(("[]", '{"paper"', '{"words": [1], "stages": [], "paper": "mtv", "init": null}')):
        assert curriculum.main(given) == 0
        newest = list_runs(tmp_path / "runs")[-1]
        assert len(list_runs(tmp_path / "runs")) == number + 1
        (newest.path / "curriculum.json").write_text(damage)
    assert curriculum.main(given) == 0
    plan = list_runs(tmp_path / "runs")[-1].path / "curriculum.json"
    plan.write_text(plan.read_text().replace("mtv_stage5", "mtv_stage6"))
    capsys.readouterr()
    assert curriculum.main(given) == 0
    printed = capsys.readouterr().out
    assert printed.count("curriculum.json cannot be read") == 3
    assert "has the stages mtv_stage1, mtv_stage2, mtv_stage3, mtv_stage4, mtv_stage6, the paper has" in printed
    for new in (["new=true"], ["seed=1"]):
        with pytest.raises(UserError, match="allow_change=true: is for a curriculum that goes on"):
            curriculum.main([*given, *new, "allow_change=true"])
    assert len(list_runs(tmp_path / "runs")) == 5
    assert curriculum.main([*given, "allow_change=true"]) == 0
    assert len(list_runs(tmp_path / "runs")) == 5


def test_stages_of_a_curriculum_on_two_ranks_follow_each_other(tmp_path: Path, cache: Path):
    two_ranks = [*SHORT, "train.devices=2", "strategy=ddp"]
    command = Command(tmp_path, "curriculum", "recipe=mtv", *words(tmp_path, cache, *two_ranks))
    stages: list[Run] = []
    while len(stages) < 3 and command.process.poll() is None:
        time.sleep(0.05)
        stages = [run for run in list_runs(tmp_path / "runs") if run.parent]
    if command.process.poll() is None:
        os.killpg(command.process.pid, signal.SIGKILL)  # two of five are enough
    command.end()
    assert len(stages) == 3, command.printed()
    assert [stage.record().status for stage in stages[:2]] == ["finished", "finished"]
    checkpoint, _ = newest_valid(stages[1].checkpoints_dir)
    assert checkpoint is not None and checkpoint.state.lineage == ((stages[0].id, 1), (stages[1].id, 1))


def test_what_lightning_leaves_of_its_ranks_goes_and_what_a_launcher_set_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in session.LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    before = {name: os.environ.get(name) for name in session.LAUNCH_VARIABLES}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    for name in session.LAUNCH_VARIABLES:
        os.environ[name] = "0"
    session.leave_ranks(before)
    assert {name: os.environ.get(name) for name in session.LAUNCH_VARIABLES} == before
    assert not dist.is_initialized()


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_run_whose_first_weights_are_gone_or_damaged_says_so(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, is_gone: bool
):
    source = started(tmp_path, cache).checkpoints_dir / "step-00000002"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, "mtv_stage2")
        train(load_config(words(tmp_path, cache, "recipe=mtv_stage2", "init=last", *SHORT)))
    if is_gone:
        shutil.rmtree(source)
    else:
        (source / "weights.safetensors").write_bytes(b"")
    reason = "it is no longer there" if is_gone else r"weights\.safetensors has 0 bytes"
    with pytest.raises(UserError, match=rf"init={source}: run=.*mtv_stage2.* starts from this checkpoint .*{reason}"):
        resumed(tmp_path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.steps=1", r"train\.steps=1: run=.* has done 2 steps, which a resume does not take back"),
        ("run_name=other", "run_name=other: run=.* was named when it began"),
        ("tracking.experiment=other", r"tracking\.experiment=other: run=.* is tracked in avlit"),
        ("train.steps=2", "has finished its 2 steps"),
    ],
)
def test_what_a_resume_cannot_change_is_refused_before_the_run_is_touched(
    tmp_path: Path, cache: Path, word: str, message: str
):
    run = started(tmp_path, cache)
    (run.checkpoints_dir / "step-00000003.tmp-1").mkdir()  # what another process may be writing
    before = {path: path.read_bytes() for path in run.path.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        resumed(tmp_path, word, "allow_change=true")
    assert {path: path.read_bytes() for path in run.path.rglob("*.*") if path.is_file()} == before
    assert (run.checkpoints_dir / "step-00000003.tmp-1").is_dir()
