"""What came out: each metric of each setting with its spread over seeds, and which setting is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev
from typing import cast

import numpy as np

from avlit.comparison.differences import Differences, setting_of
from avlit.comparison.evaluations import Better
from avlit.comparison.subject import Subject
from avlit.evaluation.report import CLIPS, HIGH, LOW
from avlit.paper_table import load_table, table_paths
from avlit.tracking.history import Curve

ARROWS: dict[Better, str] = {"higher": " ↑", "lower": " ↓", "none": ""}
CLEAR = 2.0
"""A difference of more than so many standard deviations over seeds (of the two settings pooled) is called clear."""
TAIL = 0.1
"""Training losses are means over this last part of the steps: single log points are noise."""


@dataclass(frozen=True)
class Variant:
    """Runs of one setting that differ in the seed. number: its place and colour on the page."""

    number: int
    subjects: tuple[Subject, ...]
    about: str

    @property
    def letters(self) -> str:
        return " ".join(each.letter for each in self.subjects)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(each.seed for each in self.subjects)


@dataclass(frozen=True)
class Value:
    """A metric of one run. step: where it was measured, None where only the last value is kept.

    interval: its 95 % interval by bootstrap over clips, as `just evaluate` found it; None of other metrics.
    """

    letter: str
    seed: int
    value: float
    step: int | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Cell:
    """A metric of one variant; values: of the runs that have it."""

    values: tuple[Value, ...]

    @property
    def finite(self) -> list[float]:
        return [each.value for each in self.values if math.isfinite(each.value)]

    @property
    def mean(self) -> float:
        return mean(self.finite) if self.finite else math.nan

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, None of fewer than two."""
        return stdev(self.finite) if len(self.finite) > 1 else None

    @property
    def intervals(self) -> list[str]:
        """The interval over clips of each run that has one, in words; with its letter where it is one of several."""
        known = [(each.letter, each.interval) for each in self.values if each.interval]
        texts = [f"{number(low, digits=3)} to {number(high, digits=3)}" for _, (low, high) in known]
        if len(self.values) == 1:
            return texts
        return [f"{letter}: {text}" for (letter, _), text in zip(known, texts, strict=True)]

    def __str__(self) -> str:
        if not self.values:
            return "not measured"
        if not self.finite:
            return "not finite"
        return number(self.mean) + ("" if self.spread is None else f" ± {number(self.spread, digits=2)}")


@dataclass(frozen=True)
class Row:
    """A metric over all variants. best: number of the best variant, None where that is no question."""

    name: str
    better: Better
    cells: tuple[Cell, ...]
    best: int | None

    @property
    def is_main(self) -> bool:
        """Not of one noise level, subset or task alone."""
        return self.group == ""

    @property
    def group(self) -> str:
        """`noise`, `subset`, `task`, or "" for the whole."""
        parts = self.name.split("/")
        return next((part for part in ("noise", "subset", "task") if part in parts[1:-1]), "")

    @property
    def steps(self) -> tuple[int, ...]:
        """Where its values were measured."""
        found = {each.step for cell in self.cells for each in cell.values if each.step is not None}
        return tuple(sorted(found))


def find_variants(subjects: Sequence[Subject], differences: Differences) -> tuple[Variant, ...]:
    """The settings that were trained, in the order of the runs."""
    groups: dict[str, list[int]] = {}
    known: dict[str, str] = {}
    for index, subject in enumerate(subjects):
        key = setting_of(subject, known)
        taken = {subjects[i].seed for i in groups.get(key, [])}
        # The same setting and seed again is a run of its own: it shows what one seed varies by.
        groups.setdefault(f"{key}#{index}" if subject.seed in taken else key, []).append(index)
    if len(groups) == 1:
        return (Variant(0, tuple(subjects), "one setting"),)
    return tuple(
        Variant(place, tuple(subjects[i] for i in members), _about(members[0], subjects, differences))
        for place, members in enumerate(groups.values())
    )


def _about(index: int, subjects: Sequence[Subject], differences: Differences) -> str:
    """The keys in which a run differs from the others of its recipe, with its values; its name where in none."""
    recipe = subjects[index].run.recipe
    same = [place for place, each in enumerate(subjects) if each.run.recipe == recipe]
    words = [] if len(same) == len(subjects) else [recipe]
    telling = [row for row in differences.config if len({row.values[place] for place in same}) > 1]
    words += [f"{row.name}={row.values[index]}" for row in telling if row.name != "seed"]
    return ", ".join(words[:3]) + (", …" if len(words) > 3 else "") if words else subjects[index].name


def measure(subjects: Sequence[Subject], variants: Sequence[Variant], *, judges_losses: bool) -> tuple[Row, ...]:
    """A row for each metric: held-out ones at the last step that all compared runs have reached, training ones as means
    over the last tenth of the steps up to there, main ones first.

    judges_losses: False where the values of losses cannot be compared; no best is then named for them.
    """
    rows: list[Row] = []
    evaluated: dict[str, Better] = {name: known.better for each in subjects for name, known in each.evaluated.items()}
    for name in _names(subjects):
        limit = common_step(subjects, name)
        cells = tuple(
            Cell(tuple(value for each in variant.subjects if (value := value_of(each, name, limit))))
            for variant in variants
        )
        better = evaluated.get(name, better_of(name))
        is_judged = better != "none" and (judges_losses or "/loss/" not in name)
        rows.append(Row(name, better, cells, _best(cells, better) if is_judged else None))
    return tuple(sorted(rows, key=lambda row: (not row.is_main, not row.name.startswith("val/"), "/loss/" in row.name)))


