"""One writer at a time for a shard set, and readers that may wait for what a live writer has not finished yet."""

import fcntl
import os
import time
from pathlib import Path

from data.shard_index import ShardError

LOG_NAME = "writer.log"
LOCK_NAME = "writer.lock"
WAIT_S = 600.0
"""How long a reader waits for what a live writer has not finished."""

_POLL_S = 0.02


class WriterLock:
    """The right to write into `root`, held through a kernel lock: it ends with the process, however that ends.

    A lock on an open file needs no clean-up after a crash and cannot mistake a reused process number for a live
    writer; a child process that inherits the descriptor (`pass_fds`) holds it on after the parent has closed its own.
    """

    def __init__(self, root: Path, descriptor: int) -> None:
        self.root, self.descriptor = root, descriptor

    @classmethod
    def acquire(cls, root: Path) -> "WriterLock | None":
        """The lock, or None while another process holds it."""
        descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(10):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL_S)  # `is_written` holds it shared for a moment; a writer holds it much longer
            else:
                return cls(root, descriptor)
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Gives the right back (a child that inherited the descriptor keeps it)."""
        os.close(self.descriptor)

    def __enter__(self) -> "WriterLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_written(root: Path) -> bool:
    """True while some process holds the right to write into `root`."""
    try:
        descriptor = os.open(root / LOCK_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def wait_for(path: Path, *, timeout_s: float = WAIT_S) -> None:
    """Returns when `path`, in the root of a set that is being written, exists.

    Raises ShardError with the writer's last output if the writer has gone without making it, or after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if not is_written(path.parent) and not path.exists():
            raise ShardError(
                f"{path.name} is not there and nothing is writing {path.parent} any more; "
                f"{_last_output(path.parent)}. Start the command again: it goes on with what is missing"
            )
        if time.monotonic() > deadline:
            raise ShardError(f"waited {timeout_s:.0f} s for {path.name} in {path.parent}; {_last_output(path.parent)}")
        time.sleep(_POLL_S)


def _last_output(root: Path, *, num_lines: int = 15) -> str:
    try:
        lines = (root / LOG_NAME).read_text(errors="replace").splitlines()[-num_lines:]
    except FileNotFoundError:
        lines = []
    return "the writer's last output:\n" + "\n".join(lines) if lines else "the writer left no output"
