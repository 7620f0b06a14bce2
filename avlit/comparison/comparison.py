"""Everything that is known of some runs side by side: what the table and the page are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avlit.comparison.clips import ClipRow, find_clips
from avlit.comparison.curves import Panel, find_panels
from avlit.comparison.differences import Difference, Differences, find_differences
from avlit.comparison.evaluations import measured_otherwise
from avlit.comparison.lineage import Stage, find_lineage
from avlit.comparison.measures import Row, Variant, find_variants, measure, verdict
from avlit.comparison.subject import Subject, read_subject
from avlit.comparison.yardstick import Yardstick, find_yardstick
from avlit.runs import Run

MOST_KEYS = 8
"""Differing keys that are named at the top."""


@dataclass(frozen=True)
class Comparison:
    """See the modules of its parts."""

    subjects: tuple[Subject, ...]
    differences: Differences
    variants: tuple[Variant, ...]
    rows: tuple[Row, ...]
    panels: tuple[Panel, ...]
    clips: tuple[ClipRow, ...]
    lineage: tuple[Stage, ...]
    yardstick: Yardstick | None = None

    @property
    def main_rows(self) -> list[Row]:
        """Held-out and measured metrics of the whole: what a decision is made from."""
        return [row for row in self.rows if row.is_main and not row.name.startswith("train/")]

    @property
    def other_rows(self) -> list[Row]:
        """Training's own metrics, and those of one noise level, subset or task."""
        shown = {row.name for row in self.main_rows}
        return [row for row in self.rows if row.name not in shown]

    @property
    def verdicts(self) -> list[tuple[str, bool]]:
        """In words which variant is better, main metrics only, and whether that is clear."""
        found = (verdict(row, self.variants) for row in self.main_rows)
        return [each for each in found if each is not None]

    @property
    def changed(self) -> list[str]:
        """What the runs differ in, in a line each."""
        differences = self.differences
        lines = [f"{row.name}: {self._who_has_what(row)}." for row in differences.config[:MOST_KEYS]]
        if len(differences.config) > MOST_KEYS:
            lines.append(f"{len(differences.config) - MOST_KEYS} more keys of the config differ.")
        if not lines:
            lines = ["Config: the same in all runs."]
        parts = (("Code", differences.code), ("Libraries", differences.libraries), ("Data", differences.data))
        for what, rows in parts:
            many = f"{len(rows)} of its {'files' if what == 'Code' else 'properties'}" if len(rows) > 3 else ""
            lines.append(f"{what}: {many or ', '.join(row.name for row in rows) or 'the same in all runs'}.")
        if differences.unknown:
            lines.append(
                f"Of {', '.join(differences.unknown)} it is not known what they were made from: stopped before the "
                "first step, or their provenance.json is gone or damaged."
            )
        return lines

    def _who_has_what(self, row: Difference) -> str:
        having: dict[str, list[str]] = {}
        for each, value in zip(self.subjects, row.values, strict=True):
            having.setdefault(value, []).append(each.letter)
        return ", ".join(f"{value} in {' '.join(letters)}" for value, letters in having.items())

    @property
    def cautions(self) -> list[str]:
        """What to know before values are compared."""
        reasons = self.differences.cautions
        lines = [" ".join([*reasons, "Losses are shown, and none is called better."])] if reasons else []
        if len(self.variants) == 1:
            lines.append(
                "All runs are one setting with other seeds: there is nothing to choose, but the spread to see."
            )
        for each in self.subjects:
            if each.history is None or not each.curves:
                lines.append(f"{each.letter} ({each.run.id}) has logged nothing: it has no curves and no metrics.")
            elif not each.is_finished:
                lines.append(
                    f"{each.letter} is {each.state}, at step {each.steps}: all runs are compared at the last step that "
                    "it has reached."
                )
            if each.history and each.history.num_unreadable:
                lines.append(
                    f"{each.letter}: {each.history.num_unreadable} lines of its spool cannot be read and are left out."
                )
        return [*lines, *measured_otherwise(self.subjects)]


def compare(runs: Sequence[Run], *, media: Path, num_clips: int) -> Comparison:
    """Read the runs, and copy their clips into `media`."""
    subjects = tuple(read_subject(run, number) for number, run in enumerate(runs))
    differences = find_differences(subjects)
    variants = find_variants(subjects, differences)
    return Comparison(
        subjects=subjects,
        differences=differences,
        variants=variants,
        rows=measure(subjects, variants, judges_losses=not differences.cautions),
        panels=tuple(find_panels(subjects)),
        clips=tuple(find_clips(subjects, media, count=num_clips)),
        lineage=tuple(find_lineage(subjects)),
        yardstick=find_yardstick(subjects),
    )
