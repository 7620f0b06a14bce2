"""Run folders: created whole, found by what a user writes, held by one process."""

import json
from pathlib import Path

import pytest

from avlit.__main__ import main
from avlit.errors import UserError
from avlit.runs import RunBusyError, RunNotFoundError, create_run, find_run, hold, list_runs


def test_last_is_the_newest_run(tmp_path: Path) -> None:
    runs = [create_run(tmp_path, recipe) for recipe in ("mtv_stage3", "jova_stage2", "mtv_stage1")]

    assert find_run(tmp_path, "last").id == runs[-1].id
    assert [run.id for run in list_runs(tmp_path)] == [run.id for run in runs]


def test_a_run_is_found_by_id_by_its_beginning_by_its_end_and_by_folder(tmp_path: Path) -> None:
    first, second = create_run(tmp_path, "mtv_stage1"), create_run(tmp_path, "zeta")

    for word in (first.id, first.id[:-2], first.id[-4:], str(first.path), first.path):
        assert find_run(tmp_path, word) == first
    with pytest.raises(RunNotFoundError, match="2 runs begin so") as caught:
        find_run(tmp_path, first.id[:8])
    assert first.id in str(caught.value) and second.id in str(caught.value)


def test_an_unknown_run_lists_the_nearest(tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage3")

    with pytest.raises(RunNotFoundError, match=run.id):
        find_run(tmp_path, run.id[:-9] + "2-ffff0")


@pytest.mark.parametrize("word", ["last", "20250101"])
def test_without_runs_the_error_says_so(tmp_path: Path, word: str) -> None:
    with pytest.raises(RunNotFoundError, match="there are no runs in"):
        find_run(tmp_path / "runs", word)


def test_a_damaged_record_is_left_out_of_the_list_and_named_when_asked_for(tmp_path: Path) -> None:
    good, bad = create_run(tmp_path, "mtv_stage1"), create_run(tmp_path, "mtv_stage2")
    (bad.path / "run.json").write_text('{"id": ')

    assert find_run(tmp_path, "last") == good
    with pytest.raises(RunNotFoundError, match=r"run\.json cannot be read"):
        find_run(tmp_path, bad.path)
    with pytest.raises(RunNotFoundError, match=r"holds no run\.json"):
        find_run(tmp_path, tmp_path)


def test_updates_replace_the_record_and_leave_no_temporary_file(tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage2", parent="abc")
    run.update(status="finished", init_run="earlier")

    record = json.loads((run.path / "run.json").read_text())
    assert (record["status"], record["init_run"], record["parent"]) == ("finished", "earlier", "abc")
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "run.json",
        "samples",
        "spool",
    ]
    with pytest.raises(ValueError, match="status='done': must be one of running"):
        run.update(status="done")


def test_a_recipe_name_cannot_leave_the_runs_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe='\.\./x'"):
        create_run(tmp_path, "../x")


def test_a_held_run_is_refused_to_a_second_holder(tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")

    with hold(run), pytest.raises(RunBusyError, match="is training it"), hold(run):
        pass
    with hold(run):
        pass


@pytest.mark.parametrize("content", [None, b"\xff\xfe", "folder"], ids=["missing", "not text", "a folder"])
@pytest.mark.parametrize("command", ["resume", "sample"])
def test_a_run_without_a_readable_config_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | str | None, command: str
) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    run.config_path.unlink()
    if isinstance(content, bytes):
        run.config_path.write_bytes(content)
    elif content:
        run.config_path.mkdir()
    assert main([command, "run=last", f"runs_dir={tmp_path}"]) == 2
    assert f"run={run.id}: {run.config_path} cannot be read (" in capsys.readouterr().err


def test_a_curriculum_without_a_readable_config_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tmp_path, "mtv_curriculum")
    stages = [f"mtv_stage{number}" for number in range(1, 6)]
    plan = {"paper": "mtv", "stages": stages, "words": [f"runs_dir={tmp_path}"], "init": None}
    (run.path / "curriculum.json").write_text(json.dumps(plan))
    run.config_path.unlink()
    for words in (["resume", "run=last"], ["curriculum", "recipe=mtv"]):
        assert main([*words, f"runs_dir={tmp_path}"]) == 2
        assert f"run={run.id}: {run.config_path} cannot be read (No such file" in capsys.readouterr().err


@pytest.mark.parametrize("runs_dir", ["/proc/nothing", "file", "file/runs"])
def test_runs_that_cannot_be_made_name_their_folder(tmp_path: Path, runs_dir: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^runs_dir=.*{runs_dir}: no run can be made there \("):
        create_run(tmp_path / runs_dir, "mtv_stage1")


def test_the_weights_a_run_began_with_are_found_beside_it_after_a_move_and_elsewhere_where_they_were(
    tmp_path: Path,
) -> None:
    source = create_run(tmp_path / "runs", "mtv_stage1")
    checkpoint, outside = source.checkpoints_dir / "step-00000002", tmp_path / "released" / "step-00000002"
    checkpoint.mkdir()
    runs = [
        create_run(tmp_path / "runs", "mtv_stage2", init_run=source.id, init_checkpoint=str(path))
        for path in (checkpoint, outside)
    ]
    assert [run.init_checkpoint for run in (source, *runs)] == [None, checkpoint, outside]

    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = [find_run(tmp_path / "moved", run.id) for run in runs]
    assert [run.init_checkpoint for run in moved] == [
        tmp_path / "moved" / source.id / "checkpoints" / "step-00000002",
        outside,
    ]
