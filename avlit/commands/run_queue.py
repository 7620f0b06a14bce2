"""Trains several runs at a time, each in a process of its own; small models gain more by that than by threads."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from avlit.errors import UserError

INTERRUPTED, STOPPED = 130, 143
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Job:
    """A run to train. name: unique, for people. needs: name of the one to be trained before. log: takes its output."""

    name: str
    needs: str | None
    log: Path


class JobFailedError(UserError):
    """A run failed in its own process; the message has the end of what it printed."""


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[str], int],
    *,
    at_once: int,
    done: set[str],
    on_start: Callable[[Job], None],
    on_end: Callable[[Job, float], None],
) -> int:
    """Run jobs in their order, each after the one that it needs, `at_once` at a time; returns the exit status.

    work: called with a job's name in a fresh process (so it can be pickled), returns that process's exit status.
    done: names that are finished already. on_start, on_end: told of every job here, the latter with its seconds.
    A signal is passed on to all that run, which save and end; the status is then 130 or 143. JobFailedError: one
    failed; those that run beside it end first.
    """
    context = get_context("spawn")
    waiting, running, done = list(jobs), dict[str, tuple[Job, BaseProcess, float]](), set(done)
    failed: Job | None = None
    with _noting_signals() as asked, _killed_with_us(running):
        told: int | None = None
        while running or (waiting and failed is None and not asked):
            ready = [job for job in waiting if job.needs is None or job.needs in done]
            if failed is None and not asked:
                for job in ready[: at_once - len(running)]:
                    waiting.remove(job)
                    on_start(job)
                    process = context.Process(target=_in_process, args=(work, job.name, str(job.log)))
                    process.start()
                    running[job.name] = job, process, time.monotonic()
            if asked and told != asked[-1]:
                told = asked[-1]
                for _, process, _ in running.values():
                    if process.pid is not None and process.is_alive():
                        os.kill(process.pid, told)
            connection.wait([process.sentinel for _, process, _ in running.values()], timeout=0.2)
            for name, (job, process, began) in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[name]
                if process.exitcode == 0:
                    done.add(name)
                    on_end(job, time.monotonic() - began)
                elif not asked and process.exitcode not in (INTERRUPTED, STOPPED):
                    failed = failed or job
                elif not asked:  # someone stopped this run alone: what needs it cannot go on
                    asked.append(signal.SIGTERM)
    if failed is not None:
        lines = failed.log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise JobFailedError(f"{failed.name}: failed; {failed.log} ends\n  " + "\n  ".join(lines[-12:]))
    if asked:
        return INTERRUPTED if asked[-1] == signal.SIGINT else STOPPED
    return 0


@contextmanager
def _killed_with_us(running: Mapping[str, tuple[Job, BaseProcess, float]]) -> Iterator[None]:
    """Inside, an exception, such as that of a second Ctrl-C, ends what is still running; it can be resumed."""
    try:
        yield
    except BaseException:
        for _, process, _ in running.values():
            process.kill()
        raise


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Inside, signals are collected; a second Ctrl-C ends everything at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _in_process(work: Callable[[str], int], name: str, log: str) -> None:
    os.setsid()  # a Ctrl-C reaches it through the first process alone: twice would mean at once
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        status = work(name)
    except UserError as error:
        print(error, file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)
