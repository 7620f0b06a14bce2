"""The comparison as tables, for the terminal and, in Markdown, for MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from avlit.comparison.comparison import Comparison
from avlit.comparison.differences import Difference
from avlit.comparison.measures import ARROWS

WIDE = 400
MAX_ROWS = 12
"""Lines of one table on the terminal; the page has all."""


def print_tables(comparison: Comparison, console: Console) -> None:
    """What differs, what came out, and what that means."""
    for title, table in _tables(comparison, box.SIMPLE_HEAD, most=MAX_ROWS):
        console.print(Text(f"\n{title}", style="bold"))
        console.print(table)
    console.print()
    for line in conclusions(comparison):
        console.print(Text(line), soft_wrap=True)


def markdown(comparison: Comparison) -> str:
    """The same as Markdown."""
    texts = []
    for title, table in _tables(comparison, box.MARKDOWN, most=None):
        out = StringIO()
        Console(file=out, width=WIDE, color_system=None).print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
        texts += [f"## {title}", "", *lines, ""]
    return "\n".join([*texts, *(f"- {line}" for line in conclusions(comparison))]) + "\n"


def conclusions(comparison: Comparison) -> list[str]:
    """What to know first, then what is better."""
    return [*comparison.cautions, *(f"{text}." for text, _ in comparison.verdicts)]


def _tables(comparison: Comparison, style: box.Box, *, most: int | None) -> list[tuple[str, Table]]:
    letters = [each.letter for each in comparison.subjects]
    runs = Table("", "name", "recipe", "seed", "steps", "state", "id", box=style)
    for each in comparison.subjects:
        known = (each.name, each.run.recipe, str(each.seed), each.steps, each.state, each.run.id)
        runs.add_row(each.letter, *map(_text, known))
    found = [("Runs", runs)]
    differences = comparison.differences
    for title, rows in (
        ("Config", differences.config),
        ("Code", differences.code),
        ("Libraries", differences.libraries),
        ("Data", differences.data),
    ):
        if rows:
            found.append((f"{title}: what differs", _difference_table(rows, letters, style, most=most)))
    between = "\n" if most else " "  # a cell of Markdown is one line
    heads = [f"{each.letters}{between}{each.about}" for each in comparison.variants]
    metrics = Table("metric", box=style)
    for head in heads:
        metrics.add_column(_text(head))
    for row in comparison.main_rows:
        cells = [Text(str(cell), style="bold" if n == row.best else "") for n, cell in enumerate(row.cells)]
        if style is box.MARKDOWN and row.best is not None:
            cells[row.best] = Text(f"**{cells[row.best]}**")
        for cell, text in zip(row.cells, cells, strict=True):
            for interval in cell.intervals:
                text.append(f"{chr(10) if most else ' · '}{interval}", style="dim not bold")
        metrics.add_row(_text(row.name + ARROWS[row.better]), *cells)
    if comparison.main_rows:
        title = "Metrics, mean ± standard deviation over seeds" if has_seeds(comparison) else "Metrics"
        if any(cell.intervals for row in comparison.main_rows for cell in row.cells):
            title += "; … to …: 95 % of a run over its clips, other seeds aside"
        found.append((title, metrics))
    return found


def has_seeds(comparison: Comparison) -> bool:
    """Whether any setting was trained with several seeds."""
    return any(len(each.subjects) > 1 for each in comparison.variants)


def _difference_table(rows: Sequence[Difference], letters: Sequence[str], style: box.Box, *, most: int | None) -> Table:
    table = Table("", *letters, box=style)
    for row in rows[:most]:
        table.add_row(_text(row.name), *(_text(value) for value in row.values))
    if most and len(rows) > most:
        table.add_row(_text(f"and {len(rows) - most} more: see the page"), *[""] * len(letters))
    return table


def _text(words: str) -> Text:
    """Text as it is: what stands in a run's folder is no markup."""
    return Text("".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in words))
