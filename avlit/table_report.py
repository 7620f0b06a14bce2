"""What came out of a paper's table beside what the paper says: as text, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from avlit.durable import write_atomically
from avlit.paper_table import Metric, PaperTable, Published

ARROWS = {"higher": " ↑", "lower": " ↓", "none": ""}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Measured:
    """A metric of one row over its seeds. spread: standard deviation over seeds, None where there is one."""

    mean: float
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured | None:
        """Of the values that were measured, None of none."""
        values = [value for value in values if math.isfinite(value)]
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None

    def __str__(self) -> str:
        return f"{self.mean:.3f} (one seed)" if self.spread is None else f"{self.mean:.3f} ± {self.spread:.3f}"


@dataclass(frozen=True)
class TableReport:
    """rows: those that were trained. results: row -> metrics of each of its seeds. note: what was run, in words."""

    table: PaperTable
    rows: tuple[str, ...]
    results: Mapping[str, Mapping[int, Mapping[str, float]]]
    note: str

    def measured(self, row: str, metric: Metric) -> Measured | None:
        """A metric of a row over the seeds that have it."""
        runs = self.results.get(row, {}).values()
        return Measured.of([metrics[metric.name] for metrics in runs if metric.name in metrics])

    def best(self, metric: Metric | Published) -> str | None:
        """The row (or rows) where a metric is best, None where that is no question, or not known of two."""
        if isinstance(metric, Published):
            values = {row: metric.values[row] for row in self.rows if row in metric.values}
        else:
            found = {row: self.measured(row, metric) for row in self.rows}
            values = {row: each.mean for row, each in found.items() if each is not None}
        if metric.better == "none" or len(values) < 2:
            return None
        value = max(values.values()) if metric.better == "higher" else min(values.values())
        return " and ".join(row for row in values if values[row] == value)

    def markdown(self) -> str:
        """A line for each metric, measured here or published, and a column for each row of the paper's table."""
        table = self.table
        published = {each.name: each for each in table.published}
        beside = {metric.beside for metric in table.metrics}
        keys = dict.fromkeys(key for row in self.rows for key in table.rows[row])
        lines = [[" ".join(keys), *self.rows]]
        for metric in table.metrics:
            cells = [self.measured(row, metric) for row in self.rows]
            lines.append([metric.name + ARROWS[metric.better], *(str(each or NOT_MEASURED) for each in cells)])
            if metric.beside:
                lines.append(self._paper_line(published[metric.beside]))
        rest = [each for each in table.published if each.name not in beside]
        lines += [self._paper_line(each) for each in rest]
        texts = [f"# {table.about} ({table.paper})", "", self.note, "", *_aligned(lines), ""]
        texts += [f"- {metric.name}: {metric.about}" for metric in table.metrics if metric.about]
        if rest:
            texts.append(f"- {NOT_MEASURED} here: {', '.join(each.name for each in rest)}")
        texts += ["", *self._best_lines(published)]
        return "\n".join(texts).rstrip() + "\n"

    def _paper_line(self, metric: Published) -> list[str]:
        values = [metric.values.get(row) for row in self.rows]
        cells = ["not given" if value is None else f"{value:.2f}" for value in values]
        return [f"paper: {metric.name}{ARROWS[metric.better]}", *cells]

    def _best_lines(self, published: Mapping[str, Published]) -> list[str]:
        lines = []
        for metric in self.table.metrics:
            if metric.beside and (here := self.best(metric)) and (there := self.best(published[metric.beside])):
                lines.append(f"{metric.name} is best at {here}, the paper's {metric.beside} at {there}.")
        return lines

    def json(self) -> str:
        """All numbers: of each seed, their mean and spread, and the paper's."""
        summary: dict[str, dict[str, object]] = {}
        for row in self.rows:
            found = {metric.name: self.measured(row, metric) for metric in self.table.metrics}
            summary[row] = {
                name: None if each is None else {"mean": each.mean, "spread": each.spread, "seeds": each.count}
                for name, each in found.items()
            }
        values = {
            "table": self.table.key,
            "paper": self.table.paper,
            "note": self.note,
            "measured": summary,
            "seeds": {row: {str(seed): dict(m) for seed, m in seeds.items()} for row, seeds in self.results.items()},
            "published": {each.name: {"better": each.better, **each.values} for each in self.table.published},
        }
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    def plot(self, path: Path) -> None:
        """A PNG with a panel for each metric that was measured: seeds, mean and spread, the paper's values dashed."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        shown = [each for each in self.table.metrics if any(self.measured(row, each) for row in self.rows)]
        published = {each.name: each for each in self.table.published}
        columns = min(3, max(1, len(shown)))
        lines = max(1, -(-len(shown) // columns))
        figure = Figure(figsize=(4.2 * columns, 3 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"{self.table.about} ({self.table.paper})")
        for number, metric in enumerate(shown, 1):
            axes = figure.add_subplot(lines, columns, number)
            axes.set_title(metric.name + ARROWS[metric.better], fontsize=10)
            axes.set_xticks(range(len(self.rows)), self.rows)
            for place, row in enumerate(self.rows):
                each = self.measured(row, metric)
                if each is None:
                    continue
                values = [run[metric.name] for run in self.results[row].values() if metric.name in run]
                axes.plot([place] * len(values), values, ".", color="tab:gray")
                axes.errorbar(place, each.mean, yerr=each.spread or 0.0, fmt="o", color="tab:blue", capsize=4)
            if metric.beside:
                paper = published[metric.beside]
                places = [place for place, row in enumerate(self.rows) if row in paper.values]
                other = axes.twinx()
                other.plot(places, [paper.values[self.rows[p]] for p in places], "--x", color="tab:orange")
                other.set_ylabel(f"paper: {metric.beside}", color="tab:orange")
        part = path.with_name(f"{path.name}.part")
        figure.savefig(part, format="png", dpi=120)
        part.replace(path)

    def write(self, folder: Path) -> list[Path]:
        """table.md, table.json and table.png in `folder`."""
        paths = [folder / f"table.{kind}" for kind in ("md", "json", "png")]
        write_atomically(paths[0], self.markdown())
        write_atomically(paths[1], self.json())
        self.plot(paths[2])
        return paths


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells as a markdown table whose columns are as wide as their widest cell."""
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    texts = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [texts[0], rule, *texts[1:]]
