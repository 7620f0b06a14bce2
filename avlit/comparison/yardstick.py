"""The reference curves of the compared runs' recipe, which are drawn behind their held-out curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from avlit.comparison.curves import Line, packed
from avlit.comparison.differences import SAME_MEASURE
from avlit.comparison.subject import Subject
from avlit.discovery import RECIPES, recipe_keys
from avlit.reference import Reference, ReferenceCurve, Standing, standing

REFERENCE = -1
"""In place of a run's number, of a line that is of no run."""


@dataclass(frozen=True)
class Yardstick:
    """A reference that is measured as all compared runs are. notes: what which runs have otherwise, in words."""

    reference: Reference
    recipe: str
    notes: tuple[str, ...]

    def line(self, metric: str) -> Line | None:
        """Mean, and where LIKELY runs of other seeds are, as a line of a panel; None of a metric that it has not."""
        curve = self.reference.curves.get(metric)
        return None if curve is None else _line(curve, self.reference.within)


def find_yardstick(subjects: Sequence[Subject], root: Path = RECIPES) -> Yardstick | None:
    """The reference of the one recipe that all runs are of; None where there is none, or it is measured otherwise.

    UserError: the file of references is damaged.
    """
    recipes = {each.run.recipe for each in subjects}
    if len(recipes) > 1 or not recipes <= set(recipe_keys(root)):
        return None
    stands = [standing(each.run, root) for each in subjects]
    if not all(each and _is_measured_alike(each) for each in stands):
        return None
    known = [each for each in stands if each]
    letters: dict[str, list[str]] = {}
    for subject, each in zip(subjects, known, strict=True):
        letters.setdefault(", ".join(each.other) or "of its settings", []).append(subject.letter)
    notes = [f"{' '.join(runs)}: {text}" for text, runs in letters.items()]
    return Yardstick(known[0].reference, known[0].recipe, tuple(notes))


def _is_measured_alike(stands: Standing) -> bool:
    keys = [text.partition("=")[0] for text in stands.other]
    return not any(fnmatch(key, pattern) for key in keys for pattern in (*SAME_MEASURE, "data.root"))


def _line(curve: ReferenceCurve, within: float) -> Line:
    steps, means = np.array(curve.steps, np.float64), np.array(curve.mean)
    if not curve.spread:
        return Line(REFERENCE, packed(steps), packed(means), "", "")
    reach = within * np.array(curve.spread)
    return Line(REFERENCE, packed(steps), packed(means), packed(means - reach), packed(means + reach))
