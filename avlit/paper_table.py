"""A table of a paper that can be trained here: `recipes/*/tables/*.yaml` to its rows and the runs that they take.

Torch-free, so that a wrong word is answered at once. There is no registry: `recipes/jova/tables/lambda.yaml` is
`jova_lambda`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from avlit.discovery import RECIPES, recipe_keys
from avlit.errors import ConfigError
from avlit.settings import as_word, nearest, read_words, read_yaml, words_by_stage

DIRECTIONS = ("higher", "lower", "none")
"""Which of two values of a metric is the better one; none: it is no matter of better or worse."""

OF_UNITS = ("recipe", "seed", "init", "run_name", "runs_dir")
"""Words that the table settles for every run."""

NUM_CLIPS = 64
"""Held-out clips that are sampled for each row, where a table says nothing else."""


@dataclass(frozen=True)
class Metric:
    """What is measured here. better: see DIRECTIONS. beside: the paper's metric that it stands next to, if any."""

    name: str
    better: str
    beside: str | None
    about: str


@dataclass(frozen=True)
class Published:
    """A metric of the paper's table with its value in each row; rows without a number are left out."""

    name: str
    better: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Unit:
    """One training run: what it is called, its words (recipe and seed among them) and the unit it starts from, if any.

    row: the row of the table that it is measured for; None for what rows share. is_measured: whether it is what rows
    are measured on: a row's own run, or the one run of a seed where rows differ in sampling alone.
    """

    name: str
    stage: str
    seed: int
    row: str | None
    words: tuple[str, ...]
    needs: str | None = None
    is_measured: bool = False


@dataclass(frozen=True)
class Extent:
    """Which rows and seeds are trained; words: stage -> key -> value that hold for its runs besides the rows'."""

    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    words: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class PaperTable:
    """A table: rows of words for `stage`, trained from the `shared` stages, each of which starts from the one before.

    shared: stage -> those keys of a row that hold for it too (most often none, and then all rows start from one run).
    rows: label -> key -> value, in the paper's order. given: label -> the controls that clips are sampled with, in a
    table whose rows differ in sampling alone (keys `sample.*`), and all of a seed are one run; empty in others. clips:
    held-out clips that are sampled for each row unless the command says how many.
    """

    key: str
    about: str
    paper: str
    stage: str
    shared: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, Mapping[str, str]]
    full: Extent
    quick: Extent
    metrics: tuple[Metric, ...]
    published: tuple[Published, ...]
    given: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clips: int = NUM_CLIPS

    @property
    def stages(self) -> tuple[str, ...]:
        """All stages, those that are shared first."""
        return (*self.shared, self.stage)

    @property
    def least_clips(self) -> int:
        """Clips that it takes for one to be compared with others, or to have the controls of two others."""
        return 3 if self.given else 2

    def units(self, extent: Extent, words: Sequence[str] = ()) -> list[Unit]:
        """The runs in the order of training: seed by seed, each after the one that it needs.

        words: of the command line, over all else; one that begins with a stage (`jova_stage2.train.steps=9`) holds for
        that stage alone. ConfigError: a word is settled by the table.
        """
        given = self._given(words)
        units: dict[str, Unit] = {}
        for seed in extent.seeds:
            for row in extent.rows:
                before, held = (None,), {}
                for stage, keys in self.shared.items():
                    own = {key: value for key, value in self.rows[row].items() if key in keys}
                    held |= own
                    name = ", ".join([stage, *(f"{key}={value}" for key, value in held.items()), f"seed {seed}"])
                    words_of_unit = self._words(stage, seed, extent, own, given)
                    units.setdefault(name, Unit(name, stage, seed, None, words_of_unit, *before))
                    before = (name,)
                own, label = (self.rows[row], row) if not self.given else ({}, None)
                name = f"{label or self.stage}, seed {seed}"
                words_of_unit = self._words(self.stage, seed, extent, own, given)
                units[name] = Unit(name, self.stage, seed, label, words_of_unit, *before, is_measured=True)
        return sorted(units.values(), key=lambda unit: (extent.seeds.index(unit.seed), unit.is_measured))

    def _given(self, words: Sequence[str]) -> dict[str, dict[str, str]]:
        """Stage -> key -> value of the words; those of one stage alone win."""
        read = read_words(words)
        for word, value in read.items():
            first, _, rest = word.partition(".")
            key = rest if first in self.stages else word
            if key in OF_UNITS:
                raise ConfigError(f"{word}={value}: is settled for every run of table={self.key}; leave it out")
            if holders := [row for row, own in self.rows.items() if key in own]:
                raise ConfigError(f"{word}={value}: is what the rows of table={self.key} differ in ({holders[0]}, …)")
        return words_by_stage(read, self.stages)

    def _words(
        self, stage: str, seed: int, extent: Extent, own: Mapping[str, str], given: Mapping[str, Mapping[str, str]]
    ) -> tuple[str, ...]:
        merged = {"recipe": stage, "seed": str(seed), **extent.words.get(stage, {}), **own, **given[stage]}
        return tuple(f"{key}={value}" for key, value in merged.items())


