"""`just reproduce`: what is missing is trained, once, and goes on where it was stopped; then all is measured."""

import json
from pathlib import Path

import pytest

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.commands import session
from avlit.commands.session import Outcome
from avlit.config import Config, from_yaml
from avlit.metrics.word_judge import Listener, WordJudge
from avlit.runs import Run, list_runs
from avlit.tracking import Tracker
from data.corpus.voice import VOCABULARY
from tests import kill_fuzz

WORDS = (
    "train.steps=1", "model.num_layers=1", "model.num_single_layers=1", "model.num_heads=1", "data.num_frames=5",
    "data.height=32", "data.width=32", "data.num_clips=16", "data.batch_size=4", "validation.clips=2",
    "sample.steps=1", "sample.count=0", "sample.sync_clips=0", "train.threads=1", "train.accelerator=cpu", "clips=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _quick_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent, and the judge has learnt nothing: both take longer than the runs."""
    monkeypatch.setattr(Tracker, "_start_sender", Tracker._start_sender)  # put back after the test
    kill_fuzz.keep_in_spool()
    judge = WordJudge(Listener(1 + len(VOCABULARY)).eval(), tuple(VOCABULARY))
    monkeypatch.setattr("avlit.commands.corpus_judge.kept_word_judge", lambda kept_in: judge)


def words(folder: Path, cache: Path, *more: str) -> list[str]:
    place = [f"runs_dir={folder}/runs", "tracking.uri=offline", f"data.cache_dir={cache}"]
    return ["reproduce", *place, *WORDS, *more]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if a Ctrl-C came once the run of this name has its folder."""

    def run_session(config: Config, run: Run, *, is_resumed: bool, allow_change: bool = False) -> Outcome:
        if config.run_name == name:
            raise KeyboardInterrupt
        return session.run_session(config, run, is_resumed=is_resumed, allow_change=allow_change)

    for module in ("train", "resume"):
        monkeypatch.setattr(f"avlit.commands.{module}.run_session", run_session)


def names(runs: list[Run]) -> list[str | None]:
    return [from_yaml(run.read_config()).run_name for run in runs]


def test_a_stopped_table_goes_on_also_side_by_side_measures_every_row_and_lends_its_runs_to_another(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    given = words(tmp_path, cache, "quick=true", "seeds=1")
    with monkeypatch.context() as patched:
        interrupt_at(patched, "0, seed 1")
        assert avlit([*given, "table=jova_lambda"]) == 130
        parent = list_runs(tmp_path / "runs")[0]
        assert parent.record().status == "stopped"
        interrupt_at(patched, "5, seed 1")
        assert avlit(["resume", "run=last", f"runs_dir={tmp_path}/runs"]) == 130  # of its runs, and means the whole
    before = list_runs(tmp_path / "runs")
    assert len(before) == 5 and not (parent.path / "table.md").exists()
    provenance = before[1].provenance_path
    as_trained = provenance.read_text()
    provenance.write_text(as_trained.replace("avlit/module.py", "avlit/modules.py"))
    capsys.readouterr()
    assert avlit([*given, "table=jova_lambda", "jobs=2"]) == USER_MISTAKE
    assert "was trained with other code or libraries than are here now; new=true" in capsys.readouterr().err
    provenance.write_text(as_trained)
    assert avlit([*given, "table=jova_lambda", "jobs=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done after") == 1 and "Ready after" not in printed
    assert "Ready after" in (parent.path / "logs" / "04.txt").read_text()
    assert "| paper: LSE-C ↑" in printed
    parent, *runs = list_runs(tmp_path / "runs")
    assert [parent, *runs] == before
    assert {run.record().status for run in before} == {"finished"}
    stages = ["jova_stage1_video", "jova_stage1_audio"]
    assert names(runs) == [*(f"{stage}, seed 1" for stage in stages), "0, seed 1", "5, seed 1"]
    assert [run.parent for run in runs] == [parent.id] * 4
    assert [run.record().init_run for run in runs] == [None, runs[0].id, runs[1].id, runs[1].id]
    configs = [from_yaml(run.read_config()) for run in runs]
    assert [getattr(config, "mouth_weight") for config in configs] == [None, None, 0, 5]  # noqa: B009
    assert {config.seed for config in configs} == {1}

    values = json.loads((parent.path / "table.json").read_text())
    for row, run in zip(("0", "5"), runs[2:], strict=True):
        measured = values["seeds"][row]["1"]
        assert set(measured) >= {"lip_sync", "words", "words_shuffled", "picture_psnr", "val/loss/mouth"}
        logged = json.loads(run.metrics_path.read_text())
        assert {name: measured[name] for name in logged} == logged
        assert 0 < measured["picture_psnr"] < 60
    text = (parent.path / "table.md").read_text()
    assert "seed 1; of 3 held-out clips" in text and "(one seed)" in text
    sent = (parent.path / "spool" / "artifacts.jsonl").read_text()
    assert all(f"table.{kind}" in sent for kind in ("md", "json", "png"))
    assert '"row 5/lip_sync"' in (parent.path / "spool" / "metrics.jsonl").read_text()

    capsys.readouterr()
    assert avlit([*given, "table=jova_lambda"]) == 0  # all is there: it is printed again
    printed = capsys.readouterr().out
    assert "lip_sync" in printed and "training" not in printed and "Measures" not in printed
    assert len(list_runs(tmp_path / "runs")) == 5

    fusion = ["table=jova_fusion", "jova_stage2.sample.steps=2"]  # another row than any of the first, but equal stages
    with monkeypatch.context() as patched:
        interrupt_at(patched, "cross with linear, seed 1")
        assert avlit([*given, *fusion]) == 130
    assert capsys.readouterr().out.count("which another table has trained") == 2
    new = list_runs(tmp_path / "runs")[5:]
    assert [run.recipe for run in new] == ["jova_fusion_table", "jova_stage2"]
    assert new[1].record().init_run == runs[1].id


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "table=… is missing; there are jova_fusion, jova_lambda, jova_rope"),
        (["table=jova"], "table=jova: no such table"),
        (["table=jova_lambda", "quick=yes"], "quick=yes: must be true or false"),
        (["table=jova_lambda", "seeds=0,0"], "seeds=0,0: must be different whole numbers"),
        (["table=jova_lambda", "jobs=0"], "jobs=0: must be a whole number of at least 1"),
        (["table=jova_lambda", "mouth_weight=3"], "mouth_weight=3: is what the rows of table=jova_lambda differ in"),
        (["table=jova_lambda", "jova_stage2.model.num_layer=1"], "model.num_layer: no such key"),
        (["table=jova_lambda", "allow_change=true"], "allow_change=true: is for a table that goes on"),
    ],
)
def test_a_wrong_word_is_one_message_and_leaves_no_run(tmp_path: Path, capsys, given: list[str], message: str):
    assert avlit(["reproduce", f"runs_dir={tmp_path}/runs", *given]) == USER_MISTAKE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_table_whose_plan_is_damaged_stands_in_no_others_way(tmp_path: Path, cache: Path, monkeypatch, capsys):
    monkeypatch.setattr("avlit.commands.reproduce.train_table", lambda *arguments, **options: 0)
    given = words(tmp_path, cache, "quick=true", "table=jova_lambda")
    assert avlit(given) == 0
    (first,) = list_runs(tmp_path / "runs")
    assert avlit(given) == 0
    assert f"Goes on with run {first.id}" in capsys.readouterr().out
    (first.path / "reproduce.json").write_text("{}")
    assert avlit(given) == 0
    assert "reproduce.json cannot be read" in capsys.readouterr().out
    assert len(list_runs(tmp_path / "runs")) == 2
    assert avlit(["resume", f"run={first.id}", f"runs_dir={tmp_path}/runs"]) == USER_MISTAKE
    assert avlit([*given, "new=true"]) == 0
    assert len(list_runs(tmp_path / "runs")) == 3
