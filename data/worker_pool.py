"""Worker processes that read micro-batches in order, and are started again when they die or hang."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from data.batches import ReaderSettings, Reading, reader_of
from data.shards import ShardError

_Result = TypeVar("_Result")
_START_S = 120.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_log = logging.getLogger(__name__)


class WorkerPool:
    """Reads micro-batches `numbers` in `workers` processes, `depth` ahead of the one asked for.

    timeout_s: how long a micro-batch is waited for before its worker is taken for hung and killed.
    max_restarts: how often the processes are started again, from the first micro-batch not handed out yet.
    describe: micro-batch number -> what is read for it, for messages.

    An executor and not torchdata's process mapper, which waits for ever for a worker that the kernel has killed.
    """

    def __init__(
        self,
        settings: ReaderSettings,
        numbers: range,
        *,
        workers: int,
        depth: int,
        timeout_s: float,
        max_restarts: int,
        describe: Callable[[int], str],
    ) -> None:
        self._settings, self._numbers, self._workers, self._depth = settings, numbers, workers, depth
        self._timeout_s, self._max_restarts, self._describe = timeout_s, max_restarts, describe
        self._restarts = 0
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[Future[Reading]] = deque()
        self._is_shut_down = False

    def readings(self) -> Iterator[Reading]:
        """Every micro-batch in turn; the same whatever happens to the workers.

        Raises ShardError when they die or hang once more than `max_restarts` allows, and whatever reading raises.
        """
        for number in self._numbers:
            while True:
                try:
                    reading = self._read(number)
                    break
                except (BrokenProcessPool, CancelledError):
                    if self._is_shut_down:
                        return
                    self._begin_again(number, "a reading process died")
                except _Hung as hung:
                    self._begin_again(number, str(hung))
            yield reading

    def shut_down(self) -> None:
        """Ends the processes, also those that hang."""
        self._is_shut_down = True
        self._kill()

    def __del__(self) -> None:
        self._kill()

    def _read(self, number: int) -> Reading:
        pool = self._pool
        if pool is None:
            # forked from a clean server: a fork of this process could copy locks that its threads hold
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["__main__", __name__])  # torch is imported once, not in every worker
            pool = self._pool = ProcessPoolExecutor(self._workers, context, initializer=_start_worker)
            if self._is_shut_down:  # meanwhile, by the training thread
                self._kill()
            self._opening = pool.submit(_open, self._settings)
        while len(self._pending) < min(self._depth, self._numbers.stop - number):
            self._pending.append(pool.submit(_read, self._settings, number + len(self._pending)))
        # a new process imports torch first, which is no hang
        _result_of(self._opening, within_s=_START_S + self._timeout_s)
        reading = _result_of(self._pending[0], within_s=self._timeout_s)
        self._pending.popleft()
        return reading

    def _begin_again(self, number: int, what: str) -> None:
        self._kill()
        place = self._describe(number)
        if self._restarts >= self._max_restarts:
            raise ShardError(
                f"{place}: {what}; the reading processes were started again {self._restarts} times before "
                f"(data.max_restarts={self._max_restarts}). If memory ran out, lower data.workers={self._workers} or "
                f"data.prefetch (data.workers=0 reads in this process); if the storage is slow, raise "
                f"data.timeout_s={self._timeout_s:g}. The run can then be resumed"
            )
        self._restarts += 1
        _log.warning(
            "%s: %s; the reading processes are started again and go on from there (%d of data.max_restarts=%d)",
            place,
            what,
            self._restarts,
            self._max_restarts,
        )

    def _kill(self) -> None:
        self._pending.clear()
        pool, self._pool = self._pool, None
        if pool is not None:
            processes = pool._processes or {}  # `pool.kill_workers` does this from Python 3.14 on
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(processes.values()):  # not asked to end: one that hangs would keep this process here
                process.kill()


class _Hung(Exception):
    """A worker that did not give its result in time."""


def _result_of(future: Future[_Result], *, within_s: float) -> _Result:
    try:
        return future.result(within_s)
    except TimeoutError:
        if future.done():  # the worker's own error
            raise
        raise _Hung(f"not read within {within_s:g} s") from None


def _start_worker() -> None:
    torch.set_num_threads(1)
    for number in _SIGNALS:  # sent to a whole group of processes they are the training process's to answer
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker would wait for ever for work from a training process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _open(settings: ReaderSettings) -> None:
    reader_of(settings)


def _read(settings: ReaderSettings, number: int) -> Reading:
    return reader_of(settings)(number)
