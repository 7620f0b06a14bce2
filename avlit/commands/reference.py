"""`just reference`: the reference curves of recipes, made from finished runs and written into the repository."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from avlit.comparison.measures import number
from avlit.comparison.subject import config_of
from avlit.config import Config
from avlit.discovery import RECIPES
from avlit.durable import write_atomically
from avlit.errors import ConfigError, UserError
from avlit.reference import (
    ALONE,
    SIZE,
    Reference,
    ReferenceCurve,
    beginning,
    kind_of,
    made_with,
    read_references,
    reference_path,
    settings_of,
)
from avlit.runs import Run, find_run, stages_of
from avlit.settings import as_word, nearest, read_words
from avlit.tracking.history import Curve, read_history

WORDS = ("run", "runs_dir", "hardware")
KINDS = ("", "noise")
"""Of the held-out losses that a reference has: the whole, and by noise level."""


def main(words: Sequence[str]) -> int:
    """`run=RUN` for each seed, finished; a curriculum stands for all its stages, and each recipe gets a reference.

    `hardware=…` says what they were trained on; by default it is this machine.
    """
    names = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    given = read_words([word for word in words if not word.startswith("run=")])
    for key in given:
        if key not in WORDS:
            raise ConfigError(f"{key}: no such word; did you mean {nearest(key, WORDS) or ', '.join(WORDS)}?")
    if not names:
        raise UserError("run=… is missing: a finished run of each seed, or curricula; run=A run=B run=C")
    runs_dir = Path(given.get("runs_dir", Config.runs_dir))
    found = [find_run(runs_dir, name) for name in names]
    runs = {run.path: run for each in found for run in (stages_of(each) or [each])}
    for line in update(list(runs.values()), hardware=given.get("hardware") or this_machine()):
        print(line)
    return 0


def update(runs: Sequence[Run], *, hardware: str, root: Path = RECIPES) -> list[str]:
    """Write the references that the runs make, in place of those that their recipes had; returns what to say of each.

    A recipe has two where it is a stage of a curriculum and was trained from scratch, too. UserError: see
    `reference_of`; nothing is then written.
    """
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in sorted(runs, key=lambda each: each.init_checkpoint is None):  # stages first
        groups.setdefault((run.recipe, run.init_checkpoint is None), []).append(run)
    files: dict[Path, dict[str, Reference]] = {}
    lines = []
    for (recipe, is_from_nothing), group in groups.items():
        path = reference_path(recipe, root)
        references = files.setdefault(path, read_references(path))
        known = references.get(recipe)
        if known and not known.begins_with and not is_from_nothing:
            references[recipe + ALONE] = references.pop(recipe)
        key = recipe + ALONE if known and known.begins_with and is_from_nothing else recipe
        before, now = references.get(key), reference_of(group, hardware=hardware)
        references[key] = now
        lines += [f"{key}: {line}" for line in _summary(before, now)]
    for path, references in files.items():
        write_references(path, references)
        lines.append(f"Written to {path}")
    return lines


def _summary(before: Reference | None, now: Reference) -> list[str]:
    lines = []
    for name, curve in now.curves.items():
        if kind_of(name) == "":
            old = before.curves.get(name) if before else None
            spread = f" ± {number(curve.spread[-1], digits=2)}" if curve.spread else ""
            lines.append(
                f"{name} {number(curve.mean[-1])}{spread} at step {curve.steps[-1]}, seeds "
                f"{', '.join(map(str, now.seeds))}"
                + (f" (was {number(old.mean[-1])} at step {old.steps[-1]})" if old else "")
            )
    return lines


def this_machine() -> str:
    """Cores and kind of processor, in words."""
    kinds = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} CPU cores, {kinds[0] if kinds else platform.machine()}"


def reference_of(runs: Sequence[Run], *, hardware: str) -> Reference:
    """The reference that finished runs of one setting make, which differ in the seed alone.

    UserError: one is not finished, not of that setting, not of `tiny`, has logged no held-out loss, or has the seed of
    another.
    """
    first, seeds = runs[0], []
    curves: list[dict[str, Curve]] = []
    for run in runs:
        config = config_of(run)
        if run.record().status != "finished":
            raise UserError(f"run={run.id}: is {run.record().status}, not finished; `just resume run={run.id}`")
        if config.get("size") != SIZE:
            raise UserError(f"run={run.id}: size={config.get('size')}; references are of size={SIZE}")
        if (seed := int(config.get("seed") or 0)) in seeds:
            raise UserError(f"run={run.id}: seed={seed} was given by {runs[seeds.index(seed)].id}; train another seed")
        _check_same(first, run)
        seeds.append(seed)
        history = read_history(run)
        found = {name: curve for name, curve in (history.curves if history else {}).items() if kind_of(name) in KINDS}
        if not found:
            raise UserError(f"run={run.id}: has logged no held-out loss; train with validation.clips above 0")
        curves.append(found)
    return Reference(
        seeds=tuple(sorted(seeds)),
        settings=settings_of(first),
        begins_with=beginning(first),
        made_with={"hardware": hardware, **_joined([made_with(run) for run in runs])},
        curves={name: _over_seeds(name, runs, [each[name] for each in curves]) for name in _shared(curves)},
    )


def write_references(path: Path, references: Mapping[str, Reference]) -> None:
    """Write all references of a paper: a line for each setting and curve, so that a change can be read."""
    entries = []
    for key in sorted(references):
        values = {name: _block(value) for name, value in asdict(references[key]).items()}
        lines = ",\n".join(f'  "{name}": {text}' for name, text in values.items())
        entries.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
    write_atomically(path, "{\n" + ",\n".join(entries) + "\n}\n")


def _block(value: object) -> str:
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"   {json.dumps(name)}: {json.dumps(value[name])}" for name in sorted(value)) + "\n  }"


def _check_same(first: Run, run: Run) -> None:
    was, own = settings_of(first), settings_of(run)
    for key in dict.fromkeys([*was, *own]):
        if was.get(key) != own.get(key):
            raise UserError(
                f"run={run.id}: {key}={as_word(own.get(key))}, and {first.id} has {as_word(was.get(key))}; a reference "
                "is of one setting"
            )
    if beginning(first) != beginning(run):
        raise UserError(
            f"run={run.id}: begins with {beginning(run) or 'no trained weights'}, and {first.id} with "
            f"{beginning(first) or 'none'}; a reference is of one setting"
        )


def _joined(made: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all runs have, with each of its values once."""
    return {
        name: ", ".join(dict.fromkeys(each[name] for each in made))
        for name in made[0]
        if all(name in each for each in made)
    }


def _shared(curves: Sequence[Mapping[str, Curve]]) -> list[str]:
    return sorted(name for name in curves[0] if all(name in each for each in curves))


def _over_seeds(name: str, runs: Sequence[Run], curves: Sequence[Curve]) -> ReferenceCurve:
    values = [dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) for curve in curves]
    steps = sorted(set(values[0]).intersection(*values[1:]))
    for run, each in zip(runs, values, strict=True):
        if broken := [step for step in steps if not math.isfinite(each[step])]:
            raise UserError(f"run={run.id}: {name} is not finite at step {broken[0]}, which is no reference")
    at = [[each[step] for each in values] for step in steps]
    return ReferenceCurve(
        steps=tuple(steps),
        mean=tuple(_rounded(mean(each)) for each in at),
        spread=tuple(_rounded(stdev(each)) for each in at) if len(values) > 1 else (),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
