"""Run folders: how they are named, what describes them, and how a user's word (`last`, an id, a path) finds one."""

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path

from avlit.durable import sync_folder, write_atomically
from avlit.errors import ConfigError, UserError

RECORD_NAME = "run.json"
SAFE_NAME = re.compile(r"\w[\w.-]*")  # of recipes and ids: one part of a path, and printable
STATUSES = ("running", "finished", "stopped", "failed")
"""stopped: ended early on request and can be resumed. A killed run stays `running`."""


class RunNotFoundError(UserError):
    """No run, or more than one, answers to what the user wrote."""


class RunBusyError(UserError):
    """Another process trains the run."""


@dataclass(frozen=True)
class RunRecord:
    """What run.json holds.

    parent: id of the run this one is a part of (a curriculum). init_run, init_checkpoint: the run and the checkpoint
    folder whose weights it started from. mlflow_uri, mlflow_experiment, mlflow_run: where it is tracked, once known.
    """

    id: str
    recipe: str
    created: str
    parent: str | None = None
    status: str = "running"
    init_run: str | None = None
    init_checkpoint: str | None = None
    mlflow_uri: str | None = None
    mlflow_experiment: str | None = None
    mlflow_run: str | None = None


@dataclass(frozen=True)
class Run:
    """One run's folder. `id` is also its folder's name; what changes during a run is in `record()`."""

    path: Path
    id: str
    recipe: str
    parent: str | None
    created: str

    @property
    def config_path(self) -> Path:
        """The resolved configuration as YAML text."""
        return self.path / "config.yaml"

    @property
    def provenance_path(self) -> Path:
        """What the run is made from (`avlit.provenance`), written by each of its sessions."""
        return self.path / "provenance.json"

    @property
    def metrics_path(self) -> Path:
        """The last metrics, as JSON, of a run that has finished."""
        return self.path / "metrics.json"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples_dir(self) -> Path:
        return self.path / "samples"

    @property
    def spool_dir(self) -> Path:
        """What is waiting to be sent to MLflow."""
        return self.path / "spool"

    @property
    def init_checkpoint(self) -> Path | None:
        """The checkpoint folder whose weights the run started from, where it is now; None: from none.

        Of a run that stands beside this one it is found there: both may have been moved since.
        """
        record = self.record()
        if record.init_checkpoint is None:
            return None
        path = Path(record.init_checkpoint)
        beside = self.path.parent.joinpath(*path.parts[-3:])
        return beside if path.parts[-3:-1] == (record.init_run, "checkpoints") and beside.is_dir() else path

    def record(self) -> RunRecord:
        """run.json as it is now."""
        return _read_record(self.path)

    def update(self, **changes: str | None) -> RunRecord:
        """Replace fields of run.json, atomically; only the process that trains or replays the run may call it."""
        if (status := changes.get("status")) is not None and status not in STATUSES:
            raise ValueError(f"status={status!r}: must be one of {', '.join(STATUSES)}")
        record = replace(self.record(), **changes)  # pyright: ignore[reportArgumentType]
        write_atomically(self.path / RECORD_NAME, _to_json(record))
        return record

    def write_config(self, text: str) -> None:
        """Store the resolved configuration."""
        write_atomically(self.config_path, text)

    def read_config(self) -> str:
        """What `write_config` stored. ConfigError: it is missing, or not text."""
        try:
            return self.config_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"run={self.id}: {self.config_path} cannot be read ({reason}), and the run goes no further without it; "
                f"put it back ({self.provenance_path.name} beside it holds a copy), or train a new run"
            ) from error


def create_run(
    runs_dir: Path,
    recipe: str,
    *,
    config: str = "",
    parent: str | None = None,
    init_run: str | None = None,
    init_checkpoint: str | None = None,
    files: Mapping[str, str] | None = None,
) -> Run:
    """A new run folder `<YYYYMMDD-HHMMSS>-<recipe>-<4 hex>` with its resolved config as YAML.

    It appears complete or not at all: a run that exists can be resumed. parent, init_run, init_checkpoint: see
    RunRecord. files: name -> text of what else belongs to it. UserError: it cannot be made in `runs_dir`.
    """
    if not SAFE_NAME.fullmatch(recipe):
        raise ValueError(
            f"recipe={recipe!r}: a run's folder is named by it, so only letters, digits, _ . and - are allowed"
        )
    now = datetime.now().astimezone()
    while True:
        run_id = f"{now:%Y%m%d-%H%M%S}-{recipe}-{secrets.token_hex(2)}"
        building, path = runs_dir / f".{run_id}", runs_dir / run_id
        if not path.exists():
            break
    record = RunRecord(
        id=run_id,
        recipe=recipe,
        created=now.isoformat(timespec="microseconds"),
        parent=parent,
        init_run=init_run,
        init_checkpoint=init_checkpoint,
    )
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        sweep_unfinished(runs_dir)
        for name in ("checkpoints", "samples", "spool"):
            (building / name).mkdir(parents=True)
        for name, text in {**(files or {}), "config.yaml": config, RECORD_NAME: _to_json(record)}.items():
            write_atomically(building / name, text)
        os.rename(building, path)
        sync_folder(runs_dir)
    except OSError as error:
        raise UserError(
            f"runs_dir={runs_dir}: no run can be made there ({error.strerror}); name a folder that can be written to"
        ) from error
    return _to_run(path, record)


