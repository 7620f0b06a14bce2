"""Many requests from a JSONL file: all checked before the first is sampled, skipped where they are done already."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from avlit.codecs.pretrained import fingerprint
from avlit.commands.abilities import Abilities
from avlit.commands.generation import Generator
from avlit.commands.plan import Plan, plan_clip
from avlit.commands.request import Request, request_from_words
from avlit.config import SampleConfig
from avlit.durable import write_atomically
from avlit.errors import UserError

NAME = re.compile(r"\w[\w.-]*")


class JobError(UserError):
    """A line of a jobs file that cannot be made; the message begins with file and line."""


@dataclass(frozen=True)
class Job:
    """One line: where it stands (`FILE, line N`), the name of its results, its words as typed, and the request."""

    place: str
    name: str
    words: Mapping[str, str]
    request: Request


def read_jobs(path: Path, *, seed: int) -> list[Job]:
    """One JSON object a line: the words of one clip and, if wanted, `name` (else the line's number).

    seed: of lines that have none. JobError names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"jobs={path}: cannot be read as a text file: {error}") from error
    jobs: dict[str, Job] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            words = _words(line)
            name = words.pop("name", f"{number:04d}")
            if not NAME.fullmatch(name):
                raise UserError(f"name={name}: it names a file; letters, digits, _ . and - only")
            if name.lower() in jobs:
                raise UserError(f"name={name}: {jobs[name.lower()].place} has the same name")
            if not set(words) - {"seed", "duration_s", "free_prompts"}:
                raise UserError("it asks for nothing; give a prompt or a file")
            jobs[name.lower()] = Job(place, name, words, request_from_words(words, seed=seed))
        except UserError as error:
            raise JobError(f"{place}: {error}") from error
    if not jobs:
        raise JobError(f'jobs={path}: holds no job; each line is a JSON object such as {{"prompt": "…"}}')
    return list(jobs.values())


def _words(line: str) -> dict[str, str]:
    def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise UserError(f"a key is given twice: {', '.join(key for key, _ in pairs)}")
        return dict(pairs)

    try:
        found = json.loads(line, object_pairs_hook=distinct)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError('must be a JSON object, such as {"prompt": "…", "speech": "a.wav"}')
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{key}: must be a text or a number, not {json.dumps(value)}")
    return {key: str(value) for key, value in found.items()}


def plan_jobs(
    jobs: Sequence[Job], folder: Path, *, abilities: Abilities, origin: Mapping[str, object]
) -> tuple[list[tuple[Job, Plan]], int]:
    """The jobs that are still to be made, checked and laid out, and the number of those that are done.

    A job is done when `folder` has NAME.mp4 (or NAME.wav) and NAME.json, and the JSON records the same words, files and
    `origin` (run, step, settings). JobError where it records others, with the difference: nothing is mixed or
    overwritten.
    """
    waiting = []
    for job in jobs:
        path = folder / f"{job.name}.json"
        try:
            if path.is_file() and path.with_suffix(abilities.suffix).is_file():
                _refuse_other(path, record(job, origin))
            else:
                waiting.append((job, plan_clip(job.request, abilities)))
        except UserError as error:
            raise JobError(f"{job.place}: {error}") from error
    return waiting, len(jobs) - len(waiting)


def run_jobs(
    generator: Generator, waiting: Sequence[tuple[Job, Plan]], folder: Path, *, origin: Mapping[str, object]
) -> None:
    """Make the clips one after the other: the clip first, NAME.json last, so that a stop loses one clip at most."""
    for job, plan in tqdm(waiting, desc="jobs", unit="job"):
        with tqdm(total=generator.num_steps(plan), desc=job.name, unit="step", leave=False) as bar:

            def on_step(bar: tqdm = bar) -> None:
                bar.update()

            generator.write(plan, folder / f"{job.name}{generator.abilities.suffix}", on_step=on_step)
        for note in (*plan.notes, *generator.text_notes(job.request)):
            tqdm.write(f"{job.name}: {note}")
        text = json.dumps(record(job, origin), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / f"{job.name}.json", text)


def record(job: Job, origin: Mapping[str, object]) -> dict[str, object]:
    """What NAME.json holds: the request with the hashes of its files, and what made it."""
    request = job.request
    hashes = {str(path): fingerprint([path]) for path in request.files if path.is_file()}
    return {"name": job.name, "words": dict(job.words), "seed": request.seed, "files": hashes, **origin}


def origin_of(settings: SampleConfig, *, run: str, step: int) -> dict[str, object]:
    """The part of a record that all jobs of one call share."""
    sampler = {name: getattr(settings, name) for name in settings.of_one_clip}
    return {"run": run, "step": step, "sample": sampler}


def _refuse_other(path: Path, wanted: Mapping[str, object]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to make the clip again") from error
    differing = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {found.get(key)}, is {wanted.get(key)}" for key in differing)
        raise UserError(f"{path} is of another request: {changes}. Give another out=, or remove it to make it again")
