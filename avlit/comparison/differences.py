"""What differs between runs in config, code, libraries and data, and what that means for comparing their losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from avlit.comparison.subject import Subject, config_of
from avlit.errors import UserError
from avlit.runs import find_run
from avlit.settings import as_word

PLACES = (
    "about", "order", "run_name", "runs_dir", "init", "data.root", "data.cache_dir", "codecs.*_weights",
    "model.weights", "data.workers", "data.prefetch", "data.timeout_s", "data.max_restarts", "train.threads",
    "train.log_every", "checkpoint.*", "tracking.*", "validation.every", "sample.every", "sample.count",
)  # fmt: skip
"""Config keys that say where things are and what is written down: runs that differ in them alone are one setting."""
SAME_MEASURE = (
    "recipe", "size", "data.num_frames", "data.height", "data.width", "data.fps", "data.rate_hz", "data.peak",
    "data.subsets*", "codecs.*", "flow_shift", "validation.clips",
)  # fmt: skip
"""Config keys on which the value of a held-out loss depends, whatever the model: other clips, latents or noise."""
ABSENT = "—"


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in all runs. values: in the order of the runs, ABSENT where a run has none."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Differences:
    """config: what the runs compute. places: where things are and what is written. unknown: runs without provenance."""

    config: tuple[Difference, ...]
    places: tuple[Difference, ...]
    code: tuple[Difference, ...]
    libraries: tuple[Difference, ...]
    data: tuple[Difference, ...]
    unknown: tuple[str, ...]
    revisions: tuple[str, ...]

    @property
    def cautions(self) -> list[str]:
        """Why values of losses cannot be compared; empty where they can."""
        found = []
        for each in self.config:
            if each.name == "recipe":
                found.append(f"The runs are of different recipes ({', '.join(dict.fromkeys(each.values))}).")
            elif any(fnmatch(each.name, key) for key in SAME_MEASURE) and not _is_place(each.name):
                found.append(f"{each.name} differs ({', '.join(dict.fromkeys(each.values))}).")
        if any(each.name == "contents" for each in self.data):
            found.append("The data differs, and with it the held-out clips.")
        return found


def find_differences(subjects: Sequence[Subject]) -> Differences:
    """Of two runs or more, by dotted config key, source file, library and property of the data."""
    config = _rows([{key: as_word(v) for key, v in each.config.items()} for each in subjects])
    known = [each.provenance for each in subjects if each.provenance]
    data = [
        {"contents" if key == "fingerprint" else key: _short(value) for key, value in each.data.items()}
        for each in known
    ]
    letters = [each.letter for each in subjects if each.provenance]

    def spread(rows: list[Difference]) -> tuple[Difference, ...]:
        """The rows of the known runs, with "unknown" for the others."""
        return tuple(
            Difference(
                row.name,
                tuple(
                    row.values[letters.index(each.letter)] if each.letter in letters else "unknown" for each in subjects
                ),
            )
            for row in rows
        )

    return Differences(
        config=tuple(row for row in config if not _is_place(row.name)),
        places=tuple(row for row in config if _is_place(row.name)),
        code=spread(_rows([{name: digest[:8] for name, digest in each.code.items()} for each in known])),
        libraries=spread(_rows([each.versions for each in known])),
        data=spread(_rows(data)),
        unknown=tuple(each.letter for each in subjects if each.provenance is None),
        revisions=tuple(each.provenance.revision[:10] if each.provenance else "unknown" for each in subjects),
    )


def setting_of(subject: Subject, known: dict[str, str]) -> str:
    """A text that two runs share that are the same setting with other seeds, back to the weights they begin with.

    known: run id -> the text of how it began, of runs that were looked up before; added to.
    """
    made = subject.provenance
    code = made.code if made else {}
    begun_from = _beginning(subject.run.path.parent, subject.record.init_run, known)
    return json.dumps([_without_seed(subject.config), code, made.data if made else {}, begun_from])


def _beginning(runs_dir: Path, run_id: str | None, known: dict[str, str]) -> str:
    """The settings of the runs whose weights a run begins with; a run that is gone stands for itself."""
    if run_id is None:
        return ""
    if run_id not in known:
        try:
            run = find_run(runs_dir, runs_dir / run_id)
            before = _beginning(runs_dir, run.record().init_run, known)
            known[run_id] = json.dumps([_without_seed(config_of(run)), before])
        except UserError:
            known[run_id] = run_id
    return known[run_id]


def _without_seed(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: as_word(value) for key, value in config.items() if key != "seed" and not _is_place(key)}


def _is_place(key: str) -> bool:
    return any(fnmatch(key, pattern) for pattern in PLACES)


def _rows(values: Sequence[Mapping[str, str]]) -> list[Difference]:
    """A row for each name whose value is not the same everywhere."""
    names = dict.fromkeys(name for each in values for name in each)
    rows = [Difference(name, tuple(each.get(name, ABSENT) for each in values)) for name in names]
    return [row for row in rows if len(set(row.values)) > 1]


def _short(value: str) -> str:
    """A digest's first digits; anything else as it is."""
    return value[:12] if len(value) == 64 and set(value) <= set("0123456789abcdef") else value
