"""Reference curves: made from finished runs of several seeds, and what a run is told against them."""

import json
import shutil
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.commands import reference as command
from avlit.commands.reference import update
from avlit.comparison.comparison import compare
from avlit.comparison.page import write_page
from avlit.comparison.subject import read_subject
from avlit.comparison.yardstick import find_yardstick
from avlit.config import load_config, to_yaml
from avlit.discovery import RECIPES
from avlit.errors import UserError
from avlit.provenance import Provenance
from avlit.reference import (
    ALONE,
    Reference,
    ReferenceCurve,
    differing,
    read_references,
    reference_path,
    standing,
)
from avlit.runs import Run, create_run
from avlit.tracking import OFFLINE, Tracker
from tests.browser import Browser, find_browser

LOSSES = {0: (2.0, 1.0, 0.40), 1: (2.1, 1.1, 0.43), 2: (1.9, 1.2, 0.41)}
"""Seed -> held-out loss at steps 0, 100 and 200."""


def make_run(
    folder: Path,
    *words: str,
    recipe: str = "jova_stage1_video",
    seed: int = 0,
    losses: tuple[float, ...] | None = None,
    status: str = "finished",
    init: Run | None = None,
    parent: str | None = None,
) -> Run:
    """A run as its folder is once it is over, measured every 100 steps."""
    config = to_yaml(load_config([f"recipe={recipe}", f"seed={seed}", f"runs_dir={folder}", *words]))
    run = create_run(
        folder, recipe, config=config, parent=parent, init_run=init and init.id,
        init_checkpoint=init and str(init.checkpoints_dir / "step-00000600"),
    )  # fmt: skip
    versions, data = {"torch": f"2.{seed}"}, {"corpus_source": "c0ffee" * 8}
    Provenance(config, revision="abc", versions=versions, data=data).write(run.provenance_path)
    tracker = Tracker(run, uri=OFFLINE)
    for number, loss in enumerate(LOSSES[seed] if losses is None else losses):
        metrics = {"val/loss/video": loss, "val/loss/video/noise/3": loss / 2, "val/loss/video/subset/a": loss}
        tracker.log_metrics(metrics | {"train/loss/video": loss}, 100 * number)
    tracker.close()
    run.update(status=status)
    return run


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A copy of the recipes' configs, without references."""
    root = tmp_path / "recipes"
    shutil.copytree(RECIPES, root, ignore=shutil.ignore_patterns("*.py", "*.md", "reference.json", "__pycache__"))
    for config in RECIPES.glob("*/config.py"):
        (root / config.parent.name / "config.py").touch()
    return root


def made(recipes: Path, runs: Path, *words: str, **settings) -> Reference:
    """The reference of three seeds, written among `recipes`."""
    each = [make_run(runs, *words, seed=seed, **settings) for seed in LOSSES]
    update(each, hardware="a test", root=recipes)
    return read_references(reference_path(each[0].recipe, recipes))[each[0].recipe]


def test_a_reference_is_mean_and_spread_over_seeds_and_reads_back(recipes, tmp_path):
    found = made(recipes, tmp_path / "runs")
    assert found.seeds == (0, 1, 2) and found.begins_with == ""
    assert found.made_with == {
        "hardware": "a test", "commit": "abc", "corpus": "c0ffeec0ffee", "torch": "2.0, 2.1, 2.2",
    }  # fmt: skip
    curve, by_noise = found.curves["val/loss/video"], found.curves["val/loss/video/noise/3"]
    at = list(zip(*LOSSES.values(), strict=True))
    assert curve.steps == (0, 100, 200)
    np.testing.assert_allclose(curve.mean, [mean(each) for each in at], rtol=1e-4)
    np.testing.assert_allclose(curve.spread, [stdev(each) for each in at], rtol=1e-4)
    np.testing.assert_allclose(np.divide(curve.spread, by_noise.spread), 2, rtol=1e-3)
    assert len(found.curves) == 2  # neither training losses nor subsets

    old = make_run(tmp_path / "runs", recipe="jova_stage1_audio")
    said = update([old], hardware="another", root=recipes)
    assert said[0] == "jova_stage1_audio: val/loss/video 0.4000 at step 200, seeds 0"
    both = read_references(reference_path("jova_stage1_audio", recipes))
    assert both["jova_stage1_video"] == found and both["jova_stage1_audio"].curves["val/loss/video"].spread == ()


