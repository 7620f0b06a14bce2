"""What became of every file: counted by subset and split, listed with reasons, printed and kept as `report.json`."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.prepare.controls import CONTROL_FILES
from data.prepare.face_mesh import INSTALL

REPORT = "report.json"

MOST_LISTED = 12
"""Speakers and the like that the printed report names."""


@dataclass
class FileReport:
    """One media file. kept: windows by split; left_out: windows by reason; rejected: why nothing of it was kept.

    shapes, captions, references, controls: kept windows by shape, by style of caption, by how many references they
    have, by control; the last two are empty where the recipe reads none. frames, frames_with_mouth: of kept windows.
    """

    file: str
    subsets: tuple[str, ...] = ()
    speaker: str = ""
    tracks: str = ""
    kept: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, int] = field(default_factory=dict)
    captions: dict[str, int] = field(default_factory=dict)
    references: dict[str, int] = field(default_factory=dict)
    controls: dict[str, int] = field(default_factory=dict)
    frames: int = 0
    frames_with_mouth: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rejected: str | None = None


@dataclass
class Report:
    """A whole preparation.

    problems: (place, reason) of caption records that belong to no file. passed_over: files that were not asked for.
    styles: those of captions that the recipe reads; without one of them a clip has its caption only.
    mouth_finder: what looked for mouths, in words, or nothing. no_controls: what the recipe reads and no clip has.
    """

    settings: dict[str, object]
    files: list[FileReport] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    passed_over: int = 0
    styles: tuple[str, ...] = ()
    mouth_finder: str = ""
    no_controls: tuple[str, ...] = ()

    @property
    def num_kept(self) -> int:
        """Windows in the shards, each once, however many subsets it is in."""
        return sum(sum(file.kept.values()) for file in self.files)

    def counts(self) -> dict[str, Counter[str]]:
        """Samples of each subset by split; a window of two subsets is a sample of each."""
        found: dict[str, Counter[str]] = {}
        for file in self.files:
            for subset in file.subsets:
                if file.kept:
                    found.setdefault(subset, Counter()).update(file.kept)
        return dict(sorted(found.items()))

    def lines(self) -> list[str]:
        """The report as it is printed."""
        files = sorted(self.files, key=lambda file: file.file)
        kept, rejected = [f for f in files if not f.rejected], [f for f in files if f.rejected]
        lines = []
        if kept:
            rows = [("subset", "train", "heldout")]
            rows += [(name, str(count["train"]), str(count["heldout"])) for name, count in self.counts().items()]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
            lines += [f"Kept {_count(self.num_kept, 'window')} of {_count(len(kept), 'file')}."]
            lines += self._totals(kept)
        remarks = [
            (file.file, remark)
            for file in kept
            for remark in (
                *(f"{_count(count, 'window')} left out: {why}" for why, count in file.left_out.items()),
                *file.notes,
            )
        ]
        for title, rows in (
            (f"Rejected {_count(len(rejected), 'file')}:", [(file.file, file.rejected) for file in rejected]),
            ("Of kept files:", remarks),
            (f"Captions without a clip, {len(self.problems)}:", self.problems),
        ):
            if rows:
                lines += [title, *(f"  {place}: {reason}" for place, reason in rows)]
        if missing := [name for name, count in self.counts().items() if not count["train"]]:
            lines.append(f"No training windows in {', '.join(missing)}: too few or too short clips")
        if missing := [name for name, count in self.counts().items() if not count["heldout"]]:
            lines.append(f"No held-out windows in {', '.join(missing)}: train with validation.clips=0 sample.count=0")
        return lines

    def _totals(self, kept: list[FileReport]) -> list[str]:
        """What the kept files hold, one line a kind, those kinds that there are."""
        shapes, captions, references, controls = (
            sum((Counter(getattr(file, name)) for file in kept), Counter[str]())
            for name in ("shapes", "captions", "references", "controls")
        )
        totals = [
            ("Files by tracks", Counter(file.tracks for file in kept if file.tracks)),
            ("Files by speaker", Counter(file.speaker for file in kept if file.speaker)),
            ("Windows by length", Counter({shape: count for shape, count in shapes.items() if shape.endswith("ms")})),
            ("Windows by style of caption", captions),
            ("Windows by number of references", Counter(dict(sorted(references.items())))),
            ("Windows by control", controls),
        ]
        lines = [f"{title}: {_listed(counts)}" for title, counts in totals if counts]
        if self.styles and (bare := sum(not file.captions for file in kept)):
            lines.append(
                f"Caption only, no words to speak: {bare} of {_count(len(kept), 'file')}; where somebody speaks, say "
                "what in its `transcript`"
            )
        deaf, total = shapes.total() - captions["speech"], shapes.total()
        if "speech" in self.styles and deaf:
            lines.append(
                f"Windows that say nothing of what is heard: {deaf} of {total}; a branch for sound reads their caption "
                'instead. Give `transcript` ("" for nobody, with times in `words` where a clip is longer than a '
                "window), or `sound`"
            )
        lines += self._mouths(kept)
        lines += [
            f"No clip has a {name} ({' or '.join(f'NAME.{suffix}' for suffix in CONTROL_FILES[name])} beside it): a "
            "run that reads it will refuse these shards"
            for name in self.no_controls
        ]
        if self.passed_over:
            lines.append(f"Passed over {_count(self.passed_over, 'file')} that include={self.settings.get('include')}")
            lines[-1] += " does not name"
        return lines

    def _mouths(self, kept: list[FileReport]) -> list[str]:
        """In how many frames a mouth was found, or how to have mouths looked for."""
        frames, found = sum(file.frames for file in kept), sum(file.frames_with_mouth for file in kept)
        if frames and self.mouth_finder:
            return [f"Frames with a mouth: {found} of {frames} ({found / frames:.0%}), found by {self.mouth_finder}"]
        if frames and self.settings.get("mouths") == "auto":
            return [f"Mouths were not looked for; a recipe with a mouth loss needs them: {INSTALL}"]
        return []

    def write(self, folder: Path) -> None:
        """Writes `report.json`."""
        document = {
            "settings": self.settings,
            "kept": {name: dict(count) for name, count in self.counts().items()},
            "files": [asdict(file) for file in sorted(self.files, key=lambda file: file.file)],
            "passed_over": self.passed_over,
            "styles": self.styles,
            "mouth_finder": self.mouth_finder,
            "no_controls": self.no_controls,
            "captions_without_clip": [{"place": place, "reason": reason} for place, reason in self.problems],
        }
        text = json.dumps(document, ensure_ascii=False, indent=1)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _listed(counts: Counter[str]) -> str:
    """The most frequent first, and how many more there are."""
    common = counts.most_common(MOST_LISTED)
    rest = len(counts) - len(common)
    return ", ".join(f"{name} {count}" for name, count in common) + (f", and {rest} more" if rest else "")
