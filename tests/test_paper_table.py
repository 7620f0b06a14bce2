"""Tables of papers: what their files say becomes runs that share what they can, and mistakes are named."""

import re
from pathlib import Path

import pytest

from avlit.config import load_config
from avlit.discovery import RECIPES
from avlit.errors import ConfigError
from avlit.paper_table import PaperTable, load_table, table_paths

PAPER = Path(__file__).parents[2] / "shared" / "papers" / "jova.txt"

YAML = """
about: "Depth"
paper: "A, Table 1"
shared: {one_first: [], one_second: [model.b]}
stage: one_last
rows:
  "1": {model.a: 1, model.b: true}
  "2": {model.a: 2, model.b: true}
  "3": {model.a: 2, model.b: false}
seeds: [0, 1]
words: {one_last: {train.steps: 9, optimizer.lr: 0.1}}
quick: {rows: ["3", "1"], seeds: [4], words: {one_last: {train.steps: 2}}}
metrics:
  loss: {better: lower, beside: E}
published:
  E: {better: lower, "1": 0.5, "3": 2}
"""


def make_root(folder: Path, text: str = YAML) -> Path:
    (folder / "one" / "tables").mkdir(parents=True)
    for stage in ("first", "second", "last"):
        (folder / "one" / f"{stage}.yaml").write_text("about: x\n")
    (folder / "one" / "tables" / "depth.yaml").write_text(text)
    return folder


@pytest.fixture
def table(tmp_path: Path) -> PaperTable:
    return load_table("one_depth", make_root(tmp_path))


def test_rows_start_from_runs_that_are_shared_as_far_as_their_words_allow(table: PaperTable):
    units = table.units(table.full)
    assert [(unit.name, unit.needs) for unit in units if unit.seed == 0] == [
        ("one_first, seed 0", None),
        ("one_second, model.b=true, seed 0", "one_first, seed 0"),
        ("one_second, model.b=false, seed 0", "one_first, seed 0"),
        ("1, seed 0", "one_second, model.b=true, seed 0"),
        ("2, seed 0", "one_second, model.b=true, seed 0"),
        ("3, seed 0", "one_second, model.b=false, seed 0"),
    ]
    assert [unit.seed for unit in units] == [0] * 6 + [1] * 6
    by_name = {unit.name: unit for unit in units}
    assert by_name["one_second, model.b=false, seed 1"].words == ("recipe=one_second", "seed=1", "model.b=false")
    row = ("recipe=one_last", "seed=1", "train.steps=9", "optimizer.lr=0.1", "model.a=2", "model.b=false")
    assert by_name["3, seed 1"].words == row
    assert [unit.row for unit in units[:6]] == [None, None, None, "1", "2", "3"]


def test_quick_takes_its_own_rows_seeds_and_words_and_given_words_win(table: PaperTable):
    units = table.units(table.quick, ["train.steps=7", "one_first.train.steps=8", "size=paper"])
    assert [unit.name for unit in units if unit.row] == ["3, seed 4", "1, seed 4"]
    steps = {unit.stage: [word for word in unit.words if word.startswith("train.steps=")] for unit in units}
    assert steps == {"one_first": ["train.steps=8"], "one_second": ["train.steps=7"], "one_last": ["train.steps=7"]}
    assert all("size=paper" in unit.words for unit in units)
    (last,) = [unit for unit in table.units(table.quick) if unit.row == "1"]
    assert "train.steps=2" in last.words and "optimizer.lr=0.1" in last.words


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=1", "seed=1: is settled for every run of table=one_depth"),
        ("one_last.init=last", "one_last.init=last: is settled for every run"),
        ("model.a=3", r"model.a=3: is what the rows of table=one_depth differ in \(1, …\)"),
        ("one_last.model.b=true", "one_last.model.b=true: is what the rows"),
    ],
)
def test_words_that_the_table_settles_are_refused(table: PaperTable, word: str, message: str):
    with pytest.raises(ConfigError, match=message):
        table.units(table.full, [word])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stage: one_last", "stage: one_lost", "one_lost: is no recipe"),
        ("stage: one_last", "", "stage: is missing"),
        ('rows: ["3", "1"]', 'rows: ["4"]', "quick.rows: 4 is not one of 1, 2, 3"),
        ("seeds: [0, 1]", "seeds: [-1]", "seeds: must be a list of whole numbers from 0 on"),
        ("beside: E", "beside: F", "metrics.loss.beside: F is not one of E"),
        ("better: lower, beside", "better: less, beside", "metrics.loss.better: 'less' is not one of higher"),
        ('"3": 2', '"3": x', "published.E.3: 'x' is no number"),
        ('"3": 2', '"4": 2', "published.E.4: is not one of better, 1, 2, 3"),
        ("words: {one_last: {train", "words: {last: {train", "words.last: is not one of one_first"),
        ("about:", "abuot:", "abuot: is not one of about"),
    ],
)
def test_a_mistake_in_a_tables_file_is_named_with_its_place(tmp_path: Path, old: str, new: str, message: str):
    assert old in YAML
    with pytest.raises(ConfigError, match=re.escape("one/tables/depth.yaml: ") + ".*" + re.escape(message)):
        load_table("one_depth", make_root(tmp_path, YAML.replace(old, new, 1)))


