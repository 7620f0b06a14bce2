"""Where the weights of the compared runs come from: the stages before them, over resumes, to the first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from avlit.comparison.subject import Subject
from avlit.errors import UserError
from avlit.runs import Run, find_run
from avlit.tracking.history import read_history

CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Stage:
    """A run in the line of descent, and those that start from it.

    letter: "" of a run that is not compared. from_step: of the checkpoint that it started from, None where it did from
    none. parent: the curriculum or table it is a part of. resumed_at: the first step logged after each resume.
    problem: why nothing else is known.
    """

    id: str
    letter: str = ""
    name: str = ""
    recipe: str = ""
    status: str = ""
    last_step: int = 0
    from_step: int | None = None
    parent: str = ""
    resumed_at: tuple[int, ...] = ()
    problem: str = ""
    children: list[Stage] = field(default_factory=list, compare=False)


def find_lineage(subjects: Sequence[Subject]) -> list[Stage]:
    """The first stages of all compared runs, each with its descendants among them and what lies between."""
    stages: dict[str, Stage] = {}
    roots: list[Stage] = []
    for subject in subjects:
        _add(subject.run, stages, roots, {each.run.path: each for each in subjects})
    return roots


def _add(run: Run, stages: dict[str, Stage], roots: list[Stage], compared: Mapping[Path, Subject]) -> Stage:
    """A run and its ancestors, each once; stages: id -> stage of those that are there already."""
    if run.id in stages:
        return stages[run.id]
    record = run.record()
    subject = compared.get(run.path)
    history = subject.history if subject else read_history(run)
    checkpoint = CHECKPOINT.search((record.init_checkpoint or "").rpartition("/")[2])
    stage = stages[run.id] = Stage(
        id=run.id,
        letter=subject.letter if subject else "",
        name=history.session.name if history else run.id,
        recipe=run.recipe,
        status=record.status,
        last_step=max((int(curve.steps[-1]) for curve in history.curves.values()), default=0) if history else 0,
        from_step=int(checkpoint[1]) if checkpoint else None,
        parent=record.parent or "",
        resumed_at=history.resumed_at if history else (),
    )
    if record.init_run is None:
        source = roots
    else:
        try:
            ancestor = find_run(run.path.parent, run.path.parent / record.init_run)
            source = _add(ancestor, stages, roots, compared).children
        except UserError:
            if record.init_run not in stages:
                gone = stages[record.init_run] = Stage(record.init_run, problem="its folder is gone")
                roots.append(gone)
            source = stages[record.init_run].children
    source.append(stage)
    return stage