def table_paths(root: Path = RECIPES) -> dict[str, Path]:
    """Key of a table -> its yaml; `jova/tables/lambda.yaml` is `jova_lambda`."""
    return {f"{path.parents[1].name}_{path.stem}": path for path in sorted(root.glob("*/tables/*.yaml"))}


def load_table(key: str, root: Path = RECIPES) -> PaperTable:
    """The table of that key. ConfigError: there is none, or its file is not one, with the line's name."""
    paths = table_paths(root)
    if key not in paths:
        near = nearest(key, list(paths))
        hint = f"did you mean {near}?" if near else f"there are {', '.join(paths) or 'none'}"
        raise ConfigError(f"table={key}: no such table; {hint}")
    path = paths[key]
    source = str(path.relative_to(root.parent))
    return _Reading(read_yaml(path.read_text(encoding="utf-8"), source), source, recipe_keys(root)).table(key)


@dataclass(frozen=True)
class _Reading:
    """A table's yaml on its way to a PaperTable; every mistake is a ConfigError that names file and key."""

    values: Mapping[str, Any]
    source: str
    recipes: Sequence[str]

    def table(self, key: str) -> PaperTable:
        known = (
            "about", "paper", "shared", "stage", "rows", "given", "seeds", "clips", "words", "quick", "metrics",
            "published",
        )  # fmt: skip
        self._known(self.values, known, "")
        rows = {str(row): self._pairs(own, f"rows.{row}") for row, own in self._mapping("rows").items()}
        shared = {str(stage): tuple(keys or ()) for stage, keys in self._mapping("shared").items()}
        stage = str(self._needed("stage"))
        for name in (*shared, stage):
            if name not in self.recipes:
                self._refuse(name, "is no recipe")
        stages = (*shared, stage)
        full = Extent(tuple(rows), self._seeds(self._needed("seeds"), "seeds"), self._words(self.values, "", stages))
        quick = self._mapping("quick")
        self._known(quick, ("rows", "seeds", "words"), "quick.")
        quick_rows = tuple(map(str, quick.get("rows", rows)))
        if unknown := [row for row in quick_rows if row not in rows]:
            self._refuse("quick.rows", f"{unknown[0]} is not one of {', '.join(rows)}")
        quick_words = self._words(quick, "quick.", stages)
        merged = {name: {**full.words.get(name, {}), **quick_words.get(name, {})} for name in stages}
        published = tuple(
            self._published(str(name), values, rows) for name, values in self._mapping("published").items()
        )
        metrics = tuple(self._metric(str(name), values, published) for name, values in self._mapping("metrics").items())
        seeds = self._seeds(quick["seeds"], "quick.seeds") if "seeds" in quick else full.seeds
        return PaperTable(
            key=key,
            about=str(self._needed("about")),
            paper=str(self._needed("paper")),
            stage=stage,
            shared=shared,
            rows=rows,
            full=full,
            quick=Extent(quick_rows, seeds, merged),
            metrics=metrics,
            published=published,
            given=self._given(rows),
            clips=self._clips(),
        )

    def _given(self, rows: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
        """What clips of each row are sampled with; every row has such a list, or none has."""
        if "given" not in self.values:
            return {}
        given = self._mapping("given")
        self._known(given, tuple(rows), "given.")
        for row, own in rows.items():
            if not isinstance(given.get(row), list):
                self._refuse(f"given.{row}", "must be a list of controls, for example [reference_image]")
            if trained := [key for key in own if not key.startswith("sample.")]:
                self._refuse(f"rows.{row}.{trained[0]}", "rows with `given` differ in keys of `sample.` alone")
        return {str(row): tuple(map(str, given[row])) for row in rows}

    def _clips(self) -> int:
        clips = self.values.get("clips", NUM_CLIPS)
        if type(clips) is not int or clips < 3:
            self._refuse("clips", f"{clips!r} must be a whole number of at least 3")
        return clips

    def _metric(self, name: str, values: Any, published: Sequence[Published]) -> Metric:
        place = f"metrics.{name}"
        self._known(values, ("better", "beside", "about"), f"{place}.")
        beside = values.get("beside")
        if beside is not None and beside not in (names := [each.name for each in published]):
            self._refuse(f"{place}.beside", f"{beside} is not one of {', '.join(names)}")
        return Metric(name, self._direction(values, place), beside, str(values.get("about", "")))

    def _published(self, name: str, values: Any, rows: Mapping[str, Any]) -> Published:
        place = f"published.{name}"
        self._known(values, ("better", *rows), f"{place}.")
        numbers = {str(row): number for row, number in values.items() if row != "better"}
        for row, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number):
                self._refuse(f"{place}.{row}", f"{number!r} is no number")
        return Published(name, self._direction(values, place), {row: float(number) for row, number in numbers.items()})

    def _direction(self, values: Mapping[str, Any], place: str) -> str:
        if (better := values.get("better")) not in DIRECTIONS:
            self._refuse(f"{place}.better", f"{better!r} is not one of {', '.join(DIRECTIONS)}")
        return str(better)

    def _words(self, values: Mapping[str, Any], place: str, stages: Sequence[str]) -> dict[str, dict[str, str]]:
        given = values.get("words", {}) or {}
        self._known(given, stages, f"{place}words.")
        return {stage: self._pairs(own, f"{place}words.{stage}") for stage, own in given.items()}

    def _pairs(self, values: Any, place: str) -> dict[str, str]:
        if not isinstance(values, Mapping) or not all(isinstance(v, str | int | float | bool) for v in values.values()):
            self._refuse(place, "must be `key: value` pairs as one would type them, for example {train.steps: 100}")
        return {str(key): as_word(value) for key, value in values.items()}

    def _seeds(self, values: Any, place: str) -> tuple[int, ...]:
        if not isinstance(values, list) or not values or not all(type(each) is int and each >= 0 for each in values):
            self._refuse(place, "must be a list of whole numbers from 0 on")
        return tuple(dict.fromkeys(values))

    def _mapping(self, name: str) -> Mapping[str, Any]:
        values = self._needed(name)
        if not isinstance(values, Mapping):
            self._refuse(name, "must hold `name: …` lines")
        return values

    def _needed(self, name: str) -> Any:
        if name not in self.values:
            self._refuse(name, "is missing")
        return self.values[name]

    def _known(self, values: Any, known: Sequence[str], place: str) -> None:
        if not isinstance(values, Mapping):
            self._refuse(place.rstrip("."), "must hold `name: …` lines")
        if unknown := [str(name) for name in values if str(name) not in known]:
            self._refuse(f"{place}{unknown[0]}", f"is not one of {', '.join(known)}")

    def _refuse(self, name: str, reason: str) -> Any:
        raise ConfigError(f"{self.source}: {name}: {reason}")
