"""`just compare`: what differs, what came out and how sure that is, on a page that opens without a server."""

import json
import re
import shutil
import time
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import yaml

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.comparison.comparison import Comparison, compare
from avlit.comparison.curves import BUDGET, described, points_within, thinned
from avlit.comparison.lineage import Stage
from avlit.comparison.measures import better_of
from avlit.comparison.page import dots, write_page, write_single_file
from avlit.comparison.selection import select
from avlit.comparison.tables import conclusions, markdown
from avlit.comparison.yardstick import Yardstick
from avlit.errors import UserError
from avlit.evaluation.report import FOLDER as EVALUATIONS
from avlit.evaluation.report import RESULTS
from avlit.mp4 import write_mp4
from avlit.provenance import Provenance
from avlit.reference import Reference, ReferenceCurve
from avlit.runs import Run, create_run, find_run
from avlit.sound import write_sound
from avlit.tracking import OFFLINE, Tracker
from avlit.tracking.history import Curve, read_history, read_session
from tests.browser import Browser, find_browser
from tests.kill_fuzz import keep_in_spool

STEPS = 400
LOSS = {0.0: 0.5, 5.0: 0.4}
"""mouth_weight -> the loss that a run ends with, but for its seed."""


@pytest.fixture(autouse=True)
def _nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracker, "_start_sender", Tracker._start_sender)  # put back after the test
    keep_in_spool()


