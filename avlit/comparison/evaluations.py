"""What `just evaluate` left in a run's folder: which way its metrics are better, and what they were measured with.

Read there and not from the registry of metrics: that imports torch, which takes longer than all else of a comparison.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from avlit.errors import UserError
from avlit.evaluation.report import FOLDER, RESULTS, logged_name
from avlit.runs import Run

if TYPE_CHECKING:
    from avlit.comparison.subject import Subject

Better = Literal["higher", "lower", "none"]
BETTER: tuple[Better, ...] = ("higher", "lower", "none")


@dataclass(frozen=True)
class Evaluated:
    """made_with: the settings that decide a value besides the run: clips, sampling steps, first frame."""

    better: Better
    made_with: Mapping[str, str]


def read_evaluations(run: Run) -> dict[str, Evaluated]:
    """A run's metrics as they are logged, `eval/NAME`, each of its newest evaluation.

    UserError: a file of results is damaged.
    """
    paths = sorted(run.path.glob(f"{FOLDER}/*/{RESULTS}"), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, Evaluated] = {}
    for path in paths:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            # Evaluations of earlier versions do not say these two.
            place, made_with = str(results.get("place", "eval/")), results.get("made_with", {})
            made_with = {str(key): str(value) for key, value in made_with.items()}
            for row in results["rows"]:
                better: Better = BETTER[BETTER.index(row["better"])]
                found[logged_name(place, row["metric"])] = Evaluated(better, made_with)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"run={run.id}: {path} cannot be read ({error!r}); the same `just evaluate` again writes it anew, "
                "or remove it"
            ) from error
    return found


def measured_otherwise(subjects: Sequence[Subject]) -> list[str]:
    """A line for each setting that is not the same in all evaluations of a metric."""
    metrics: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for each in subjects for name in each.evaluated):
        having = [each for each in subjects if name in each.evaluated]
        for key in dict.fromkeys(key for each in having for key in each.evaluated[name].made_with):
            letters: dict[str, list[str]] = {}
            for each in having:
                letters.setdefault(each.evaluated[name].made_with.get(key, "unknown"), []).append(each.letter)
            if len(letters) > 1:
                values = ", ".join(f"{value} in {' '.join(runs)}" for value, runs in letters.items())
                metrics.setdefault(f"{key}: {values}", []).append(name)
    return [f"Evaluated otherwise, {text} ({_listed(names)})." for text, names in metrics.items()]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
