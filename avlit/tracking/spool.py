"""The spool: what a run has to tell MLflow, as lines of JSON on the local disk, and how much of it has arrived.

Training only appends here, which takes microseconds and cannot hang; `tracking` sends it on from another process.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path

from avlit.durable import write_atomically
from avlit.runs import Run

POINTS, FILES, PROGRESS = "metrics.jsonl", "artifacts.jsonl", "drained.json"
READ_BYTES = 4 << 20
LARGEST = 1 << 62  # stores keep steps and times as 64-bit integers


@dataclass(frozen=True)
class Session:
    """The first record of every process that logs into a spool: what is being logged, and to where.

    store: see `tracker.store_uri`. name: of the MLflow run. parent: id of the run that this one is a part of.
    created: of the run, as ISO 8601. is_resumed: points of steps that were logged before are repetitions, but for those
    after the step `redone_from`, where one is given: the run was changed there.
    """

    store: str
    experiment: str
    name: str
    parent: str | None
    created: str
    is_resumed: bool
    redone_from: int | None


class SpoolWriter:
    """Appends records to one file. A full disk costs records, counted in `lost`, never the run."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lost = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._descriptor).st_size
        # A process killed in the middle of a line left it without its end.
        self._is_torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def append(self, record: dict[str, object]) -> None:
        """One record, one line, one write."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if self._is_torn:
            line = b"\n" + line
        try:
            written = os.write(self._descriptor, line)
        except OSError:
            self.lost += 1
            return
        self._is_torn = written < len(line)
        self.lost += self._is_torn

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass
class Progress:
    """drained.json: how far the spool has reached one store.

    store, experiment, run: where it goes. sent: bytes of each spool file that have arrived.
    marks: the highest step seen of each metric; floor: the marks when the last resume began, below which points are
    repetitions. refused: records the store will never take. error: why the last attempt failed.
    """

    store: str = ""
    experiment: str = ""
    run: str = ""
    sent: dict[str, int] = field(default_factory=lambda: {POINTS: 0, FILES: 0})
    marks: dict[str, int] = field(default_factory=dict)
    floor: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    error: str = ""

    def write(self, spool_dir: Path) -> None:
        write_atomically(spool_dir / PROGRESS, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, spool_dir: Path) -> "Progress":
        """What is stored; nothing has arrived where there is no such file or it is damaged: sending twice is safe."""
        try:
            values = json.loads((spool_dir / PROGRESS).read_text(encoding="utf-8"))
            progress = cls(**{item.name: values[item.name] for item in fields(cls)})
            if progress.sent.keys() != {POINTS, FILES}:
                return cls()
            for counts in (progress.sent, progress.marks, progress.floor):
                if not all(type(count) is int and count >= 0 for count in counts.values()):
                    return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()
        return progress


def pending_bytes(run: Run) -> int:
    """Bytes of a run's spool that have not arrived; a line without its end is none."""
    total = 0
    for name, sent in Progress.read(run.spool_dir).sent.items():
        path = run.spool_dir / name
        if path.exists() and path.stat().st_size > sent:
            with open(path, "rb") as file:
                file.seek(sent)
                total += file.read().rfind(b"\n") + 1
    return total


def read_records(path: Path, offset: int) -> tuple[list[tuple[dict, str]], int]:
    """Whole lines from `offset` on, as (record, "") or ({}, why it is none), and the offset after them."""
    if not path.exists():
        return [], offset
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(READ_BYTES)
        while b"\n" not in block and (more := file.read(READ_BYTES)):
            block += more
    block = block[: block.rfind(b"\n") + 1]
    records: list[tuple[dict, str]] = []
    for line in block.splitlines():
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and is_record(record):
            records.append((record, ""))
        else:
            records.append(({}, f"not a record: {line[:80]!r}"))
    return records, offset + len(block)


def is_record(value: dict) -> bool:
    """Whether a line of a spool is one that a tracker writes; a run's folder may come from anywhere."""
    match value:
        case {"t": int(time_ms), "s": int(step), "m": dict(metrics)}:
            is_in_range = 0 <= time_ms < LARGEST and 0 <= step < LARGEST
            return is_in_range and all(type(metric) in (int, float) for metric in metrics.values())
        case {"tags": dict(texts)} | {"params": dict(texts)}:
            return all(isinstance(text, str) for text in texts.values())
        case {"open": dict(session)}:
            return is_session(session)
        case {"end": str(status), "t": int(time_ms)}:
            return status in ("RUNNING", "FINISHED", "KILLED", "FAILED") and 0 <= time_ms < LARGEST
        case {"file": str(), "to": str(folder)}:
            return not folder.startswith("/") and ".." not in folder.split("/")
    return False


def is_session(values: dict[str, object]) -> bool:
    """Whether these are a Session's values."""
    if values.keys() != {item.name for item in fields(Session)} or not isinstance(values["is_resumed"], bool):
        return False
    redone_from = values["redone_from"]
    if redone_from is not None and not (type(redone_from) is int and 0 <= redone_from < LARGEST):
        return False
    others = [(name, value) for name, value in values.items() if name not in ("is_resumed", "redone_from")]
    texts = [value for name, value in others if (name, value) != ("parent", None)]
    if not all(isinstance(text, str) for text in texts):
        return False
    try:
        datetime.fromisoformat(str(values["created"]))
    except ValueError:
        return False
    return True


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the lock file inside; the lock goes with the process, however it ends."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
