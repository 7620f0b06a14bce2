"""An evaluation as a table: each metric with its interval, the true clips' value and the paper's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from avlit.durable import write_atomically
from avlit.evaluation.published import PublishedNumber
from avlit.evaluation.readings import SAMPLED, TRUE, Readings
from avlit.metrics.estimate import Estimate, estimate
from avlit.metrics.metric import Meter, Metric, Tools

ARROWS = {"higher": " ↑", "lower": " ↓", "none": ""}
RESULTS, TABLE = "results.json", "table.md"

FOLDER = "evaluations"
"""In a run's folder, or under `runs_dir` for clips without a run."""

LOW, HIGH, CLIPS = "low", "high", "clips"
"""After a metric's name: the bounds of its interval, and of how many clips it is."""


@dataclass(frozen=True)
class Row:
    """A metric over the clips, the same over the true clips where they are known, and what the paper says of it."""

    metric: Metric
    found: Estimate
    true: Estimate | None
    published: tuple[PublishedNumber, ...]


@dataclass(frozen=True)
class Report:
    """rows: what was measured. idle: metrics that have nothing to measure in these clips. note: what was measured.

    place: what names begin with where they are logged, "" of clips without a run. made_with: the settings that decide
    a value besides the run.
    """

    rows: tuple[Row, ...]
    idle: tuple[str, ...]
    note: str
    place: str = ""
    made_with: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        metrics: Sequence[Metric],
        readings: Readings,
        *,
        ids: Mapping[str, Meter],
        count: int,
        published: Sequence[PublishedNumber],
        note: str,
        place: str = "",
        made_with: Mapping[str, str] | None = None,
    ) -> Report:
        """Metrics over the first `count` clips. ids: meters by their ids."""
        id_of = {meter.name: name for name, meter in ids.items()}
        rows, idle = [], []
        for metric in metrics:
            both = {
                whose: readings.of(metric, id_of[metric.meter.name], whose=whose, count=count)
                for whose in (SAMPLED, TRUE)
            }
            found, true = (
                estimate(values, metric.summary, is_resampled=metric.is_resampled) if values else None
                for values in both.values()
            )
            if found is None or not math.isfinite(found.value):
                idle.append(metric.name)
                continue
            if true is not None and not math.isfinite(true.value):
                true = None
            names = (metric.name, *metric.beside)
            rows.append(Row(metric, found, true, tuple(each for each in published if each.metric in names)))
        return cls(tuple(rows), tuple(idle), note, place, made_with or {})

    def values(self) -> dict[str, float]:
        """Metric as it is logged -> value, and its interval and count as NAME/low, NAME/high, NAME/clips."""
        values: dict[str, float] = {}
        for row in self.rows:
            name, found = logged_name(self.place, row.metric.name), row.found
            values |= {name: found.value, f"{name}/{CLIPS}": found.count}
            if found.low is not None and found.high is not None:
                values |= {f"{name}/{LOW}": found.low, f"{name}/{HIGH}": found.high}
        return values

    def write(self, folder: Path) -> list[Path]:
        """results.json and table.md, into the folder."""
        rows = [
            {
                "metric": row.metric.name,
                "better": row.metric.better,
                "unit": row.metric.unit,
                "source": row.metric.source,
                **asdict(row.found),
                "true": None if row.true is None else row.true.value,
                "published": [asdict(each) for each in row.published],
            }
            for row in self.rows
        ]
        results = {"note": self.note, "place": self.place, "made_with": dict(self.made_with), "rows": rows}
        write_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n")
        write_atomically(folder / TABLE, self.markdown())
        return [folder / RESULTS, folder / TABLE]

    def markdown(self) -> str:
        """The table as Markdown."""
        out = StringIO()
        Console(file=out, width=400, color_system=None).print(self.table(box.MARKDOWN))
        lines = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
        return "\n".join([*lines, "", self.note, ""])

    def table(self, style: box.Box = box.SIMPLE_HEAD) -> Table:
        """The table for a terminal."""
        has_true = any(row.true for row in self.rows)
        table = Table(box=style)
        table.add_column("metric")
        for head in ("value", "95 %", "clips", *(("true clips",) if has_true else ())):
            table.add_column(head, justify="right")
        table.add_column("what it is")
        if any(row.published for row in self.rows):
            table.add_column("paper")
        for row in self.rows:
            found, unit = row.found, f", {row.metric.unit}" if row.metric.unit else ""
            interval = "" if found.low is None else f"{_number(found.low)} to {_number(found.high)}"
            cells = [row.metric.name + ARROWS[row.metric.better], _number(found.value), interval, str(found.count)]
            cells += [_number(row.true.value if row.true else None)] if has_true else []
            cells += [row.metric.about + unit]
            if len(table.columns) > len(cells):
                cells.append("; ".join(_said(row.metric, each) for each in row.published))
            table.add_row(*cells)
        return table


def logged_name(place: str, name: str) -> str:
    """A metric's name among a run's metrics, in letters that MLflow takes."""
    return place + "".join(letter if letter.isalnum() or letter in "-_. /" else "_" for letter in name)


def _said(metric: Metric, number: PublishedNumber) -> str:
    """A paper's number; of what a stand-in stands beside, that too."""
    beside = "" if number.metric == metric.name else f"beside {number.metric} "
    return f"{beside}{_number(number.value)} ({number.source})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def listing(metrics: Sequence[Metric], tools: Tools) -> Table:
    """Every metric with direction, range, unit, source, and what it still needs here."""
    table = Table("metric", "range", "what it is", "source", "needs", box=box.SIMPLE_HEAD)
    for metric in metrics:
        low, high = (f"{bound:g}" for bound in (metric.low, metric.high))
        unit = f" {metric.unit}" if metric.unit else ""
        needs = "; ".join(metric.meter.lacks(tools)) or "nothing more"
        table.add_row(metric.name + ARROWS[metric.better], f"{low} to {high}{unit}", metric.about, metric.source, needs)
    return table