def stages_of(parent: Run) -> list[Run]:
    """The runs that name `parent` as theirs, oldest first."""
    return [run for run in list_runs(parent.path.parent) if run.parent == parent.id]


def find_run(runs_dir: Path, word: str | Path) -> Run:
    """The run that `word` means: `last` (newest), an id, the beginning or the four last characters of one, or a folder.

    RunNotFoundError: nothing or more than one run answers; the message lists the nearest.
    """
    text = str(word)
    runs = list_runs(runs_dir)
    if text == "last":
        if not runs:
            raise RunNotFoundError(f"run=last: there are no runs in {runs_dir}/ yet; `just train recipe=…` makes one")
        return runs[-1]
    path = Path(word)
    if (path / RECORD_NAME).is_file():
        return _to_run(path, _read_record(path))
    if path.is_dir():
        raise RunNotFoundError(f"run={text}: the folder holds no {RECORD_NAME}, so it is not a run")
    found = [run for run in runs if run.id == text] or [
        run for run in runs if text and (run.id.startswith(text) or run.id.endswith(f"-{text}"))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise RunNotFoundError(f"run={text}: {len(found)} runs begin so: {_listed(found)}; write more of the id")
    if not runs:
        raise RunNotFoundError(f"run={text}: there are no runs in {runs_dir}/ yet, and no such folder")
    near = get_close_matches(text, [run.id for run in runs], n=3, cutoff=0.4)
    nearest = [run for run in reversed(runs) if run.id in near] or runs[:-4:-1]
    raise RunNotFoundError(f"run={text}: no such run in {runs_dir}/ and no such folder; nearest: {_listed(nearest)}")


def list_runs(runs_dir: Path) -> list[Run]:
    """All runs, oldest first; a folder whose run.json cannot be read is left out (`find_run` on its path says why)."""
    runs = []
    for path in sorted(runs_dir.glob(f"[!.]*/{RECORD_NAME}")):
        try:
            runs.append(_to_run(path.parent, _read_record(path.parent)))
        except RunNotFoundError:
            continue
    return sorted(runs, key=lambda run: (datetime.fromisoformat(run.created), run.id))


@contextmanager
def hold(run: Run) -> Iterator[None]:
    """Inside, no other process can train or resume the run. Ends with the process, however that ends.

    RunBusyError: another process holds it.
    """
    with open(run.path / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise RunBusyError(f"run={run.id}: process {owner} is training it; stop that one first") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def sweep_unfinished(runs_dir: Path, *, older_than_s: float = 3600.0) -> None:
    """Remove folders of runs that were killed while being created."""
    now = datetime.now().timestamp()
    for path in runs_dir.glob(".????????-??????-*"):
        if now - path.stat().st_mtime > older_than_s:
            shutil.rmtree(path, ignore_errors=True)


def _to_run(path: Path, record: RunRecord) -> Run:
    return Run(path.resolve(), record.id, record.recipe, record.parent, record.created)


def _to_json(record: RunRecord) -> str:
    return json.dumps(asdict(record), indent=1) + "\n"


def _read_record(path: Path) -> RunRecord:
    try:
        values = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
        known = {field.name for field in fields(RunRecord)}
        record = RunRecord(**{key: value for key, value in values.items() if key in known})
        _check_record(record)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunNotFoundError(f"run={path}: {RECORD_NAME} cannot be read: {error}") from error
    return record


def _check_record(record: RunRecord) -> None:
    """ValueError unless the record can be listed beside others: one that came from elsewhere must not hide them."""
    for key, value in asdict(record).items():
        if value is None and key not in ("id", "recipe", "created", "status"):
            continue
        if not isinstance(value, str) or (key in ("id", "recipe", "parent") and not SAFE_NAME.fullmatch(value)):
            raise ValueError(f"{key}={str(value)[:80]!r} is not what a run writes there")
    if datetime.fromisoformat(record.created).tzinfo is None:
        raise ValueError(f"created={record.created} has no timezone")


def _listed(runs: list[Run]) -> str:
    return ", ".join(run.id for run in runs[:4]) + (", …" if len(runs) > 4 else "")
