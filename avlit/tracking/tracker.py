"""What a run tells MLflow, and the process that sends it on.

Training appends to the spool and never waits for a store. Sending is another process, not a thread: importing mlflow
and making a new store are seconds of Python that would hold back every operation the training loop starts.
Every point carries the time it was logged, and MLflow's stores keep one row for equal (key, time, step, value), so
that sending again what may have arrived before a crash doubles nothing.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from avlit.errors import UserError
from avlit.runs import Run
from avlit.settings import flatten
from avlit.tracking.spool import FILES, POINTS, Progress, Session, SpoolWriter, pending_bytes

ROOT = Path(__file__).parents[2]
METRIC_NAME = re.compile(r"[\w][\w.\- ]*(/[\w][\w.\- ]*)*")
MAX_PARAM, MAX_TAG = 500, 5000  # what every MLflow since 1.0 takes
OFFLINE = "offline"
"""The `tracking.uri` of runs that are sent to no store; their spool is kept, and a resume with a store sends it all."""
STATUSES = {"running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class GitRevision:
    """What the code was: commit, and whether files differ from it; "unknown" and None without git or a repository."""

    revision: str
    is_dirty: bool | None


def git_revision(folder: Path = ROOT) -> GitRevision:
    """The checkout that `folder` is in."""
    answers = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        try:
            done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return GitRevision("unknown", None)
        if done.returncode:
            return GitRevision("unknown", None)
        answers.append(done.stdout.strip())
    return GitRevision(answers[0], bool(answers[1]))


def store_uri(uri: str | None) -> str:
    """The store that `tracking.uri` means, independent of the current folder; None is the file mlflow.db in it.

    "offline" is no store and stays as it is.

    UserError: a plain folder (that kind of store doubles points after a crash), or a password in the address.
    """
    if not uri:
        return f"sqlite:///{Path('mlflow.db').resolve()}"
    if uri == OFFLINE:
        return uri
    parts = urlsplit(uri)
    if parts.password:
        raise UserError(
            "tracking.uri: holds a password, which would be written to files; "
            "give it in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    if parts.scheme in ("", "file"):
        raise UserError(
            f"tracking.uri={uri}: a folder cannot be the store; use sqlite:///FILE, a server's "
            "http://HOST:PORT, or offline"
        )
    if parts.scheme == "sqlite":
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


class Tracker:
    """What one run tells MLflow. Calls return in microseconds and never fail because of the store.

    run: its folder; the MLflow run is found by its id, so a resume goes on in the same one. A run with a parent
    becomes a child of the parent's MLflow run. uri: see `store_uri`. is_resumed: points of steps that were logged
    before the run stopped are repetitions, and not sent again, but for those after `redone_from`, a step from which
    on the run is trained otherwise than before. is_active: False on all processes but the first: nothing is logged.
    """

    def __init__(
        self,
        run: Run,
        *,
        uri: str | None = None,
        experiment: str = "avlit",
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        is_resumed: bool = False,
        redone_from: int | None = None,
        is_active: bool = True,
    ):
        self.run = run
        self.store = store_uri(uri)
        self.is_active = is_active
        self._names: set[str] = set()
        self._sender: subprocess.Popen[bytes] | None = None
        if not is_active:
            return
        self._points = SpoolWriter(run.spool_dir / POINTS)
        self._files = SpoolWriter(run.spool_dir / FILES)
        session = Session(
            store=self.store,
            experiment=experiment,
            name=run_name or f"{run.recipe}-{run.id[-4:]}",  # what `run=` takes, first in a narrow column
            parent=run.parent,
            created=run.created,
            is_resumed=is_resumed,
            redone_from=redone_from,
        )
        self._points.append({"open": asdict(session)})
        git = git_revision()
        dirty = "unknown" if git.is_dirty is None else str(git.is_dirty).lower()
        self.set_tags({"recipe": run.recipe, "git_revision": git.revision, "git_dirty": dirty, **(tags or {})})
        if self.store != OFFLINE:
            self._sender = self._start_sender()

    def _start_sender(self) -> subprocess.Popen[bytes]:
        with open(self.run.spool_dir / "sender.log", "ab") as log:
            # Its own session: a Ctrl-C or a signal to the training's group must not end it before the last points.
            return subprocess.Popen(
                [sys.executable, "-m", "avlit.tracking", str(self.run.path)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Points at an optimizer step. Values are numbers already on the host; NaN and infinity are kept."""
        if not self.is_active:
            return
        for name in metrics:
            if name not in self._names:
                if not METRIC_NAME.fullmatch(name) or len(name) > 250:
                    raise ValueError(f"metric {name!r}: a name is words of letters, digits, _ . - joined by /")
                self._names.add(name)
        values = {name: float(value) for name, value in metrics.items()}
        self._points.append({"t": time.time_ns() // 1_000_000, "s": step, "m": values})

    def log_params(self, params: Mapping[str, object]) -> None:
        """Settings by dotted key; values too long for a param are cut, config.yaml has them in full."""
        if self.is_active:
            self._points.append({"params": {key: _cut(str(value), MAX_PARAM) for key, value in params.items()}})

    def log_config(self, text: str) -> None:
        """A resolved configuration: its keys as params, and the run's config.yaml as an artifact."""
        import yaml

        values = flatten(yaml.safe_load(text) or {})
        self.log_params({key: json.dumps(v) if isinstance(v, list | dict) else v for key, v in values.items()})
        if self.run.config_path.exists():
            self.log_artifact(self.run.config_path)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file of the run's folder to be copied to the store, into `folder` of its artifacts. It must stay there."""
        if not path.resolve().is_relative_to(self.run.path):
            raise ValueError(f"artifact {path}: only files in the run's folder {self.run.path} are sent")
        if self.is_active:
            self._files.append({"file": str(path.resolve().relative_to(self.run.path)), "to": folder})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Labels of the run; a later value replaces an earlier one."""
        if self.is_active:
            self._points.append({"tags": {key: _cut(str(value), MAX_TAG) for key, value in tags.items()}})

    def finish(self, status: str, *, timeout_s: float = 30.0, ended_ms: int | None = None) -> None:
        """End the run as finished, stopped or failed; waits up to `timeout_s` and says what has not arrived by then.

        ended_ms: when it ended, as Unix time in ms, if that was not now.
        """
        if status not in STATUSES:
            raise ValueError(f"status={status!r}: must be one of {', '.join(STATUSES)}")
        if self.is_active:
            self._points.append({"end": STATUSES[status], "t": ended_ms or time.time_ns() // 1_000_000})
            if message := self.close(timeout_s=timeout_s):
                print(message, file=sys.stderr)

    def close(self, *, timeout_s: float = 30.0) -> str:
        """Let the sender finish, at most `timeout_s`; returns "" or what has not arrived and where it waits."""
        if not self.is_active:
            return ""
        self.is_active = False
        lost = self._points.lost + self._files.lost
        self._points.close()
        self._files.close()
        messages = [f"tracking: {lost} records could not be written to the disk"] if lost else []
        if self._sender is not None:
            _finish(self._sender if self._sender.poll() is None else self._start_sender(), timeout_s)  # or one more try
            self._sender = None
            messages.insert(0, delivery(self.run))
        return "\n".join(filter(None, messages))


def track_offline_run(run: Run, *, store: str) -> str:
    """Send a run that was trained offline, and is over, to a store; returns "" or what has not arrived.

    UserError: it is in a store already, is being trained, or was never tracked.
    """
    from avlit.tracking.history import read_session

    session, status = read_session(run), run.record().status
    if session is None:
        raise UserError(f"run={run.id}: nothing of it was ever logged")
    if session.store not in (OFFLINE, store):
        raise UserError(f"run={run.id}: is tracked in {session.store}, not offline; it is there already")
    if status == "running":
        raise UserError(f"run={run.id}: is being trained, or was killed; `just resume run={run.id}` ends it first")
    tracker = Tracker(run, uri=store, experiment=session.experiment, run_name=session.name, is_resumed=True)
    tracker._points.append({"end": STATUSES[status], "t": time.time_ns() // 1_000_000})
    return tracker.close(timeout_s=600)


def _finish(sender: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """Let it send what is left, and end it after `timeout_s`."""
    assert sender.stdin is not None
    sender.stdin.close()  # the sign to finish; the death of this process is the same sign
    try:
        sender.wait(timeout_s)
    except subprocess.TimeoutExpired:
        sender.kill()
        sender.wait()


def open_parent(
    run: Run,
    *,
    uri: str | None = None,
    experiment: str = "avlit",
    run_name: str | None = None,
    is_resumed: bool = False,
    kind: str = "curriculum",
) -> Tracker:
    """The tracker of a run that others name as their parent: MLflow's page shows them under it. kind: its tag."""
    return Tracker(run, uri=uri, experiment=experiment, run_name=run_name, tags={"kind": kind}, is_resumed=is_resumed)


def delivery(run: Run) -> str:
    """Store where the run is tracked in run.json; returns "" if all has arrived, else what has not and why."""
    progress = Progress.read(run.spool_dir)
    if progress.run:
        run.update(mlflow_uri=progress.store, mlflow_experiment=progress.experiment, mlflow_run=progress.run)
    lines = []
    if waiting := pending_bytes(run):
        lines.append(
            f"tracking: {waiting / 1000:.1f} kB of {run.id} have not reached the store"
            f" ({progress.error or 'see sender.log there'}); they wait in {run.spool_dir} "
            "and are sent by the next run or by `just ui`"
        )
    if progress.refused:
        lines.append(f"tracking: {len(progress.refused)} records were refused, e.g. {progress.refused[0]}")
    return "\n".join(lines)


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    note = f" … ({len(text)} characters, see config.yaml)"
    return text[: length - len(note)] + note
