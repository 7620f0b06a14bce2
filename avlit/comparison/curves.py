"""Curves for the page: thinned to what a screen can show, and packed so that many runs stay a small file.

A long curve is cut into spans of equal numbers of points, each kept as its mean, least and greatest value: nothing
that stands out is lost, and the mean is what smoothing starts from.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avlit.comparison.measures import is_of_interval
from avlit.comparison.subject import Subject
from avlit.tracking.history import Curve

MAX_POINTS, MIN_POINTS = 1000, 50
BUDGET = 550_000
"""Numbers on one page, four bytes each: under 3 MB as base64."""


@dataclass(frozen=True)
class Line:
    """One run's curve. steps, means, least, greatest: float32 [N] as base64; the last two "" where N is all points."""

    run: int
    steps: str
    means: str
    least: str
    greatest: str


@dataclass(frozen=True)
class Panel:
    """One metric of all runs that have it. group: `all`, `noise`, `subset`, `task` or `other`; part: what of the model
    or the loss; kind: `val` or `train`.
    """

    metric: str
    title: str
    part: str
    kind: str
    group: str
    lines: tuple[Line, ...]


def find_panels(subjects: Sequence[Subject]) -> list[Panel]:
    """All curves of all runs, thinned so that together they keep to the budget."""
    names = list(dict.fromkeys(name for each in subjects for name in each.curves))
    names = [name for name in names if not (name.startswith("data/") or is_of_interval(name))]
    lengths = sorted(len(each.curves[name].steps) for each in subjects for name in names if name in each.curves)
    num_points = points_within(BUDGET, lengths)
    return [
        Panel(
            metric=name,
            **described(name),
            lines=tuple(
                thinned(index, curve, num_points)
                for index, each in enumerate(subjects)
                if (curve := each.curves.get(name)) is not None
            ),
        )
        for name in names
    ]


def points_within(budget: int, lengths: Sequence[int]) -> int:
    """How many points a curve may have so that all keep to a budget of numbers; a thinned point is four of them."""
    for num_points in (MAX_POINTS, 700, 500, 350, 250, 180, 120, 80, MIN_POINTS):
        if sum(2 * length if length <= num_points else 4 * num_points for length in lengths) <= budget:
            return num_points
    return MIN_POINTS


def described(name: str) -> dict[str, str]:
    """A metric's title, part, kind and group from its name, such as `train/loss/video/noise/0`."""
    kind, *rest = name.split("/")
    group = next((each for each in ("noise", "subset", "task") if each in rest[:-1]), None)
    if kind not in ("train", "val"):
        return {"title": name, "part": kind, "kind": kind, "group": "other"}
    if group is None:
        is_loss = rest[0] == "loss"
        title = "/".join(rest[1:] if is_loss else rest)
        return {"title": title, "part": title, "kind": kind, "group": "all" if is_loss else "other"}
    place = rest.index(group)
    part = "/".join(rest[1:place] if rest[0] == "loss" else rest[:place])
    label = "/".join(rest[place + 1 :])
    title = noise_label(label) if group == "noise" else label
    return {"title": title, "part": part, "kind": kind, "group": group if rest[0] == "loss" else "other"}


def noise_label(number: str) -> str:
    """The quarter of noise levels that a metric's number means (`callbacks/training_log.py`)."""
    return (
        f"noise {int(number) * 25}–{int(number) * 25 + 25} %" if number in ("0", "1", "2", "3") else f"noise {number}"
    )


def thinned(run: int, curve: Curve, num_points: int) -> Line:
    """A curve with at most so many points."""
    steps, values = curve.steps.astype(np.float64), curve.values
    if len(steps) <= num_points:
        return Line(run, packed(steps), packed(values), "", "")
    starts = np.linspace(0, len(steps), num_points + 1).astype(int)[:-1]
    counts = np.diff(np.append(starts, len(steps)))
    is_finite = np.isfinite(values)
    finite = np.add.reduceat(is_finite.astype(np.float64), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.add.reduceat(np.where(is_finite, values, 0.0), starts) / finite  # NaN where none is finite
    return Line(
        run,
        packed(np.add.reduceat(steps, starts) / counts),
        packed(means),
        packed(np.fmin.reduceat(np.where(is_finite, values, np.nan), starts)),
        packed(np.fmax.reduceat(np.where(is_finite, values, np.nan), starts)),
    )


def packed(values: np.ndarray) -> str:
    """Little-endian float32 as base64."""
    return b64encode(values.astype("<f4").tobytes()).decode()
