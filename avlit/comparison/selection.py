"""Which runs are meant: ids, names, `last:3`, a table or curriculum, a tag, an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avlit.errors import UserError
from avlit.runs import Run, RunNotFoundError, find_run, list_runs, stages_of
from avlit.tracking.history import read_session, read_tags
from avlit.tracking.lookup import StoreError, tagged_ids

SELECTORS = ("run", "tag", "experiment")
MOST = 24
"""Runs that are compared at once: more lines cannot be told apart."""


def select(runs_dir: Path, selectors: Sequence[tuple[str, str]], *, store: str) -> list[Run]:
    """The runs that (`run`, WORD), (`tag`, KEY=VALUE) and (`experiment`, NAME) mean, in this order, each once.

    store: is asked for tags that no run has set itself. UserError: a word means none, or all mean fewer than two.
    """
    found: dict[Path, Run] = {}
    for kind, value in selectors:
        meant = {"run": _runs, "experiment": _experiment}[kind](runs_dir, value) if kind != "tag" else None
        for run in _tagged(runs_dir, value, store) if meant is None else meant:
            found[run.path] = run
    if len(found) < 2:
        named = f"only {next(iter(found.values())).id} is named" if found else "none is named"
        raise UserError(
            f"two runs or more are compared, and {named}: run=ID run=ID …, run=last:3, tag=KEY=VALUE or experiment=NAME"
        )
    if len(found) > MOST:
        raise UserError(f"{len(found)} runs are meant, and at most {MOST} can be told apart on a page; name fewer")
    return list(found.values())


def _runs(runs_dir: Path, word: str) -> list[Run]:
    """What one `run=` means; a table or a curriculum stands for its last runs."""
    if word == "last" or word.startswith("last:"):
        return _newest(runs_dir, word)
    if run := _find_by_name(runs_dir, word):
        return [run]
    try:
        run = find_run(runs_dir, word)
    except RunNotFoundError as error:
        raise RunNotFoundError(f"{error}{_what_became_of(runs_dir, word)}") from error
    return last_stages(run) or [run]


def _newest(runs_dir: Path, word: str) -> list[Run]:
    count = word.removeprefix("last").removeprefix(":") or "1"
    if not (count.isascii() and count.isdigit() and int(count)):
        raise UserError(f"run={word}: must be last or last:N, for example run=last:3")
    runs = list_runs(runs_dir)
    parents = {run.parent for run in runs}
    trained = [run for run in runs if run.id not in parents]
    if len(trained) < int(count):
        raise UserError(f"run={word}: there are {len(trained)} runs in {runs_dir}/; `just train recipe=…` makes one")
    return trained[-int(count) :]


def last_stages(parent: Run) -> list[Run]:
    """The runs of a table or a curriculum that no other of its runs starts from, oldest first; none of a single run."""
    stages = stages_of(parent)
    begun_from = {stage.record().init_run for stage in stages}
    return [stage for stage in stages if stage.id not in begun_from]


def _find_by_name(runs_dir: Path, name: str) -> Run | None:
    """The run of this name on MLflow's page, None where there is none. UserError: there are several."""
    runs = list_runs(runs_dir)
    if any(run.id == name for run in runs):
        return None
    found = [run for run in runs if (session := read_session(run)) and session.name == name]
    if len(found) > 1:
        raise UserError(f"run={name}: {len(found)} runs have this name: {', '.join(r.id for r in found)}; give the ids")
    return found[0] if found else None


def _what_became_of(runs_dir: Path, word: str) -> str:
    """Of a run without a folder: whether another run still names it."""
    for run in list_runs(runs_dir):
        record = run.record()
        for gone in (record.init_run, record.parent):
            if gone and (gone == word or gone.endswith(f"-{word}")):
                return (
                    f". {gone} was there once ({run.id} {'starts from' if gone == record.init_run else 'is part of'} "
                    "it) and its folder is gone; what it had sent is on MLflow's page (`just ui`)"
                )
    return ". Of a run whose folder was removed, what it had sent is on MLflow's page (`just ui`)"


def _experiment(runs_dir: Path, name: str) -> list[Run]:
    sessions = {run: session for run in list_runs(runs_dir) if (session := read_session(run))}
    parents = {run.parent for run in sessions}
    found = [run for run, session in sessions.items() if session.experiment == name and run.id not in parents]
    if not found:
        known = sorted({session.experiment for session in sessions.values()})
        raise UserError(
            f"experiment={name}: no run in {runs_dir}/ belongs to it; there are {', '.join(known) or 'none'}"
        )
    return found


def _tagged(runs_dir: Path, text: str, store: str) -> list[Run]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UserError(f"tag={text}: must be tag=KEY=VALUE, for example tag=size=tiny")
    runs = list_runs(runs_dir)
    parents = {run.parent for run in runs}
    if found := [run for run in runs if run.id not in parents and read_tags(run).get(key) == value]:
        return found
    try:
        ids = tagged_ids(store, key, value)
    except StoreError as error:
        raise UserError(
            f"tag={text}: no run in {runs_dir}/ has set it, and the store where somebody may have, {error}. "
            "Runs are read from their folders without it: name them by id, or give tracking.uri="
        ) from error
    if found := [run for run in runs if run.id in set(ids)]:
        return found
    gone = f"; {', '.join(ids)} had it, and their folders are gone" if ids else ""
    raise UserError(f"tag={text}: no run in {runs_dir}/ has it, nor one in {store}{gone}")