def test_nineteen_of_twenty_runs_of_other_seeds_are_called_normal():
    generator = np.random.default_rng(0)
    drawn = generator.normal(0.5, 0.1, (2000, 6))
    for count in (3, 5):
        is_normal = []
        for row in drawn:
            curve = ReferenceCurve((9,), (float(row[:count].mean()),), (float(row[:count].std(ddof=1)),))
            known = Reference(tuple(range(count)), {}, "", {}, {"val/loss/video": curve})
            judged = known.judge("val/loss/video", float(row[5]), 9)
            assert judged is not None
            is_normal.append(judged[1])
        assert 0.94 < np.mean(is_normal) < 0.96


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((2.0, 1.1, 0.42), "val/loss/video 0.4200 at step 200: normal (reference 0.4133 ± 0.015, 3 seeds)"),
        ((2.0, 1.1, 0.62), "val/loss/video 0.6200 at step 200: higher than normal, by 13.5 spreads"),
        ((2.0, 1.1, 0.22), "val/loss/video 0.2200 at step 200: lower than normal, by 12.7 spreads"),
        ((2.0, 1.1, float("nan")), "val/loss/video nan at step 200: not normal (reference 0.4133)"),
    ],
)
def test_a_run_is_told_where_it_stands(recipes, tmp_path, losses, said):
    made(recipes, tmp_path / "runs")
    run = make_run(tmp_path / "runs", "train.threads=7", "data.cache_dir=elsewhere", seed=0, losses=losses)
    stands = standing(run, recipes)
    assert stands is not None
    metrics = {"val/loss/video": losses[-1], "val/loss/video/noise/3": 9.0, "val/lip_sync": 0.5}
    lines = stands.lines(metrics, 200)
    assert lines[0].startswith(said)
    # What else was otherwise is said of a loss that is not normal alone: torch 2.0 is one of the reference's.
    assert lines[1:] == []
    assert bool(stands.warnings(metrics, 200)) is ("normal (" not in lines[0] or "not normal" in lines[0])
    assert stands.lines(metrics, 150) == []


def test_what_has_changed_since_is_named_where_a_loss_is_not_normal(recipes, tmp_path):
    made(recipes, tmp_path / "runs")
    run = make_run(tmp_path / "runs", seed=0)
    Provenance("", "abc", versions={"torch": "3.0"}).write(run.provenance_path)
    stands = standing(run, recipes)
    assert stands is not None and len(stands.lines({"val/loss/video": 0.41}, 200)) == 1
    lines = stands.lines({"val/loss/video": 0.9}, 200)
    assert lines[-1] == "Since the reference was made, these have changed: torch (2.0, 2.1, 2.2 then, 3.0 now)"


def test_one_seed_knows_no_spread(recipes, tmp_path):
    update([make_run(tmp_path / "runs")], hardware="a test", root=recipes)
    stands = standing(make_run(tmp_path / "runs", seed=1), recipes)
    assert stands is not None
    assert stands.lines({"val/loss/video": 0.44}, 200) == [
        "val/loss/video 0.4400 at step 200: +10.0% to the reference 0.4000, whose one seed knows no spread"
    ]


