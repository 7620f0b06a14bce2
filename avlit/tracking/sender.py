"""Sends a run's spool to its MLflow store, in a process of its own beside training, or later as a replay.

Whatever the store does (away, slow, hanging, dying between taking a record and saying so), the spool keeps everything
and `drained.json` never claims more than what was acknowledged.
"""

import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avlit.runs import Run, RunNotFoundError, find_run, list_runs
from avlit.tracking.spool import FILES, LARGEST, POINTS, Progress, Session, exclusive, pending_bytes, read_records
from avlit.tracking.store import make_store
from avlit.tracking.tracker import delivery

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LOCK = "sender.lock"
INTERVAL_S, SLOWEST_S, CLOSING_S = 1.0, 5.0, 0.5
PATIENCE = 3
"""Failures in a row after which a sender whose training has ended leaves the rest to a replay."""
# A request that hangs must not hold up the end of a run; MLflow's own are 120 s and 7 retries.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
METRICS_PER_REQUEST, VALUES_PER_REQUEST = 500, 100  # MLflow takes 1000 and 100


class NothingToSendError(ValueError):
    """The run has no spool: it was never tracked."""


class Sender:
    """Sends one run's records; `advance` goes on where the last acknowledged one ended. Made while holding the lock."""

    def __init__(self, run: Run):
        self.run = run
        self.progress = Progress.read(run.spool_dir)
        self.session = _last_session(run)
        self._is_attached = False
        if self.session.store != self.progress.store:
            self.progress = Progress(store=self.session.store)
            self.progress.write(run.spool_dir)

    @cached_property
    def client(self) -> "MlflowClient":
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        for name in ("mlflow", "alembic", "urllib3"):  # migrations and retries are no news
            logging.getLogger(name).setLevel(logging.ERROR)
        from mlflow.tracking import MlflowClient

        store = self.session.store
        if store.startswith("sqlite:///"):
            make_store(Path(store.removeprefix("sqlite:///")))
        return MlflowClient(store)

    @cached_property
    def failures(self) -> tuple[type[Exception], ...]:
        """What a store raises that is away or broken."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        return MlflowException, RequestException, SQLAlchemyError, OSError

    def advance(self) -> bool:
        """Send all that waits; False, with the reason in `drained.json`, where the store did not take it."""
        try:
            if not self._is_attached:
                self._attach()
            self._send_all(POINTS, self._send_points)
            self._send_all(FILES, self._send_files)
        except self.failures as error:
            self._is_attached = False
            self._note(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300])
            return False
        self._note("")
        return True

    def _note(self, reason: str) -> None:
        if reason != self.progress.error:
            self.progress.error = reason
            self.progress.write(self.run.spool_dir)

    def _attach(self) -> None:
        experiment, run_id = _find_or_create(self.client, self.run, self.session)
        if run_id != self.progress.run:  # first time, or the store was emptied or the run deleted: from the start
            self.progress = Progress(store=self.session.store, experiment=experiment, run=run_id)
            self.progress.write(self.run.spool_dir)
        self._is_attached = True

    def _send_all(self, name: str, send: Callable[[list[tuple[dict, str]]], None]) -> None:
        while True:
            before = deepcopy(self.progress)
            records, end = read_records(self.run.spool_dir / name, self.progress.sent[name])
            if end == before.sent[name]:
                return
            try:
                send(records)
            except BaseException:
                self.progress = before  # the whole block is sent again, with the marks it began with
                raise
            self.progress.sent[name] = end
            self.progress.write(self.run.spool_dir)

    def _send_points(self, records: list[tuple[dict, str]]) -> None:
        points: list[Any] = []
        for record, problem in records:
            if problem:
                self._refuse(problem)
            elif "m" in record:
                points += self._new_points(record)
            else:
                self._send_rest(record)
        for start in range(0, len(points), METRICS_PER_REQUEST):
            self._send_metrics(points[start : start + METRICS_PER_REQUEST])

    def _new_points(self, record: dict) -> list[Any]:
        from mlflow.entities import Metric

        marks, floor, step = self.progress.marks, self.progress.floor, record["s"]
        new = []
        for name, value in record["m"].items():
            if step > floor.get(name, -1):
                marks[name] = max(step, marks.get(name, -1))
                new.append(Metric(name, value, record["t"], step))
        return new

    def _send_metrics(self, points: list[Any]) -> None:
        self._try_all_or_each(points, lambda some: self.client.log_batch(self.progress.run, metrics=some))

    def _send_rest(self, record: dict) -> None:
        from mlflow.entities import Param, RunTag

        run_id = self.progress.run
        if "open" in record:
            marks = self.progress.marks if record["open"]["is_resumed"] else {}
            redone_from = record["open"]["redone_from"]
            limit = LARGEST if redone_from is None else redone_from
            self.progress.floor = {name: min(step, limit) for name, step in marks.items()}
            self.client.update_run(run_id, status="RUNNING")
        elif "tags" in record:
            tags = [RunTag(key, value) for key, value in record["tags"].items()]
            self._in_requests(tags, lambda some: self.client.log_batch(run_id, tags=some))
        elif "params" in record:
            known = self.client.get_run(run_id).data.params
            params = [Param(key, value) for key, value in record["params"].items() if key not in known]
            self._in_requests(params, lambda some: self.client.log_batch(run_id, params=some))
            # A param can be set once only; a resume that was allowed to change one says so in a tag.
            changed = {k: v for k, v in record["params"].items() if known.get(k, v) != v}
            self._in_requests(
                [RunTag(f"changed.{key}", value) for key, value in changed.items()],
                lambda some: self.client.log_batch(run_id, tags=some),
            )
        elif "end" in record:
            self.client.set_terminated(run_id, status=record["end"], end_time=record["t"])

    def _in_requests(self, items: list[Any], send: Callable[[list[Any]], object]) -> None:
        for start in range(0, len(items), VALUES_PER_REQUEST):
            self._try_all_or_each(items[start : start + VALUES_PER_REQUEST], send)

    def _try_all_or_each(self, items: list[Any], send: Callable[[list[Any]], object]) -> None:
        """Send together; where the store will not take one of them, ever, send each and note the refused."""
        from mlflow.exceptions import MlflowException

        try:
            send(items)
            return
        except MlflowException as error:
            if not self._is_refusal(error):
                raise
        for item in items:
            try:
                send([item])
            except MlflowException as error:
                if not self._is_refusal(error):
                    raise
                self._refuse(f"{item.key}={item.value}: {str(error)[:200]}")

    def _is_refusal(self, error: Any) -> bool:
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            return False
        # A deleted run answers in the same way, and is no reason to drop a point.
        return self.client.get_run(self.progress.run).info.lifecycle_stage == "active"

    def _refuse(self, reason: str) -> None:
        if len(self.progress.refused) < 100:
            self.progress.refused.append(reason)

    def _send_files(self, records: list[tuple[dict, str]]) -> None:
        for record, problem in records:
            path = (self.run.path / record.get("file", "")).resolve()
            if problem or "file" not in record:
                self._refuse(problem or f"{FILES}: not a file's record")
            elif not path.is_relative_to(self.run.path):
                # The folder may come from anywhere; what it names must not leave this machine.
                self._refuse(f"{path}: is not in the run's folder")
            elif not path.is_file():
                self._refuse(f"{path}: the file is gone")
            else:
                self.client.log_artifact(self.progress.run, str(path), record["to"] or None)


def _last_session(run: Run) -> Session:
    offset, session = 0, None
    while True:
        records, end = read_records(run.spool_dir / POINTS, offset)
        if end == offset:
            break
        session = next((Session(**record["open"]) for record, _ in reversed(records) if "open" in record), session)
        offset = end
    if session is None:
        raise NothingToSendError(f"run={run.id}: nothing was ever logged in {run.spool_dir}")
    return session


def _find_or_create(client: "MlflowClient", run: Run, session: Session) -> tuple[str, str]:
    """(experiment id, MLflow run id) of a run, found by its tag; a parent is made by whoever needs it first."""
    experiment = _experiment(client, session.experiment, session.store)
    if (found := _find(client, experiment, run.id)) is not None:
        return experiment, found
    tags = {"avlit_id": run.id}
    if parent := _parent_run(client, run, session):
        tags["mlflow.parentRunId"] = parent
    started = round(datetime.fromisoformat(session.created).timestamp() * 1000)
    with exclusive(run.spool_dir / "create.lock") as is_mine:
        if not is_mine:
            raise BlockingIOError(f"another process makes the MLflow run of {run.id}")
        if (found := _find(client, experiment, run.id)) is not None:
            return experiment, found
        made = client.create_run(experiment, start_time=started, tags=tags, run_name=session.name)
        return experiment, made.info.run_id


def _find(client: "MlflowClient", experiment: str, avlit_id: str) -> str | None:
    found = client.search_runs([experiment], f"tags.avlit_id = '{avlit_id}'", max_results=1)
    return found[0].info.run_id if found else None


def _parent_run(client: "MlflowClient", run: Run, session: Session) -> str | None:
    if not session.parent:
        return None
    try:
        parent = find_run(run.path.parent, session.parent)
        parent_session = _last_session(parent)
    except (RunNotFoundError, NothingToSendError):
        return None  # moved away, or not tracked: the child stands alone
    if parent_session.store != session.store:
        return None
    return _find_or_create(client, parent, parent_session)[1]


def _experiment(client: "MlflowClient", name: str, store: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if store.startswith("sqlite:///"):
            # Beside the file, whatever folder a later command runs in.
            folder = re.sub(r"[^\w-]", "_", name)  # a name with dots and slashes could lead out of mlruns/
            location = (Path(store.removeprefix("sqlite:///")).parent / "mlruns" / folder).as_uri()
        return client.create_experiment(name, artifact_location=location)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def replay(run: Run, *, timeout_s: float = 60.0) -> str:
    """Send what a run's own sender could not; returns "" when all has arrived, else what has not and why.

    NothingToSendError: the run was never tracked.
    """
    end = time.monotonic() + timeout_s
    with exclusive(run.spool_dir / LOCK) as is_mine:
        if not is_mine:
            return f"tracking: {run.id} is being sent by its own process"
        sender = Sender(run)
        for attempt in range(1, PATIENCE + 1):
            if sender.advance() or time.monotonic() > end:
                break
            time.sleep(CLOSING_S * attempt)
    return delivery(run)


def replay_all(runs_dir: Path, store: str, *, but: str = "") -> list[str]:
    """Replay every run in `runs_dir` that waits for `store`; returns what still has not arrived."""
    messages = []
    for run in list_runs(runs_dir):
        if run.id == but or not pending_bytes(run):
            continue
        try:
            if _last_session(run).store == store and (message := replay(run)):
                messages.append(message)
        except NothingToSendError:
            continue
    return messages


def send_until_over(run_path: str) -> int:
    """Send until training ends (its end of stdin closes) and all has arrived, or nothing works any more."""
    os.nice(10)  # training has the cores first
    run = find_run(Path(run_path).parent, run_path)
    parent = os.getppid()
    is_over = False
    while True:
        with exclusive(run.spool_dir / LOCK) as is_mine:
            if is_mine:
                return _send_until_over(Sender(run), parent)
        if is_over:
            return 1
        is_over = _is_over(CLOSING_S, parent)  # the sender of a killed run is still at its last records


def _send_until_over(sender: Sender, parent: int) -> int:
    failed, is_over, has_replayed = 0, False, False
    while True:
        is_sent = sender.advance()
        failed = 0 if is_sent else failed + 1
        if is_over and (is_sent or failed == PATIENCE):
            return int(not is_sent)
        if is_sent and not has_replayed:
            has_replayed = True
            replay_all(sender.run.path.parent, sender.session.store, but=sender.run.id)
        if is_over:
            time.sleep(CLOSING_S)
        elif _is_over(min(INTERVAL_S * 2**failed, SLOWEST_S), parent):
            is_over, failed = True, 0


def _is_over(wait_s: float, parent: int) -> bool:
    """Wait, at most `wait_s`, for training to end: its end of the pipe closes, or the process is no longer there."""
    readable, _, _ = select.select([sys.stdin], [], [], wait_s)
    return bool(readable) or os.getppid() != parent