def make_run(
    folder: Path,
    *,
    recipe: str = "jova_stage2",
    seed: int = 0,
    weight: float = 0.0,
    name: str | None = None,
    steps: int = STEPS,
    status: str = "finished",
    code: Mapping[str, str] | None = None,
    data: str = "d1",
    init: Run | None = None,
    parent: str | None = None,
    clips: Sequence[str] = (),
    sync: float | None = None,
    store: str | None = None,
) -> Run:
    """A run of 400 steps as its folder is after `steps` of them."""
    values = {"recipe": recipe, "seed": seed, "size": "tiny", "train": {"steps": STEPS}, "mouth_weight": weight}
    checkpoint = init and str(init.checkpoints_dir / f"step-{STEPS:08d}")
    run = create_run(
        folder, recipe, config=yaml.safe_dump(values), parent=parent, init_run=init and init.id,
        init_checkpoint=checkpoint,
    )  # fmt: skip
    made = Provenance("", "abc", dict(code or {"avlit/module.py": "1"}), {"torch": "2"}, {"fingerprint": data})
    made.write(run.provenance_path)
    tracker = Tracker(run, uri=store or f"sqlite:///{folder}/mlflow.db", run_name=name, tags={"size": "tiny"})
    for step in range(0, steps + 1, 20):
        loss = LOSS.get(weight, 0.5) + 0.01 * seed + (STEPS - step) / STEPS
        if step:
            tracker.log_metrics(
                {"train/loss/video": loss + 0.1 * (-1) ** (step // 20), "train/loss/video/noise/0": loss}, step
            )
        if step % 100 == 0:
            tracker.log_metrics({"val/loss/video": loss, "val/loss/video/noise/0": loss / 2}, step)
    if sync is not None:
        tracker.log_metrics({"val/lip_sync": sync}, steps)
    samples = run.samples_dir / f"step-{steps:08d}"
    for number, key in enumerate(clips):
        samples.mkdir(exist_ok=True)
        sound = np.sin(np.arange(16000) * 0.2 * (1 + seed)).astype(np.float32) * 0.5
        if recipe == "sound":
            write_sound(samples / f"{number:02d}-{key}.wav", sound, rate_hz=16000)
        else:
            frames = np.full((12, 32, 32, 3), 40 * seed + 80, np.uint8)
            write_mp4(samples / f"{number:02d}-{key}.mp4", frames, fps=12, waveform=sound, rate_hz=16000)
    tracker.close()
    run.update(status=status)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two settings with two seeds each, the second stage of two first ones."""
    folder = tmp_path_factory.mktemp("trained") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "_start_sender", Tracker._start_sender)
        keep_in_spool()
        first = [make_run(folder, recipe="jova_stage1_audio", seed=seed, name=f"first {seed}") for seed in (0, 1)]
        return [
            make_run(
                folder, seed=seed, weight=weight, name=f"<b>{weight:g}</b>, seed {seed}", init=first[seed],
                clips=("face-1", "face-2"), sync=0.5 + weight / 20 + 0.01 * seed,
            )
            for weight in (0.0, 5.0) for seed in (0, 1)
        ]  # fmt: skip


def compared(runs: Sequence[Run], folder: Path) -> Comparison:
    return compare(runs, media=folder / "media", num_clips=4)


@pytest.fixture(scope="module")
def comparison(trained: list[Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("page")
    made = compared(trained, folder)
    write_page(made, folder / "comparison.html")
    return made, folder


# What is read


def test_a_resumed_run_has_each_step_once_and_a_changed_one_its_newer_points(tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")

    def session(points: Mapping[int, float], *, is_resumed: bool = True, redone_from: int | None = None) -> None:
        tracker = Tracker(run, uri=f"sqlite:///{tmp_path}/m.db", is_resumed=is_resumed, redone_from=redone_from)
        for step, value in points.items():
            tracker.log_metrics({"a": value}, step)
        tracker.close()

    session({10: 1.0, 20: 2.0, 30: 3.0}, is_resumed=False)
    with open(run.spool_dir / "metrics.jsonl", "a") as spool:
        spool.write('{"t":1,"s":40,"m":{"a"')  # killed in the middle of a line
    session({30: -1.0, 40: 4.0})
    history = read_history(run)
    assert history is not None
    assert dict(zip(history.curves["a"].steps.tolist(), history.curves["a"].values.tolist(), strict=True)) == {
        10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0,
    }  # fmt: skip
    assert (history.resumed_at, history.num_unreadable) == ((30,), 1)
    session({30: 5.0, 40: 6.0}, redone_from=20)
    session({40: 7.0}, is_resumed=False)  # measured anew by another command
    history = read_history(run)
    assert history is not None
    assert history.curves["a"].values.tolist() == [1.0, 2.0, 5.0, 7.0]
    assert history.resumed_at[:2] == (30, 30)


def test_words_mean_the_runs_that_a_user_would_think(tmp_path: Path) -> None:
    parent = create_run(tmp_path, "jova_lambda_table", config="a: 1\n")
    first = make_run(tmp_path, recipe="jova_stage1", parent=parent.id)
    rows = [make_run(tmp_path, weight=w, init=first, parent=parent.id, name=f"row {w:g}") for w in (0.0, 5.0)]
    alone = make_run(tmp_path, recipe="mtv_stage1", name="alone")

    def ids(*selectors: tuple[str, str]) -> list[str]:
        return [run.id for run in select(tmp_path, selectors, store=f"sqlite:///{tmp_path}/none.db")]

    assert ids(("run", parent.id)) == [run.id for run in rows]
    assert ids(("run", "last:2")) == [rows[1].id, alone.id]
    assert ids(("run", "row 5"), ("run", alone.id[-4:]), ("run", "alone")) == [rows[1].id, alone.id]
    assert set(ids(("tag", "size=tiny"))) == set(ids(("experiment", "avlit"))) == {first.id, alone.id, *ids(
        ("run", parent.id))}  # fmt: skip


# What differs


def test_page_says_first_what_differs_in_config_code_and_data(tmp_path: Path) -> None:
    one = make_run(tmp_path / "runs", weight=0.0, code={"avlit/a.py": "11", "avlit/b.py": "22"})
    other = make_run(tmp_path / "runs", weight=5.0, code={"avlit/a.py": "33", "avlit/b.py": "22"}, data="d2")
    made = compared([one, other], tmp_path)
    assert [(row.name, row.values) for row in made.differences.config] == [("mouth_weight", ("0.0", "5.0"))]
    assert [(row.name, row.values) for row in made.differences.code] == [("avlit/a.py", ("11", "33"))]
    assert [row.name for row in made.differences.data] == ["contents"]
    assert made.differences.libraries == ()
    assert "mouth_weight: 0.0 in A, 5.0 in B." in made.changed
    write_page(made, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    places = [page.index(f'<section id="{name}"') for name in ("differs", "metrics", "curves", "samples", "lineage")]
    assert places == sorted(places)
    assert page.index("avlit/a.py") < places[1] and "avlit/b.py" not in page
    assert all(row.best is None for row in made.rows)  # other data, other held-out clips
    assert any("The data differs" in line for line in made.cautions)


def test_runs_of_one_setting_are_grouped_and_those_of_other_code_or_first_stages_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    first = [make_run(folder, recipe="jova_stage1", weight=w) for w in (0.0, 5.0)]
    runs = [
        make_run(folder, seed=0),
        make_run(folder, seed=1),
        make_run(folder, seed=1),  # the same again
        make_run(folder, seed=2, code={"avlit/module.py": "2"}),
        make_run(folder, seed=3, init=first[0]),
        make_run(folder, seed=4, init=first[1]),
    ]
    assert [each.letters for each in compared(runs, tmp_path).variants] == ["A B", "C", "D", "E", "F"]


# What came out


def test_metrics_have_their_mean_and_spread_over_seeds_and_a_verdict(comparison: tuple[Comparison, Path]) -> None:
    made, _ = comparison
    assert [each.seeds for each in made.variants] == [(0, 1), (0, 1)]
    assert [each.about for each in made.variants] == ["mouth_weight=0.0", "mouth_weight=5.0"]
    row = next(row for row in made.rows if row.name == "val/loss/video")
    for cell, losses in zip(row.cells, ([0.5, 0.51], [0.4, 0.41]), strict=True):
        assert cell.mean == pytest.approx(mean(losses)) and cell.spread == pytest.approx(stdev(losses))
    assert (row.best, row.steps) == (1, (STEPS,))
    sync = next(row for row in made.rows if row.name == "val/lip_sync")
    assert (sync.better, sync.best) == ("higher", 1)
    (loss_text,) = [text for text, is_clear in made.verdicts if is_clear and text.startswith("val/loss/video")]
    assert loss_text == (
        "val/loss/video: mouth_weight=5.0 is best (0.4050 ± 0.0071); "
        "clearly better than mouth_weight=0.0 (0.5050 ± 0.0071, with 2 of 2 seeds)"
    )
    assert "| val/loss/video ↓ " in markdown(made) and "**0.4050 ± 0.0071**" in markdown(made)
    assert "val/loss/video/noise/0" not in {row.name for row in made.main_rows}


def test_directions_come_from_the_papers_tables_where_no_evaluation_says_them() -> None:
    names = ("val/loss/x", "val/lip_sync", "eval/lip_sync", "eval/digits/lip_sync", "eval/new", "a")
    assert [better_of(name) for name in names] == ["lower", *["higher"] * 3, "none", "none"]


def evaluate(run: Run, value: float, low: float, high: float, *, clips: int = 24) -> None:
    """As `just evaluate` leaves a run: a metric that no table has, with its interval."""
    tracker = Tracker(run, uri=f"sqlite:///{run.path.parent}/mlflow.db")
    tracker.log_metrics({"eval/new": value, "eval/new/clips": clips, "eval/new/low": low, "eval/new/high": high}, STEPS)
    tracker.close()
    folder = run.path / EVALUATIONS / "settings"
    folder.mkdir(parents=True)
    rows = [{"metric": "new", "better": "lower"}]
    results = {"place": "eval/", "made_with": {"clips": str(clips), "sample.steps": "25"}, "rows": rows}
    (folder / RESULTS).write_text(json.dumps(results))


def test_evaluated_metrics_have_their_intervals_over_clips_and_say_where_they_were_measured_otherwise(
    tmp_path: Path,
) -> None:
    runs = [make_run(tmp_path / "runs", weight=weight, seed=seed) for seed in (0, 1) for weight in (0.0, 5.0)]
    evaluate(runs[0], 0.5, 0.4, 0.6)
    evaluate(runs[1], 0.3, 0.2, 0.35, clips=12)
    evaluate(runs[2], 0.4, 0.3, 0.5)
    made = compared(runs[:2], tmp_path)
    assert [(row.name, row.better, row.best) for row in made.rows if row.name.startswith("eval/")] == [
        ("eval/new", "lower", 1)
    ]
    assert not [panel.metric for panel in made.panels if panel.metric.startswith("eval/new/")]
    (text,) = [text for text, _ in made.verdicts if text.startswith("eval/new")]
    assert "intervals over clips do not overlap" in text and "with one seed" in text
    assert "Evaluated otherwise, clips: 24 in A, 12 in B (eval/new)." in conclusions(made)
    row = next(row for row in made.rows if row.name == "eval/new")
    lines = re.findall(r'<line class="interval v(\d)" x1="([\d.]+)" y1="(\d+)" x2="([\d.]+)"', dots(row))
    assert [color for color, *_ in lines] == ["0", "1"] and lines[0][2] != lines[1][2]
    assert float(lines[1][1]) < float(lines[1][3]) < float(lines[0][1]) < float(lines[0][3])
    seeds = compared(runs, tmp_path)
    assert next(row for row in seeds.rows if row.name == "eval/new").cells[0].intervals == [
        "A: 0.400 to 0.600", "C: 0.300 to 0.500",
    ]  # fmt: skip
    assert "0.4500 ± 0.071 · A: 0.400 to 0.600 · C: 0.300 to 0.500" in markdown(seeds)
    write_page(seeds, tmp_path / "page.html")
    assert "<small>A: 0.400 to 0.600</small><small>C: 0.300 to 0.500</small>" in (tmp_path / "page.html").read_text()
    damaged = next(runs[0].path.glob(f"{EVALUATIONS}/*/{RESULTS}"))
    damaged.write_text('{"rows": [')
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        compared(runs[:2], tmp_path)


def test_a_difference_within_the_spread_of_seeds_is_not_called_clear(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "runs", weight=w, seed=seed, sync=0.5 + 0.05 * seed + w / 500)
        for w in (0.0, 5.0) for seed in (0, 1)
    ]  # fmt: skip
    (found,) = [each for each in compared(runs, tmp_path).verdicts if each[0].startswith("val/lip_sync")]
    assert not found[1] and "; not clearly better than mouth_weight=0.0 (" in found[0]
    alone = compared(runs[::2], tmp_path)
    assert all("with one seed" in text and not is_clear for text, is_clear in alone.verdicts)


def test_losses_of_different_recipes_are_shown_and_none_is_called_better(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs", recipe=recipe, weight=w, sync=w) for recipe, w in (("a", 0.0), ("b", 5.0))]
    made = compared(runs, tmp_path)
    assert [row.name for row in made.rows if row.best is not None] == ["val/lip_sync"]
    assert made.cautions[0].startswith("The runs are of different recipes (a, b). Losses are shown")


def test_a_run_in_progress_is_compared_where_it_is_and_a_silent_one_is_said_to_be_killed(tmp_path: Path) -> None:
    done = make_run(tmp_path / "runs", weight=0.0)
    going = make_run(tmp_path / "runs", weight=5.0, steps=200, status="running")
    made = compared([done, going], tmp_path)
    row = next(row for row in made.rows if row.name == "val/loss/video")
    assert row.steps == (200,)
    assert [cell.mean for cell in row.cells] == pytest.approx([0.5 + 0.5, 0.4 + 0.5])
    assert made.subjects[1].state.startswith("running, last heard of") and made.subjects[1].steps == "200 of 400"
    assert any(line.startswith("B is running") for line in conclusions(made))
    spool = going.spool_dir / "metrics.jsonl"
    spool.write_text(re.sub(r'"t":\d+', f'"t":{round((time.time() - 7200) * 1000)}', spool.read_text()))
    assert "silent for 2 h: killed? `just resume run=" in compared([done, going], tmp_path).subjects[1].state


def test_missing_metrics_clips_and_provenance_are_said_to_be_missing(tmp_path: Path) -> None:
    full = make_run(tmp_path / "runs", clips=("face",), sync=0.5)
    bare = create_run(tmp_path / "runs", "jova_stage2", config=full.read_config())
    made = compared([full, bare], tmp_path)
    assert {str(row.cells[1]) for row in made.rows if len(row.cells) > 1} == {"not measured"}
    assert made.verdicts == [] and made.clips[0].clips[1] is None
    assert any("has logged nothing" in line for line in made.cautions)
    assert made.differences.unknown == ("B",) and any("Of B it is not known" in line for line in made.changed)
    (full.samples_dir / "step-00000400" / "00-face.mp4").write_bytes(b"damaged")
    write_page(made := compared([full, bare], tmp_path), tmp_path / "page.html")
    clip = made.clips[0].clips[0]
    assert clip is not None and clip.problem.startswith("cannot be read")
    page = (tmp_path / "page.html").read_text()
    assert clip.problem in page and "made no such clip yet" in page


# Lineage and deleted runs


def flat(stages: Sequence[Stage], depth: int = 0) -> list[tuple[int, str]]:
    return [
        pair
        for stage in stages
        for pair in ((depth, stage.letter or stage.name or stage.problem), *flat(stage.children, depth + 1))
    ]


def test_lineage_goes_back_to_the_first_stage_and_names_what_is_gone(
    comparison: tuple[Comparison, Path], trained: list[Run], tmp_path: Path
) -> None:
    made, _ = comparison
    assert flat(made.lineage) == [(0, "first 0"), (1, "A"), (1, "C"), (0, "first 1"), (1, "B"), (1, "D")]
    assert made.lineage[0].children[0].from_step == STEPS
    moved = shutil.copytree(trained[0].path.parent, tmp_path / "runs")
    gone = trained[0].record().init_run
    assert gone is not None
    shutil.rmtree(moved / gone)
    runs = [find_run(moved, run.id) for run in trained[:2]]
    assert flat(compared(runs, tmp_path).lineage)[0] == (0, "its folder is gone")


def test_a_deleted_run_and_other_mistakes_get_a_clear_answer(
    trained: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = shutil.copytree(trained[0].path.parent, tmp_path / "runs")
    gone = trained[0].record().init_run
    assert gone is not None
    shutil.rmtree(runs / gone)
    for words, message in (
        ([f"run={gone}", "run=last"], f"{gone} was there once ({trained[0].id} starts from it) and its folder is gone"),
        (["run=last"], "two runs or more are compared, and only"),
        ([], "none is named"),
        (["run=last:9"], "there are 5 runs"),
        (["run=last:two"], "must be last or last:N"),
        (["runs=last"], "did you mean run?"),
        (["run=last:2", "clips=few"], "must be a whole number"),
        (["tag=size"], "must be tag=KEY=VALUE"),
        (["experiment=other"], "there are avlit"),
    ):
        assert avlit(["compare", f"runs_dir={runs}", *words]) == USER_MISTAKE
        assert message in capsys.readouterr().err
    assert not (runs / "comparisons").exists()  # nothing was made for a mistake


def test_a_tag_that_only_an_unreachable_server_could_know_is_answered(
    trained: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"runs_dir={trained[0].path.parent}", "tag=verdict=good", "tracking.uri=http://127.0.0.1:9"]
    assert avlit(["compare", *words]) == USER_MISTAKE
    message = capsys.readouterr().err
    assert "http://127.0.0.1:9: does not answer" in message and "name them by id" in message


def test_page_of_runs_without_a_store_is_said_to_be_in_no_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for seed in (0, 1):
        make_run(runs, seed=seed, store=OFFLINE)
    assert avlit(["compare", f"runs_dir={runs}", "run=last:2"]) == 0
    assert "Not in MLflow: the runs were trained with tracking.uri=offline" in capsys.readouterr().out
    tracked = make_run(runs, seed=2)
    (runs / "mlflow.db").touch()  # a store that is there
    assert avlit(["compare", f"runs_dir={runs}", "run=last:3"]) == 0
    assert "Not in MLflow" not in capsys.readouterr().out
    session, sent = read_session(tracked), read_session(find_run(runs / "comparisons", "last"))
    assert session is not None and sent is not None and sent.store == session.store


# The command


def test_command_prints_writes_and_sends_the_page_and_is_no_run_that_last_means(
    trained: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = shutil.copytree(trained[0].path.parent, tmp_path / "runs")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert avlit(["compare", f"runs_dir={runs}", "run=last:4", f"tracking.uri={store}", "clips=1"]) == 0
    (folder,) = (runs / "comparisons").iterdir()
    out = capsys.readouterr().out
    assert "mouth_weight" in out and "0.4050 ± 0.0071" in out and (folder / "comparison.html").as_uri() in out
    sent = [json.loads(line) for line in (folder / "spool" / "artifacts.jsonl").read_text().splitlines()]
    assert {Path(each["file"]).name for each in sent} == {"comparison.html", "comparison.md"}
    records = [json.loads(line) for line in (folder / "spool" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["open"]["store"] == store and records[0]["open"]["name"] == "comparison of 4 runs"
    assert (
        records[1]["tags"]["story"]
        == "compares <b>0</b>, seed 0 · <b>0</b>, seed 1 · <b>5</b>, seed 0 · <b>5</b>, seed 1"
    )
    assert find_run(runs, "last").recipe == "jova_stage2"
    assert find_run(runs / "comparisons", "last").record().status == "finished"
    assert len(list((folder / "media").glob("*.mp4"))) == 4  # one clip of each run


# The page's content, without a browser


def test_names_from_a_run_are_text_and_no_markup(comparison: tuple[Comparison, Path]) -> None:
    page = (comparison[1] / "comparison.html").read_text()
    assert "<b>5</b>, seed" not in page and "&lt;b&gt;5&lt;/b&gt;, seed 0" in page
    assert "\\u003cb\\u003e5" in page  # in the data, too


def test_same_clips_stand_side_by_side_with_their_spectrograms(comparison: tuple[Comparison, Path]) -> None:
    made, folder = comparison
    assert [row.key for row in made.clips] == ["face-1", "face-2"]
    page = (folder / "comparison.html").read_text()
    sources = re.findall(r'<(?:video|img)[^>]* src="([^"]+)"', page)
    assert len(sources) == 16 and all((folder / source).is_file() for source in sources)
    assert page.index("A-00-face-1.mp4") < page.index("D-00-face-1.mp4") < page.index("A-01-face-2.mp4")


def test_spectrogram_shows_a_higher_tone_higher_up() -> None:
    from avlit.comparison.clips import draw_spectrogram

    def brightest(hz: float) -> int:
        tone = np.sin(2 * np.pi * hz * np.arange(16000) / 16000).astype(np.float32)
        return int(np.asarray(draw_spectrogram(tone, 16000).convert("L"), int).sum(axis=1).argmax())

    rows = [brightest(hz) for hz in (200, 800, 3200)]
    assert rows[0] > rows[1] > rows[2]
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=4)  # octaves are equally far apart


def test_file_for_mlflow_holds_its_clips_and_names_no_other_file(comparison: tuple[Comparison, Path]) -> None:
    made, folder = comparison
    assert write_single_file(made, folder / "single.html", media=folder / "media")
    page = (folder / "single.html").read_text()
    sources = re.findall(r' src="([^"]+)"', page)
    assert len(sources) == 16 and all(source.startswith("data:") for source in sources)
    first = (folder / "media" / "A-00-face-1.mp4").read_bytes()
    assert b64decode(sources[0].partition("base64,")[2]) == first


def test_thinned_curves_keep_means_and_extremes_and_all_together_a_budget() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    values[1234], values[4321] = 50.0, np.nan
    line = thinned(0, Curve(np.arange(10_000), values), 500)
    steps, means, least, greatest = (
        np.frombuffer(b64decode(text), "<f4") for text in (line.steps, line.means, line.least, line.greatest)
    )
    assert len(steps) == 500 and greatest.max() == 50.0 and least.min() == np.nanmin(values).astype(np.float32)
    assert means[0] == pytest.approx(values[:20].mean(), abs=1e-6) and np.isfinite(means).all()
    assert means[61] == pytest.approx(values[1220:1240].mean(), abs=1e-5)
    whole = thinned(0, Curve(np.arange(100), values[:100]), 500)
    assert np.frombuffer(b64decode(whole.means), "<f4") == pytest.approx(values[:100]) and whole.least == ""
    lengths = [10_000] * 450  # ten runs of 45 curves that log at every step
    assert 4 * points_within(BUDGET, lengths) * len(lengths) <= BUDGET
    assert BUDGET * 4 * 4 / 3 < 4e6  # as base64, with room for the rest of 5 MB


def test_curves_are_filed_by_modality_and_noise_level() -> None:
    assert described("train/loss/video") == {"title": "video", "part": "video", "kind": "train", "group": "all"}
    assert described("val/loss/audio/noise/3") == {
        "title": "noise 75–100 %", "part": "audio", "kind": "val", "group": "noise",
    }  # fmt: skip
    assert described("train/loss/video/task/ti2av")["group"] == "task"
    assert described("val/mouth_coverage/noise/0")["group"] == described("train/lr")["group"] == "other"


# The page in a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on PATH")
    with Browser(program) as opened:
        yield opened


def paths(browser: Browser) -> int:
    return browser.run("document.querySelectorAll('#losses path.bold').length")


def test_page_works_in_a_browser(browser: Browser, comparison: tuple[Comparison, Path]) -> None:
    made, folder = comparison
    browser.show(folder / "comparison.html", width=1300)
    assert paths(browser) == 2 * len(made.subjects)  # held out and training
    assert browser.run("document.querySelectorAll('#noise .panel').length") == 1
    assert browser.run("smooth([0, 1, 5], [2, 2, 2], 3)") == pytest.approx([2, 2, 2])
    smoothed = browser.run("smooth([0, 1, 2, 3], [0, 1, NaN, 0], 0.5)")
    assert 0 < smoothed[0] < smoothed[1] < 1 and smoothed[2] == pytest.approx(0.5, abs=0.15)
    before = browser.run("document.querySelector('[data-metric=\"train/loss/video\"] path.bold').getAttribute('d')")
    browser.run("$('smoothing').value = 100; $('smoothing').dispatchEvent(new Event('input'))")
    after = browser.run("document.querySelector('[data-metric=\"train/loss/video\"] path.bold').getAttribute('d')")
    assert before != after
    browser.run("document.querySelector('#runs .chip').click()")
    assert paths(browser) == 2 * (len(made.subjects) - 1)
    browser.run("$('more').open = true")
    browser.run(
        "(() => { const box = document.querySelector('.panel'), f = box.querySelector('svg').getBoundingClientRect();"
        "box.dispatchEvent(new PointerEvent('pointermove', {clientX: f.left + f.width / 2, clientY: f.top + 5})) })()"
    )
    assert "step 200" in browser.run("document.querySelector('.tip').textContent")
    seeks = """new Promise((done) => {
      const end = Date.now() + 20000;
      const look = () => [...document.querySelectorAll('video')].every((c) => c.currentTime > 0) || Date.now() > end
        ? done([...document.querySelectorAll('video')].map((c) => c.currentTime)) : setTimeout(look, 30);
      look();
    })"""
    assert all(0 < at < 0.01 for at in browser.run(seeks))  # a picture before anything is played
    assert browser.errors == []  # and it has asked no network for anything


def test_a_reference_is_drawn_up_to_where_the_runs_are_and_can_be_switched_off(
    browser: Browser, comparison: tuple[Comparison, Path]
) -> None:
    made, folder = comparison
    curves = {"val/loss/video": ReferenceCurve((0, 1000), (2.0, 0.0), (0.1, 0.1))}
    yardstick = Yardstick(Reference((0, 1), {}, "", {}, curves), "jova_stage2", ("A B: of its settings",))
    write_page(replace(made, yardstick=yardstick), folder / "reference.html")
    browser.show(folder / "reference.html", width=390, scheme="dark")
    found = browser.run("within(data.panels.find((p) => p.metric === 'val/loss/video').reference, 0, 400)")
    assert found["steps"] == [0, 400] and found["means"] == pytest.approx([2.0, 1.2])
    assert found["greatest"][1] > found["means"][1] > found["least"][1]
    drawn = "document.querySelectorAll('path.reference').length"
    ends = """(() => { const box = document.querySelector('[data-metric="val/loss/video"]').querySelector('svg');
        const [line, known] = ['path.bold.v0', 'path.bold.reference'].map((p) => box.querySelector(p).getBBox());
        return [known.x + known.width - line.x - line.width, known.y >= 0] })()"""
    assert browser.run(ends) == [pytest.approx(0, abs=0.2), True]
    assert browser.run(drawn) == 2  # its band and its mean
    browser.run("$('reference').click()")
    assert browser.run(drawn) == 0 and paths(browser) == 2 * len(made.subjects)
    assert browser.errors == []


def test_clips_play_together_with_the_sound_of_one(browser: Browser, comparison: tuple[Comparison, Path]) -> None:
    browser.show(comparison[1] / "comparison.html", width=1300)
    played = """new Promise((done) => {
      const clips = [...document.querySelectorAll('.clips')[0].querySelectorAll('video')];
      document.querySelector('.play').click();
      const end = Date.now() + 20000;
      const look = () => clips.every((c) => c.currentTime > 0.1) || Date.now() > end
        ? done(clips.map((c) => [c.currentTime > 0.1, c.muted, c.webkitAudioDecodedByteCount > 0]))
        : setTimeout(look, 30);
      look();
    })"""
    assert browser.run(played) == [[True, False, True], *[[True, True, True]] * 3]
    browser.run("document.querySelectorAll('.hear')[2].click()")
    browser.run("for (const _ of [1, 2, 3]) document.querySelector('.play').click()")  # paused before it can begin
    assert browser.run("[...document.querySelectorAll('video')].map((c) => c.muted)") == [
        True, True, False, *[True] * 5,
    ]  # fmt: skip
    assert browser.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_readable_light_and_dark_narrow_and_wide(
    browser: Browser, comparison: tuple[Comparison, Path], scheme: str
) -> None:
    for width in (390, 1300):
        browser.show(comparison[1] / "comparison.html", width=width, scheme=scheme)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("[...document.querySelectorAll('.panel')].every((p) => p.clientWidth > 120)")
    ink, paper = (browser.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    assert (luminance(ink) > luminance(paper)) == (scheme == "dark") and contrast(ink, paper) > 7
    for number in range(8):
        line = browser.run(
            f"(() => {{ const e = document.createElement('i'); e.className = 'v{number}'; e.style.color = 'var(--c)';"
            "document.body.append(e); return getComputedStyle(e).color })()"
        )
        assert contrast(line, paper) > 3, number


def luminance(color: str) -> float:
    """As WCAG 2 defines it, of `rgb(r, g, b)`."""
    parts = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