def test_other_settings_are_named_by_their_keys_and_not_judged(recipes, tmp_path):
    runs = tmp_path / "runs"
    made(recipes, runs)
    words = ("optimizer.lr=5e-4", "train.steps=50", "data.batch_size=8", "data.num_clips=99", "seed=3")
    other = make_run(runs, *words[:4], seed=1)
    stands = standing(other, recipes)
    assert stands is not None and stands.warnings({"val/loss/video": 9.0}, 200) == []
    assert stands.lines({"val/loss/video": 9.0}, 200) == [
        "Whether these losses are normal is not known, the reference of jova_stage1_video is of other settings: "
        "data.batch_size=8 instead of 16; data.num_clips=99 instead of 1024; optimizer.lr=0.0005 instead of 0.001; "
        "and 1 more"
    ]
    # A key that came after the reference was made counts with the recipe's value.
    path = reference_path("jova_stage1_video", recipes)
    values = json.loads(path.read_text())
    del values["jova_stage1_video"]["settings"]["optimizer.lr"]
    path.write_text(json.dumps(values))
    assert any("optimizer.lr" in each for each in differing(other, read_references(path), recipes))
    assert differing(make_run(runs), read_references(path), recipes) == []
    mixed = differing(make_run(runs, "data.subsets={sound_event: 1}"), read_references(path), recipes)
    assert mixed == [
        "data.subsets.sound_event=1.0 instead of null", "data.subsets.basic_face=null instead of 1.0",
    ]  # fmt: skip


def test_the_runs_whose_weights_a_run_begins_with_belong_to_its_settings(recipes, tmp_path):
    runs = tmp_path / "runs"
    first = {seed: make_run(runs, seed=seed) for seed in LOSSES}
    update(list(first.values()), hardware="a test", root=recipes)
    second: Any = {"recipe": "jova_stage1_audio"}
    update([make_run(runs, seed=s, init=first[s], **second) for s in LOSSES], hardware="a test", root=recipes)
    same, scratch = make_run(runs, init=first[2], **second), make_run(runs, **second)
    other_first = make_run(runs, "optimizer.lr=0.5", seed=1)
    other, gone = (make_run(runs, init=other_first, seed=s, **second) for s in (0, 1))
    last = make_run(runs, recipe="jova_stage2", init=same)
    known = read_references(reference_path("jova_stage1_audio", recipes))
    assert differing(same, known, recipes) == []
    assert differing(scratch, known, recipes)[0].startswith("init, no trained weights instead of jova_stage1_video, ")
    assert differing(other, known, recipes) == ["init, a jova_stage1_video with optimizer.lr=0.5 instead of 0.001"]
    assert standing(last, recipes) is None  # a recipe without a reference
    shutil.rmtree(other_first.path)
    assert differing(gone, known, recipes)[0].startswith(f"init={runs}/{other_first.id}/")
    with pytest.raises(UserError, match=r"begins with .* which is of no run that is there"):
        update([gone], hardware="a test", root=recipes)


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ((), {"status": "stopped"}, "is stopped, not finished; `just resume run="),
        ((), {"losses": ()}, "has logged no held-out loss; train with validation.clips above 0"),
        ((), {"losses": (1.0, float("inf"))}, "val/loss/video is not finite at step 100"),
        ((), {"seed": 0}, "seed=0 was given by .*; train another seed"),
        (("optimizer.lr=0.5",), {}, "optimizer.lr=0.5, and .* has 0.001; a reference is of one setting"),
        (("size=paper", "data.root=x"), {}, "size=paper; references are of size=tiny"),
    ],
)
def test_what_makes_no_reference_is_refused_and_nothing_is_written(recipes, tmp_path, words, settings, message):
    runs = tmp_path / "runs"
    wrong = make_run(runs, *words, **{"seed": 1, **settings})
    with pytest.raises(UserError, match=message):
        update([make_run(runs, seed=0), wrong], hardware="a test", root=recipes)
    assert not reference_path("jova_stage1_video", recipes).exists()


def test_a_stage_that_is_also_trained_from_scratch_has_a_reference_of_each(recipes, tmp_path):
    runs, recipe = tmp_path / "runs", "jova_stage1_audio"
    path = reference_path(recipe, recipes)
    alone = made(recipes, runs, recipe=recipe)
    assert set(read_references(path)) == {recipe}
    first = make_run(runs)
    after = made(recipes, runs, recipe=recipe, init=first)
    assert read_references(path) == {recipe: after, recipe + ALONE: alone} and after.begins_with
    made(recipes, runs, recipe=recipe)
    assert read_references(path) == {recipe: after, recipe + ALONE: alone}
    for run, mine in ((make_run(runs, recipe=recipe), alone), (make_run(runs, recipe=recipe, init=first), after)):
        stands = standing(run, recipes)
        assert stands is not None and stands.reference == mine and not stands.other


