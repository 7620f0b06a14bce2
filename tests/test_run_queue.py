"""Runs side by side: order, signals and failures, with processes that only sleep and write."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from avlit.commands.run_queue import Job, JobFailedError, run_jobs
from avlit.errors import UserError


def work(folder: str, name: str) -> int:
    """Note when the job begins and ends; wait in between until a file named `go` is there."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    place = Path(folder)
    (place / f"{name}-began").write_text(str(time.monotonic()))
    print(f"{name} says so")
    while not (place / "go").exists() and not asked:
        time.sleep(0.01)
    if name.startswith("bad"):
        raise UserError("lr=x: must be a number")
    (place / f"{name}-ended").write_text(str(time.monotonic()))
    return 130 if signal.SIGINT in asked else 143 if asked else 0


def jobs(folder: Path, **needs: str | None) -> list[Job]:
    return [Job(name, other, folder / f"{name}.txt") for name, other in needs.items()]


def run(folder: Path, todo: list[Job], *, done: set[str] | None = None, ended: list[str] | None = None) -> int:
    return run_jobs(
        todo,
        partial(work, str(folder)),
        at_once=2,
        done=done or set(),
        on_start=lambda job: None,
        on_end=lambda job, seconds: (ended if ended is not None else []).append(job.name),
    )


def when(folder: Path, name: str) -> float:
    return float((folder / name).read_text())


def test_two_jobs_run_at_a_time_each_after_the_one_it_needs(tmp_path: Path):
    opener = threading.Thread(target=open_when_two_began, args=(tmp_path,))
    opener.start()
    ended: list[str] = []
    todo = jobs(tmp_path, a=None, b="a", c="x")
    assert run(tmp_path, todo, done={"x"}, ended=ended) == 0
    opener.join()
    assert sorted(ended) == ["a", "b", "c"]
    assert when(tmp_path, "b-began") >= when(tmp_path, "a-ended")
    assert when(tmp_path, "c-began") < when(tmp_path, "a-ended")  # `a` waited for it, by the file
    assert (tmp_path / "a.txt").read_text() == "a says so\n"


def open_when_two_began(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not ((folder / "a-began").exists() and (folder / "c-began").exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    (folder / "go").touch()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_that_run_and_starts_no_more(tmp_path: Path, number: signal.Signals, status: int):
    def send() -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*-began"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    before = signal.getsignal(number)
    assert run(tmp_path, jobs(tmp_path, a=None, b=None, c=None)) == status
    sender.join()
    assert sorted(path.name for path in tmp_path.glob("*-ended")) == ["a-ended", "b-ended"]
    assert signal.getsignal(number) is before


def test_a_failure_is_told_with_the_end_of_what_was_printed_and_no_more_start(tmp_path: Path):
    (tmp_path / "go").touch()
    with pytest.raises(JobFailedError, match=r"bad: failed; .*bad\.txt ends\n(.*\n)*  lr=x: must be a number"):
        run(tmp_path, jobs(tmp_path, bad=None, b=None, c="bad"))
    assert sorted(path.name for path in tmp_path.glob("*-ended")) == ["b-ended"]
