"""The runs of a paper's table: which there are, what is left of them, and their training, one or several at a time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path

from avlit.commands.resume import resume
from avlit.commands.run_queue import Job, run_jobs
from avlit.commands.session import Outcome
from avlit.commands.train import settle_init, train
from avlit.commit import committed_dirs, step_of
from avlit.config import Config, from_yaml, load_config, recipe_folder, to_yaml
from avlit.durable import write_atomically
from avlit.errors import UserError
from avlit.paper_table import Unit
from avlit.provenance import LIBRARIES, Provenance, source_digests
from avlit.runs import Run, find_run, list_runs, stages_of
from avlit.settings import flatten, read_yaml

LOGS, REUSED = "logs", "reused.json"
NOT_COMPARED = ("run_name", "runs_dir", "tracking.*", "train.threads")
"""Keys in which two runs that are the same training may differ; threads change the last bits of a sum."""


@dataclass
class Pace:
    """Seconds that a step of each stage took in this session, for the time that is left."""

    spent: dict[str, list[float]] = field(default_factory=dict)

    def add(self, stage: str, *, seconds: float, steps: int) -> None:
        """A run of that stage has trained `steps` more."""
        if steps:
            self.spent.setdefault(stage, []).append(seconds / steps)

    def left(self, steps: Sequence[tuple[str, int]], *, at_once: int) -> str:
        """For (stage, steps) that are not trained yet, in words."""
        if not self.spent:
            return "time left is known after the first run"
        rates = {stage: sum(each) / len(each) for stage, each in self.spent.items()}
        other = sum(rates.values()) / len(rates)
        seconds = sum(count * rates.get(stage, other) for stage, count in steps) / at_once
        return f"about {seconds / 60:.0f} min of training left" if seconds >= 90 else f"about {seconds:.0f} s left"


class TableTraining:
    """The runs of a table in their order. allow_change: see `just resume`."""

    def __init__(self, parent: Run, units: Sequence[Unit], *, allow_change: bool):
        self.parent, self.units, self.allow_change = parent, units, allow_change
        self.named = {unit.name: unit for unit in units}
        self.pace = Pace()

    def one_by_one(self) -> int:
        """Train what is left in this process, as `just curriculum` does; returns the exit status."""
        for number, unit in enumerate(self.units, 1):
            if self.is_done(unit):
                continue
            print(f"\n[{number}/{len(self.units)}] {unit.name}: {self.left(at_once=1)}", flush=True)
            began, steps = time.monotonic(), self.steps_left()[unit.name]
            outcome = train_unit(self.parent, unit, allow_change=self.allow_change)
            if outcome.exit_status:
                return outcome.exit_status
            self.pace.add(unit.stage, seconds=time.monotonic() - began, steps=steps)
        return 0

    def side_by_side(self, at_once: int) -> int:
        """Train what is left in processes with an equal share of the cores each; returns the exit status."""
        threads = max(1, (os.cpu_count() or 1) // at_once)
        (self.parent.path / LOGS).mkdir(exist_ok=True)
        done = {unit.name for unit in self.units if self.is_done(unit)}
        jobs = [
            Job(unit.name, unit.needs, self.parent.path / LOGS / f"{number:02d}.txt")
            for number, unit in enumerate(self.units, 1)
            if unit.name not in done
        ]
        steps = self.steps_left()

        def on_start(job: Job) -> None:
            print(f"{job.name}: begins, {self.left(at_once=at_once)}; {job.log} takes what it prints", flush=True)

        def on_end(job: Job, seconds: float) -> None:
            self.pace.add(self.named[job.name].stage, seconds=seconds, steps=steps[job.name])
            print(f"{job.name}: done after {seconds / 60:.1f} min, {self.left(at_once=at_once)}", flush=True)

        work = partial(train_by_name, str(self.parent.path), self.named, threads, self.allow_change)
        return run_jobs(jobs, work, at_once=at_once, done=done, on_start=on_start, on_end=on_end)

    def left(self, *, at_once: int) -> str:
        """The time that is left, in words."""
        steps = self.steps_left()
        return self.pace.left([(unit.stage, steps[unit.name]) for unit in self.units], at_once=at_once)

    def steps_left(self) -> dict[str, int]:
        """Unit's name -> steps that the newest checkpoint of its run, if any, lacks."""
        runs = begun(self.parent)
        return {unit.name: self._steps_left(unit, runs.get(unit.name)) for unit in self.units}

    def _steps_left(self, unit: Unit, run: Run | None) -> int:
        if run is None:
            return unit_config(unit, runs_dir=self.parent.path.parent).train.steps
        done = max((step_of(path) or 0 for path in committed_dirs(run.checkpoints_dir)), default=0)
        return from_yaml(run.read_config(), source=str(run.config_path)).train.steps - done

    def refuse_other_code(self) -> None:
        """UserError where runs of this table have finished with another code or libraries than those left would have.

        Rows of a table can then not be compared.
        """
        runs = begun(self.parent)
        finished = {name: run for name, run in runs.items() if run.record().status == "finished"}
        if self.allow_change or not self.units or len(finished) >= len(self.units):
            return
        for unit in self.units:
            if (run := finished.get(unit.name)) is not None and not has_same_code(run, unit.stage):
                raise UserError(
                    f"{unit.name}, run {run.id}: was trained with other code or libraries than are here now; new=true "
                    "trains the whole table anew, allow_change=true goes on with rows of different code"
                )

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit's run has finished, here or, the very same training, as part of another table."""
        runs = begun(self.parent)
        if (run := runs.get(unit.name)) is not None:
            return run.record().status == "finished"
        if unit.needs is not None and unit.needs not in runs:
            return False  # nothing starts from a run that is not there
        runs_dir = self.parent.path.parent
        init = str(runs[unit.needs].path) if unit.needs else None
        if init is not None and runs[unit.needs or ""].record().status != "finished":
            return False
        config, _ = settle_init(unit_config(unit, runs_dir=runs_dir, init=init))
        for run in reversed(list_runs(runs_dir)):
            if run.recipe == unit.stage and run.parent and run.record().status == "finished" and is_same(run, config):
                print(f"{unit.name}: is run {run.id}, which another table has trained")
                write_atomically(self.parent.path / REUSED, json.dumps({**_reused(self.parent), unit.name: run.id}))
                return True
        return False