def test_the_command_takes_a_curriculum_for_all_its_stages(recipes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "RECIPES", recipes)
    monkeypatch.setattr(command.update, "__kwdefaults__", {"root": recipes})
    runs = tmp_path / "runs"
    whole = create_run(runs, "jova")
    first = make_run(runs, parent=whole.id)
    make_run(runs, recipe="jova_stage1_audio", init=first, parent=whole.id)
    assert avlit(["reference", f"run={whole.id}", f"runs_dir={runs}", "hardware=H"]) == 0
    assert set(read_references(recipes / "jova" / "reference.json")) == {"jova_stage1_video", "jova_stage1_audio"}
    assert "jova_stage1_audio: val/loss/video 0.4000 at step 200" in capsys.readouterr().out
    assert avlit(["reference", f"runs_dir={runs}"]) == USER_MISTAKE
    assert avlit(["reference", f"run={whole.id}", f"runs_di={runs}"]) == USER_MISTAKE
    said = capsys.readouterr().err
    assert "run=… is missing" in said and "did you mean runs_dir?" in said


def test_a_damaged_file_says_what_to_do(recipes):
    path = reference_path("jova_stage2", recipes)
    for text in ("{", '{"jova_stage2": {"seeds": [0]}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"reference.json: cannot be read .*; put it back, or remove it"):
            read_references(path)


def test_a_comparison_shows_the_reference_where_runs_are_measured_as_it_is(recipes, tmp_path):
    runs = tmp_path / "runs"
    known = made(recipes, runs)
    first, second = make_run(runs), make_run(runs, "optimizer.lr=0.5", seed=1)
    subjects = [read_subject(run, number) for number, run in enumerate((first, second))]
    yardstick = find_yardstick(subjects, recipes)
    assert yardstick is not None
    assert yardstick.notes == ("A: of its settings", "B: optimizer.lr=0.5 instead of 0.001")
    line, curve = yardstick.line("val/loss/video"), known.curves["val/loss/video"]
    assert line is not None and yardstick.line("train/loss/video") is None
    means, greatest = (np.frombuffer(b64decode(text), "<f4") for text in (line.means, line.greatest))
    np.testing.assert_allclose(means, curve.mean, rtol=1e-5)
    np.testing.assert_allclose(greatest - means, known.within * np.array(curve.spread), rtol=1e-3)
    page = tmp_path / "page.html"
    write_page(replace(compare([first, second], media=tmp_path / "media", num_clips=0), yardstick=yardstick), page)
    text = page.read_text()
    assert "B: optimizer.lr=0.5 instead of 0.001" in text and text.count('"reference": {') == 2
    if program := find_browser():
        with Browser(program) as browser:
            browser.show(page, width=1300)
            assert browser.run("document.querySelectorAll('#losses path.reference').length") == 2  # mean and band
            assert browser.run("document.querySelectorAll('#noise path.reference').length") == 2
            assert browser.errors == []
    other_clips = read_subject(make_run(runs, "validation.clips=3"), 1)
    other_recipe = read_subject(make_run(runs, recipe="jova_stage1_audio"), 1)
    assert [find_yardstick([subjects[0], each], recipes) for each in (other_clips, other_recipe)] == [None, None]


def test_every_committed_reference_is_of_the_settings_that_its_recipe_has_now(tmp_path):
    for path in RECIPES.glob("*/reference.json"):
        references = read_references(path)
        for key, reference in references.items():
            recipe = key.removesuffix(ALONE)
            run = create_run(tmp_path, recipe, config=to_yaml(load_config([f"recipe={recipe}"])))
            now = [each for each in differing(run, {recipe: reference}) if not each.startswith("init")]
            assert now == [] and len(reference.seeds) > 1, key
