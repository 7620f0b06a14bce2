"""`just evaluate`: held-out clips are sampled and measured once, and go on where they were; wrong words say why."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.checkpoints import CheckpointState, save_checkpoint
from avlit.commands import run_evaluation
from avlit.commands.assembly import build_module
from avlit.comparison.evaluations import read_evaluations
from avlit.config import load_config, to_yaml
from avlit.evaluation.published import published_numbers
from avlit.evaluation.readings import SAMPLED, Readings, meter_ids
from avlit.evaluation.report import FOLDER
from avlit.media import write_mp4
from avlit.metrics import mouths
from avlit.metrics.clip import Clip
from avlit.metrics.metric import Meter, Tools, Weights
from avlit.runs import Run, create_run
from avlit.tracking import Tracker
from avlit.tracking.history import read_end, read_history
from tests import kill_fuzz

SMALL = (
    "recipe=jova_stage2", "model.num_layers=1", "model.num_single_layers=1", "model.num_heads=1", "data.num_frames=5",
    "data.height=32", "data.width=32", "data.num_clips=16", "sample.steps=2", "train.threads=1",
    "train.accelerator=cpu",
)  # fmt: skip
METRICS = "metrics=lip_sync,lip_sync_shuffled,motion_ratio"


@pytest.fixture(autouse=True)
def _nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "_start_sender", Tracker._start_sender)  # put back after the test
    kill_fuzz.keep_in_spool()


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a checkpoint that nobody trained."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = load_config([*SMALL, f"runs_dir={folder}/runs", f"data.cache_dir={folder}/cache"])
    run = create_run(folder / "runs", config.recipe)
    run.write_config(to_yaml(config))
    state = CheckpointState(step=3, seed=0, recipe=config.recipe, run=run.id)
    weights = {name: tensor.detach() for name, tensor in build_module(config).saved_weights().items()}
    save_checkpoint(run.checkpoints_dir, weights=weights, state=state)
    run.update(status="finished")
    return run


@pytest.fixture
def run(untracked: Run) -> Run:
    """The run, tracked."""
    store = untracked.path.parents[1] / "mlflow.db"
    tracker = Tracker(untracked, uri=f"sqlite:///{store}", tags={"git_revision": "trained with"})
    tracker.log_metrics({"val/loss/video": 1.0}, 3)
    tracker.finish("finished")
    return untracked


def test_clips_are_sampled_once_measured_and_logged_to_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words, ended_ms = ["evaluate", f"run={run.path}", METRICS], read_end(run)
    assert ended_ms is not None
    assert avlit([*words, "clips=2"]) == 0
    shown = capsys.readouterr().out
    assert "lip_sync ↑" in shown and "beside LSE-C 6.64 (JoVA, Table 1)" in shown
    assert "2 held-out clips" in shown and "at step 3" in shown
    (folder,) = (run.path / FOLDER).iterdir()
    rows = {row["metric"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    readings = [Readings(folder).read(number, SAMPLED)["lip_sync-v1"]["lip_sync"] for number in range(2)]
    assert rows["lip_sync"]["value"] == pytest.approx(np.mean(readings))  # type: ignore[arg-type]
    assert rows["lip_sync"]["count"] == 2
    assert rows["lip_sync"]["true"] > rows["lip_sync"]["value"]
    history = read_history(run)
    assert history is not None
    assert history.curves["eval/lip_sync"].at(3) == (3, rows["lip_sync"]["value"])
    bounds = [history.curves[f"eval/lip_sync/{end}"].at(3) for end in ("low", "high")]
    assert bounds == [(3, rows["lip_sync"]["low"]), (3, rows["lip_sync"]["high"])]
    known = read_evaluations(run)["eval/lip_sync"]
    assert (known.better, known.made_with["clips"], known.made_with["sample.steps"]) == ("higher", "2", "2")
    assert history.curves["val/loss/video"].at(3) == (3, 1.0)
    assert history.tags["git_revision"] == "trained with"
    assert read_end(run) == ended_ms, "a run's training has ended when it did"

    sampled: list[int] = []
    count_sampling(monkeypatch, sampled)
    first = (folder / "00000.json").read_bytes()
    assert avlit([*words, "clips=2"]) == 0
    assert not sampled, "a finished evaluation is printed again"
    stamp = (folder / "00001.json").read_bytes()
    (folder / "00001.json").unlink()  # as if it had been stopped there
    assert avlit([*words, "clips=2"]) == 0
    assert sampled == [2], "clips that are sampled together are sampled together again"
    assert (folder / "00001.json").read_bytes() == stamp
    assert (folder / "00000.json").read_bytes() == first
    assert avlit([*words, "clips=2", "sample.steps=1"]) == 0
    assert sampled == [2, 2] and len(list((run.path / FOLDER).iterdir())) == 2, "other settings start anew"


def count_sampling(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> None:
    """Notes how many clips are sampled at once."""
    original = run_evaluation.sample_clips

    def sample(module, given, **settings):
        counts.append(len(given))
        return original(module, given, **settings)

    monkeypatch.setattr(run_evaluation, "sample_clips", sample)


def test_a_folder_of_clips_is_measured_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(0)
    for place, speed in (("made", 2), ("real", 1)):
        (tmp_path / place).mkdir()
        for name in ("a", "b"):
            picture = np.kron(rng.integers(0, 255, (8, 8)), np.ones((8, 8)))
            frames = np.stack([np.roll(picture, speed * n, axis=1) for n in range(9)])[..., None].repeat(3, -1)
            write_mp4(tmp_path / place / f"{name}.mp4", frames.astype(np.uint8), fps=12.0,
                      waveform=np.zeros(12000, np.float32), rate_hz=16000)  # fmt: skip
    words = ["evaluate", f"clips_dir={tmp_path}/made", f"runs_dir={tmp_path}/runs", "metrics=motion_ratio"]
    assert avlit([*words, f"real_dir={tmp_path}/real", "paper=mmcontrol"]) == 0
    (results,) = (tmp_path / "runs" / FOLDER).glob("*/results.json")
    (row,) = json.loads(results.read_text())["rows"]
    assert row["metric"] == "motion_ratio" and row["count"] == 2
    assert 1.2 < row["value"] < 3
    capsys.readouterr()
    assert avlit(words) == 0
    assert "Nothing to measure in these clips: motion_ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either run=RUN"),
        (["run=a", "clips_dir=b"], "give either run=RUN"),
        (["run={run}", "metrics=lip_sink"], "did you mean lip_sync"),
        (["run={run}", "clips=0"], "clips=0: must be a whole number"),
        (["run={run}", "first_frame=yes"], "first_frame=yes: must be true or false"),
        (["run={run}", "optimizer.lr=1"], "optimizer.lr=1: has no effect on an evaluation"),
        (["run={run}", "metric=lip_sync"], "metric=lip_sync: no such word"),
        (["clips_dir=nowhere"], "clips_dir=nowhere: there is no such folder"),
        (["clips_dir=nowhere", "sample.steps=3"], "sample.steps=3: has no effect on clips_dir=nowhere"),
        (["run={run}", "weights.dinno=x"], "weights.dinno=x: no metric reads it"),
    ],
)
def test_a_wrong_word_says_what_is_right(
    untracked: Run, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert avlit(["evaluate", *(word.format(run=untracked.path) for word in words)]) == USER_MISTAKE
    assert message in capsys.readouterr().err


def test_readings_are_made_again_for_another_version_or_other_weights(tmp_path: Path):
    net = tmp_path / "net.pt"
    net.write_bytes(b"first")
    tools = Tools(weights={"net": net})
    meter = Meter("net", mouths.METER.open, ("frames",), (Weights("net", "a network"),))
    (before,) = meter_ids([meter], tools)
    net.write_bytes(b"second, and longer")
    (after,) = meter_ids([meter], tools)
    assert before != after
    readings = Readings.open(tmp_path, {"seed": 1})
    clip = Clip("a", 12.0, frames=np.zeros((2, 4, 4, 3), np.uint8))
    counted: list[str] = []

    def measure(clip: Clip) -> dict[str, float]:
        counted.append(clip.key)
        return {"Net": float(len(counted))}

    for name in (before, before, after):
        readings.measure(0, {SAMPLED: clip}, meters={name: meter}, measures={name: measure})
    assert len(counted) == 2
    assert readings.read(0, SAMPLED) == {before: {"Net": 1.0}, after: {"Net": 2.0}}


def test_every_papers_numbers_can_be_read_and_name_their_table():
    papers = {paper: published_numbers(paper) for paper in ("mtv", "unitalking", "mmcontrol", "jova")}
    assert all(papers.values())
    assert {each.metric for each in papers["mtv"]} >= {"FVD", "Sync-C", "Sync-D"}
    assert all("Table" in each.source for numbers in papers.values() for each in numbers)
    assert torch.tensor([each.value for each in papers["jova"]]).isfinite().all()