def begun(parent: Run) -> dict[str, Run]:
    """Unit's name -> its run, of those that were begun: runs of the table are named by their unit, others noted."""
    found = {run_name_of(run): run for run in stages_of(parent)}  # of several the newest
    beside = {run.id: run for run in list_runs(parent.path.parent)}
    return {name: beside[id] for name, id in _reused(parent).items() if id in beside} | found


def run_name_of(run: Run) -> str:
    """The name that the run was given."""
    return from_yaml(run.read_config(), source=str(run.config_path)).run_name or ""


def unit_config(unit: Unit, *, runs_dir: Path, init: str | None = None, threads: int | None = None) -> Config:
    """The config of a unit's run. init: the run that it starts from. threads: unless its words say how many."""
    words = [*unit.words, f"run_name={unit.name}", f"runs_dir={runs_dir}"]
    if init is not None:
        words.append(f"init={init}")
    if threads is not None and not any(word.startswith("train.threads=") for word in words):
        words.append(f"train.threads={threads}")
    return load_config(words)


def train_unit(parent: Run, unit: Unit, *, allow_change: bool, threads: int | None = None) -> Outcome:
    """Train a unit, or go on with its run; what it needs has finished."""
    runs = begun(parent)
    if (run := runs.get(unit.name)) is not None:
        return resume(run, (), allow_change=allow_change)
    init = str(runs[unit.needs].path) if unit.needs else None
    return train(unit_config(unit, runs_dir=parent.path.parent, init=init, threads=threads), parent=parent.id)


def train_by_name(parent: str, units: Mapping[str, Unit], threads: int, allow_change: bool, name: str) -> int:
    """`train_unit` in a process of its own; returns the exit status."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
    run = find_run(Path(parent).parent, parent)
    return train_unit(run, units[name], allow_change=allow_change, threads=threads).exit_status


def is_same(run: Run, config: Config) -> bool:
    """Whether a run was trained with this config, the code that is here, and the same libraries."""
    there, here = _compared(run.read_config(), run.id), _compared(to_yaml(config), config.recipe)
    return has_same_code(run, config.recipe) and there == here


def has_same_code(run: Run, recipe: str) -> bool:
    """Whether a run was trained with the code and the libraries that are here."""
    before = Provenance.read(run.provenance_path, is_damage_allowed=True)
    return (
        before is not None
        and before.code == source_digests(recipe_folder(recipe))
        and before.versions == {name: version(name) for name in LIBRARIES}
    )


def _compared(text: str, source: str) -> dict[str, object]:
    values = flatten(read_yaml(text, source))
    return {key: value for key, value in values.items() if not any(fnmatch(key, each) for each in NOT_COMPARED)}


def _reused(parent: Run) -> dict[str, str]:
    """Unit's name -> id of the run of another table that it is."""
    path = parent.path / REUSED
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