def common_step(subjects: Sequence[Subject], name: str) -> float:
    """Up to where a metric is compared: a run that is not finished has to be met where it is."""
    unfinished = [each for each in subjects if not each.is_finished and name in each.curves]
    return min((float(each.curves[name].steps[-1]) for each in unfinished), default=math.inf)


def value_of(subject: Subject, name: str, limit: float = math.inf) -> Value | None:
    """A metric of a run, not after the step `limit`; None where it was not measured by then."""
    curve = subject.curves.get(name)
    if curve is None:
        value = subject.measured.get(name)
        return None if value is None else Value(subject.letter, subject.seed, value, None)
    if name.startswith(("val/", EVALUATED)):
        point = curve.at(limit)
        if point is None:
            return None
        return Value(subject.letter, subject.seed, point[1], point[0], _interval(subject, name, point[0]))
    return _mean_of_tail(subject, curve, limit)


def _interval(subject: Subject, name: str, step: int) -> tuple[float, float] | None:
    """Of a metric as it was measured at a step."""
    bounds = [curve.at(step) for end in (LOW, HIGH) if (curve := subject.curves.get(f"{name}/{end}"))]
    values = [value for at, value in filter(None, bounds) if at == step]
    return (values[0], values[1]) if len(values) == 2 else None


def _mean_of_tail(subject: Subject, curve: Curve, limit: float) -> Value | None:
    until = curve.steps <= limit
    if not until.any():
        return None
    last = int(curve.steps[until][-1])
    values = curve.values[until & (curve.steps > last * (1 - TAIL))]
    finite = values[np.isfinite(values)]
    return Value(subject.letter, subject.seed, float(finite.mean()) if len(finite) else math.nan, last)


def better_of(name: str) -> Better:
    """Which way a metric is better that no evaluation says it of: a loss lower, others as the papers' tables say."""
    if "/loss/" in name:
        return "lower"
    metric = name.rpartition("/")[2] if name.startswith(EVALUATED) else name.removeprefix("val/")
    return directions().get(metric, "none")


@cache
def directions() -> dict[str, Better]:
    """Metric -> which way is better, of all metrics in the tables under `recipes/`."""
    return {metric.name: cast(Better, metric.better) for key in table_paths() for metric in load_table(key).metrics}


def _names(subjects: Sequence[Subject]) -> list[str]:
    """The metrics that say how good a run is, of any run."""
    names = dict.fromkeys(name for each in subjects for name in (*each.measured, *each.curves))
    return [
        name
        for name in names
        if not name.startswith(("data/", "throughput/")) and name not in NOT_RESULTS and not is_of_interval(name)
    ]


EVALUATED = "eval/"
"""What the names of metrics of `just evaluate` begin with."""


def is_of_interval(name: str) -> bool:
    """Whether it is a bound of another metric's interval or its number of clips, and no metric of its own."""
    return name.startswith(EVALUATED) and name.rpartition("/")[2] in (LOW, HIGH, CLIPS)


NOT_RESULTS = ("train/lr", "train/skipped_updates", "train/grad_norm")
"""Metrics that are curves to watch, not results."""


def _best(cells: Sequence[Cell], better: Better) -> int | None:
    means = {index: cell.mean for index, cell in enumerate(cells) if cell.finite}
    if len(means) < 2 or len(set(means.values())) < 2:
        return None
    return max(means, key=means.__getitem__) if better == "higher" else min(means, key=means.__getitem__)


def verdict(row: Row, variants: Sequence[Variant]) -> tuple[str, bool] | None:
    """In words which variant is best and than which others clearly so, and whether it is than all; None: not judged."""
    if row.best is None:
        return None
    best = row.cells[row.best]
    groups: dict[str, list[str]] = {"clearly better than": [], "not clearly better than": [], "chance unknown": []}
    for index, cell in enumerate(row.cells):
        if index == row.best or not cell.finite:
            continue
        about = f"{variants[index].about} ({cell}{_agreement(best, cell, row.better)}{_overlap(best, cell)})"
        if best.spread is None or cell.spread is None:
            groups["chance unknown"].append(about)
        else:
            spread = math.sqrt((best.spread**2 + cell.spread**2) / 2)
            is_clear = abs(best.mean - cell.mean) > CLEAR * spread
            groups["clearly better than" if is_clear else "not clearly better than"].append(about)
    unknown = groups.pop("chance unknown")
    parts = [f"{words} {', '.join(group)}" for words, group in groups.items() if group]
    if unknown:
        parts.append(f"better than {', '.join(unknown)}, with one seed: how much of that is chance is not known")
    is_clear = not unknown and not groups["not clearly better than"]
    return f"{row.name}: {variants[row.best].about} is best ({best}); {'; '.join(parts)}", is_clear


def _agreement(best: Cell, other: Cell, better: Better) -> str:
    """With how many of several shared seeds the better variant is better."""
    first, second = ({each.seed: each.value for each in cell.values} for cell in (best, other))
    shared = sorted(first.keys() & second.keys())
    if len(shared) < 2:
        return ""
    won = sum((first[seed] > second[seed]) == (better == "higher") for seed in shared)
    return f", with {won} of {len(shared)} seeds"


def _overlap(best: Cell, other: Cell) -> str:
    """Of two single runs, whether their intervals over clips have values in common."""
    if len(best.values) != 1 or len(other.values) != 1:
        return ""
    first, second = best.values[0].interval, other.values[0].interval
    if first is None or second is None:
        return ""
    does = first[0] <= second[1] and second[0] <= first[1]
    return f", intervals over clips {'overlap' if does else 'do not overlap'}"


def number(value: float, *, digits: int = 4) -> str:
    """So many significant digits, without an exponent where it reads well."""
    if not math.isfinite(value) or value == 0 or abs(value) >= 10**digits:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.1e}"