def test_an_unknown_table_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"table=jova_lamda: no such table; did you mean jova_lambda\?"):
        load_table("jova_lamda")


@pytest.mark.parametrize("key", table_paths(RECIPES))
def test_every_run_of_every_table_has_a_config_and_rows_differ_in_their_words_alone(key: str):
    table = load_table(key)
    for extent in (table.full, table.quick):
        units = table.units(extent)
        for unit in units:
            assert load_config(list(unit.words)).seed == unit.seed
        rows = [unit for unit in units if unit.is_measured and unit.seed == extent.seeds[0]]
        assert [unit.row for unit in rows] == ([None] if table.given else list(extent.rows))
        keys = {key for row in table.rows.values() for key in row}
        rest = {tuple(word for word in unit.words if word.partition("=")[0] not in keys) for unit in rows}
        assert len(rest) == 1
        for row in extent.rows if table.given else ():
            config = load_config([*rows[0].words, *(f"{key}={value}" for key, value in table.rows[row].items())])
            assert set(table.given[row]) <= set(config.accepts)
    sampled = {"identity", "pitch_error", "depth_error"} if table.given else {"lip_sync", "words", "picture_psnr"}
    assert {each.name for each in table.metrics} >= sampled


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not there")
@pytest.mark.parametrize(
    ("key", "heading", "labels"),
    [
        ("jova_lambda", "Table 3 ", {"0.0": "0", "2.0": "2", "5.0": "5", "8.0": "8"}),
        ("jova_rope", "Table 4 ", {r"\times": "not aligned", r"\checkmark": "aligned"}),
        ("jova_fusion", "Table 5 ", {
            "Cross-attention w/ linear": "cross with linear", "Cross-attention w/o linear": "cross",
            "Joint self-attention": "joint",
        }),
    ],
)  # fmt: skip
def test_published_numbers_are_those_of_the_paper(key: str, heading: str, labels: dict[str, str]):
    lines = PAPER.read_text("utf-8").split(f"\n{heading}", 1)[1].splitlines()
    rows = [line.split("\t") for line in lines if "\t" in line]
    names = next(row for row in rows if row[1].startswith("LSE-C"))
    table = load_table(key)
    assert [each.name for each in table.published] == [name.split()[0] for name in names[1:]]
    assert [each.better for each in table.published] == [
        "higher" if name.endswith("uparrow") else "lower" for name in names[1:]
    ]
    said = {row[0]: row[1:] for row in rows if row[0] in labels}
    for label, row in labels.items():
        assert [each.values[row] for each in table.published] == [float(number) for number in said[label]]


SAMPLED = """
about: "Scales"
paper: "A, Figure 1"
shared: {one_first: []}
stage: one_last
rows:
  without: {sample.scale: 0}
  with: {sample.scale: 1}
given: {without: [voice], with: [voice, depth]}
clips: 8
seeds: [0, 1]
quick: {seeds: [0]}
metrics:
  identity: {better: higher}
published: {}
"""


def test_rows_that_differ_in_sampling_alone_are_one_run_of_a_seed(tmp_path: Path):
    table = load_table("one_depth", make_root(tmp_path, SAMPLED))
    assert table.given == {"without": ("voice",), "with": ("voice", "depth")} and table.clips == 8
    units = table.units(table.full, ["one_last.train.steps=3"])
    assert [(unit.name, unit.row, unit.needs, unit.is_measured) for unit in units] == [
        ("one_first, seed 0", None, None, False),
        ("one_last, seed 0", None, "one_first, seed 0", True),
        ("one_first, seed 1", None, None, False),
        ("one_last, seed 1", None, "one_first, seed 1", True),
    ]
    assert units[1].words == ("recipe=one_last", "seed=0", "train.steps=3")
    with pytest.raises(ConfigError, match=r"sample.scale=2: is what the rows of table=one_depth differ in \(without"):
        table.units(table.full, ["sample.scale=2"])


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("sample.scale: 1}", "model.a: 1}", "rows.with.model.a: rows with `given` differ in keys of `sample.` alone"),
        ("with: [voice, depth]}", "}", "given.with: must be a list of controls"),
        ("with: [voice, depth]}", "with: voice}", "given.with: must be a list of controls"),
        ("with: [voice, depth]}", "both: [voice]}", "given.both: is not one of without, with"),
        ("clips: 8", "clips: 2", "clips: 2 must be a whole number of at least 3"),
        ("clips: 8", "clips: many", "clips: 'many' must be a whole number of at least 3"),
    ],
)
def test_a_table_whose_rows_are_sampled_says_what_is_wrong_with_it(tmp_path: Path, line: str, other: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_table("one_depth", make_root(tmp_path, SAMPLED.replace(line, other)))
