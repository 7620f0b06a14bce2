"""Readings of clips on disk, a file for each clip, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from avlit.durable import write_atomically
from avlit.errors import UserError
from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading
from avlit.metrics.metric import Measure, Meter, Metric, Tools, Weights

SAMPLED, TRUE = "sampled", "true"
"""Whose readings they are: what was generated (or given), and the true clip's."""

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Readings:
    """A folder of readings that were made with one and the same settings."""

    folder: Path

    @classmethod
    def open(cls, root: Path, settings: Mapping[str, object]) -> Readings:
        """Those made with these settings, in a folder of their own under `root`; other settings start anew."""
        text = json.dumps(settings, indent=1, sort_keys=True, default=str)
        folder = root / hashlib.sha256(text.encode()).hexdigest()[:10]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / SETTINGS).exists():
            write_atomically(folder / SETTINGS, text + "\n")
        return cls(folder)

    def path(self, number: int) -> Path:
        """Where the readings of a clip are."""
        return self.folder / f"{number:05d}.json"

    def read(self, number: int, whose: str) -> dict[str, dict[str, Reading]]:
        """Meter -> metric -> reading of a clip; empty of one that was not measured yet.

        UserError: the file is damaged.
        """
        path = self.path(number)
        if not path.exists():
            return {}
        try:
            stored = json.loads(path.read_text(encoding="utf-8")).get(whose, {})
            return {
                str(meter): {str(name): _restored(value) for name, value in found.items()}
                for meter, found in stored.items()
            }
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it, and the clip is measured again") from error

    def lacks(self, number: int, meters: Mapping[str, Meter]) -> list[str]:
        """Ids of the meters that have not read the clip."""
        found = self.read(number, SAMPLED)
        return [name for name in meters if name not in found]

    def measure(
        self, number: int, clips: Mapping[str, Clip], *, meters: Mapping[str, Meter], measures: Mapping[str, Measure]
    ) -> None:
        """Read a clip, and its true clip, with those of the meters that have not yet, and keep it.

        clips: SAMPLED and TRUE -> clip. measures: id -> an opened meter.
        """
        lacking = self.lacks(number, meters)
        stored: dict[str, object] = {"key": clips[SAMPLED].key}
        for whose, clip in clips.items():
            found = self.read(number, whose)
            for name in lacking:
                found[name] = dict(measures[name](clip)) if meters[name].applies(clip) else {}
            stored[whose] = found
        write_atomically(self.path(number), json.dumps(stored) + "\n")

    def of(self, metric: Metric, meter_id: str, *, whose: str, count: int) -> list[Reading]:
        """A metric's readings of the first `count` clips; of those alone that it applies to."""
        found = (self.read(number, whose).get(meter_id, {}) for number in range(count))
        return [readings[metric.name] for readings in found if metric.name in readings]


def _restored(value: object) -> Reading:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no reading")
    return float(value)


def meter_ids(meters: Sequence[Meter], tools: Tools) -> dict[str, Meter]:
    """Meters by what their readings depend on: name, version, and the files of weights."""
    found = {}
    for meter in meters:
        parts = [meter.name, f"v{meter.version}"]
        parts += [_fingerprint(tools.weights[need.key]) for need in meter.needs if isinstance(need, Weights)]
        found["-".join(parts)] = meter
    return found


def _fingerprint(path: Path) -> str:
    """Changes when a file of weights does: of names, sizes and times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    known = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files if each.is_file()]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:8]
