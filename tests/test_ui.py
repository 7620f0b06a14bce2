"""`just ui`: what the page says of each run; that it serves and sends is in test_tracking."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.runs import Run, create_run, list_runs
from avlit.tracking import Tracker
from avlit.tracking.story import stories, view_state
from tests.kill_fuzz import keep_in_spool


@pytest.fixture(autouse=True)
def _nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "_start_sender", Tracker._start_sender)  # put back after the test
    keep_in_spool()


def track(run: Run, steps: range, *, is_resumed: bool = False, name: str | None = None) -> None:
    tracker = Tracker(run, uri=f"sqlite:///{run.path.parent}/m.db", is_resumed=is_resumed, run_name=name)
    for step in steps:
        tracker.log_metrics({"val/loss/video": 1.0}, step)
    tracker.close()


def test_a_curriculum_its_stages_and_their_resumes_read_as_one_story(tmp_path: Path) -> None:
    parent = create_run(tmp_path, "mtv_curriculum")
    first = create_run(tmp_path, "mtv_stage1", parent=parent.id)
    track(first, range(0, 50, 10), name="warm-up")
    track(first, range(40, 90, 10), is_resumed=True)
    checkpoint = str(first.checkpoints_dir / "step-00000080")
    second = create_run(tmp_path, "mtv_stage2", parent=parent.id, init_run=first.id, init_checkpoint=checkpoint)
    track(second, range(0, 20, 10))
    track(second, range(0, 20, 10), is_resumed=True)  # it was killed before it had saved
    released = create_run(tmp_path, "mtv_stage1", init_checkpoint="/weights/of-others")
    assert stories(list_runs(tmp_path)) == {
        parent.id: "2 runs: mtv_stage1 → mtv_stage2",
        first.id: "1 of 2; resumed before step 40",
        second.id: "2 of 2; from warm-up, step 80; begun again",
        released.id: "from /weights/of-others",
    }


def test_columns_are_those_that_some_run_has_a_value_for() -> None:
    data = SimpleNamespace(params={"seed": "0", "about": "x"}, metrics={"val/loss/audio": 1.0}, tags={})
    view = view_state([SimpleNamespace(data=data)])
    assert view["selectedColumns"] == ["tags.`story`", "params.`seed`", "metrics.`val/loss/audio`"]
    assert view["columnOrder"] == view["selectedColumns"]  # a story says more than a number: it comes first


def test_a_server_that_is_away_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert avlit(["ui", "tracking.uri=http://127.0.0.1:9", f"runs_dir={tmp_path}"]) == USER_MISTAKE
    assert "http://127.0.0.1:9: does not answer" in capsys.readouterr().err
