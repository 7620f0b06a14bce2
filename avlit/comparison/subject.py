"""One of the compared runs: what its folder says about what it is made from, how far it is, and what it has logged."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from string import ascii_uppercase
from typing import Any

import yaml

from avlit.comparison.evaluations import Evaluated, read_evaluations
from avlit.errors import UserError
from avlit.provenance import Provenance
from avlit.runs import Run, RunRecord
from avlit.settings import flatten
from avlit.tracking.history import Curve, History, read_history

SILENT_S = 300.0
"""A run that logged nothing for so long, or for ten of its usual intervals, has probably been killed."""


@dataclass(frozen=True)
class Subject:
    """letter: its name on the page. config: by dotted key. provenance: None of a run killed before it was written.

    history: None of a run that was never tracked. measured: last metrics that are in files and in no curve. evaluated:
    by metric, what is known of those of `just evaluate`.
    now_s: when it was read, as Unix time.
    """

    letter: str
    run: Run
    record: RunRecord
    config: Mapping[str, Any]
    provenance: Provenance | None
    history: History | None
    measured: Mapping[str, float]
    evaluated: Mapping[str, Evaluated]
    now_s: float

    @property
    def name(self) -> str:
        """As on MLflow's page."""
        return self.history.session.name if self.history else f"{self.run.recipe}-{self.run.id[-4:]}"

    @property
    def curves(self) -> Mapping[str, Curve]:
        return self.history.curves if self.history else {}

    @property
    def seed(self) -> int:
        return int(self.config.get("seed") or 0)

    @property
    def last_step(self) -> int:
        """The last step that something was logged at."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)

    @property
    def is_finished(self) -> bool:
        return self.record.status == "finished"

    @property
    def steps(self) -> str:
        """`800` or `340 of 800`."""
        total = self.config.get("train.steps")
        return str(self.last_step) if self.is_finished or total is None else f"{self.last_step} of {total}"

    @property
    def state(self) -> str:
        """Its status in words; of a run that says it is running also when it was last heard of."""
        if self.record.status != "running":
            return self.record.status
        if self.history is None or self.history.logged_ms is None:
            return "running, has logged nothing yet"
        silent_s = max(0.0, self.now_s - self.history.logged_ms / 1000)
        if silent_s <= max(SILENT_S, 10 * self._interval_s()):
            return f"running, last heard of {in_words(silent_s)} ago"
        return f"silent for {in_words(silent_s)}: killed? `just resume run={self.run.id}` goes on"

    def _interval_s(self) -> float:
        rates = self.curves.get("throughput/samples_per_s")
        batch, every = self.config.get("data.batch_size"), self.config.get("train.log_every")
        if rates is None or not batch or not every:
            return 0.0
        return batch * every / max(1e-6, median(rates.values.tolist()))


def read_subject(run: Run, number: int) -> Subject:
    """The run's folder as it is now; number: its place among the compared. UserError: config.yaml cannot be read."""
    return Subject(
        letter=letter_of(number),
        run=run,
        record=run.record(),
        config=config_of(run),
        provenance=Provenance.read(run.provenance_path, is_damage_allowed=True),
        history=read_history(run),
        measured=_measured(run),
        evaluated=read_evaluations(run),
        now_s=time.time(),
    )


def config_of(run: Run) -> dict[str, Any]:
    """A run's config by dotted key, as it stands in its folder: a recipe of then may have keys that are no more.

    UserError: it cannot be read.
    """
    try:
        return flatten(yaml.safe_load(run.read_config()))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"run={run.id}: {run.config_path} cannot be read ({error}); put it back, or leave it out"
        ) from error


def letter_of(number: int) -> str:
    """A, B, … of the compared runs."""
    return ascii_uppercase[number]


def _measured(run: Run) -> dict[str, float]:
    """The last metrics of a finished run, and what `just reproduce` measured on it."""
    paths = [run.metrics_path]
    if run.parent:
        paths += sorted((run.path.parent / run.parent / "measured").glob(f"{run.id}-*.json"))
    found: dict[str, float] = {}
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found |= {str(name): float(value) for name, value in values.items()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"run={run.id}: {path} cannot be read ({error}); remove it to compare without it"
            ) from error
    return found


def in_words(seconds: float) -> str:
    """`12 s`, `5 min`, `3 h`, `2 days`."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
