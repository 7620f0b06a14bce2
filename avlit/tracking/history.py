"""What a run has told MLflow, read back from its own spool: it is complete whatever became of the store.

The same rule decides as in sending which points count: a resume repeats steps, and the first of equal steps is kept,
unless the run was changed there (`redone_from`) or another process measured it anew.
"""

import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from avlit.runs import Run
from avlit.tracking.spool import POINTS, Session, is_record, read_records


@dataclass(frozen=True)
class Curve:
    """One metric of one run. steps: int64 [N], ascending; values: float64 [N], NaN and infinity where they were."""

    steps: np.ndarray
    values: np.ndarray

    def at(self, step: float) -> tuple[int, float] | None:
        """The last point not after `step`, None where there is none."""
        place = int(np.searchsorted(self.steps, step, side="right"))
        return (int(self.steps[place - 1]), float(self.values[place - 1])) if place else None


@dataclass(frozen=True)
class History:
    """All that a run has logged.

    session: the first of its sessions. resumed_at: for each resume the first step logged after it. logged_ms: when the
    last point was logged, as Unix time. num_unreadable: lines that are no records, of a damaged disk or a full one.
    """

    session: Session
    curves: Mapping[str, Curve]
    tags: Mapping[str, str] = field(default_factory=dict)
    resumed_at: tuple[int, ...] = ()
    logged_ms: int | None = None
    num_unreadable: int = 0


def read_session(run: Run) -> Session | None:
    """How a run was tracked last: its name, store and experiment; None of a run that never was."""
    session = None
    for record in _lines(run.spool_dir / POINTS, b'{"open"'):
        session = Session(**record["open"])
    return session


def read_end(run: Run) -> int | None:
    """When a run's last session ended, as Unix time in ms; None where it was killed, or is not over."""
    end = None
    for record in _lines(run.spool_dir / POINTS, b'{"open"', b'{"end"'):
        end = record.get("t")
    return end


def read_tags(run: Run) -> dict[str, str]:
    """The tags that a run has set itself; what somebody wrote on MLflow's page is not among them."""
    tags: dict[str, str] = {}
    for record in _lines(run.spool_dir / POINTS, b'{"tags"'):
        tags |= record["tags"]
    return tags


def read_history(run: Run) -> History | None:
    """All that a run has logged so far; None of a run that was never tracked."""
    reader, offset = _Reader(), 0
    while True:
        records, end = read_records(run.spool_dir / POINTS, offset)
        if end == offset:
            break
        for record, problem in records:
            if problem:
                reader.num_unreadable += 1
            else:
                reader.take(record)
        offset = end
    return reader.history()


class _Reader:
    """Puts a spool's records together, in their order."""

    def __init__(self) -> None:
        self.first: Session | None = None
        self.is_repeating = self.is_new_session = False
        self.points: dict[str, tuple[array[int], array[float]]] = {}
        self.tags: dict[str, str] = {}
        self.resumed_at: list[int] = []
        self.logged_ms: int | None = None
        self.num_unreadable = 0

    def take(self, record: dict) -> None:
        if "m" in record:
            self._add(record["s"], record["m"])
            self.logged_ms = record["t"]
        elif "tags" in record:
            self.tags |= record["tags"]
        elif "open" in record:
            session = Session(**record["open"])
            self.first = self.first or session
            self.is_repeating = self.is_new_session = session.is_resumed
            if session.redone_from is not None:
                self._forget_after(session.redone_from)

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.is_new_session:
            self.is_new_session = False
            self.resumed_at.append(step)
        for name, value in metrics.items():
            if (pair := self.points.get(name)) is None:
                pair = self.points[name] = (array("q"), array("d"))
            steps, values = pair
            if not steps or step > steps[-1]:
                steps.append(step)
                values.append(value)
            elif not self.is_repeating:
                place = bisect_left(steps, step)
                if steps[place] == step:
                    values[place] = value
                else:
                    steps.insert(place, step)
                    values.insert(place, value)

    def _forget_after(self, step: int) -> None:
        for steps, values in self.points.values():
            kept = bisect_right(steps, step)
            del steps[kept:], values[kept:]

    def history(self) -> History | None:
        if self.first is None:
            return None
        curves = {
            name: Curve(np.array(steps, np.int64), np.array(values, np.float64))
            for name, (steps, values) in self.points.items()
            if steps
        }
        return History(self.first, curves, self.tags, tuple(self.resumed_at), self.logged_ms, self.num_unreadable)


def _lines(path: Path, *beginnings: bytes) -> Iterator[dict]:
    """The records whose line begins in one of these ways, without parsing the others."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(beginnings) and line.endswith(b"\n"):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and is_record(record):
                    yield record
