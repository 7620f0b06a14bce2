"""The training loader: micro-batches read ahead in a thread or in processes, and an account of waiting and damage."""

from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any

from avlit.batch import AVBatch
from data.account import Account
from data.batches import BatchReader, Reading, pinned
from data.live_writer import WAIT_S
from data.read_ahead import ReadAhead
from data.shards import ShardError
from data.worker_pool import WorkerPool

_ENDLESS = 10**9


class TrainLoader:
    """Iterates AVBatches of steps start_step … steps - 1, `accumulate` micro-batches each.

    What it yields depends on the reader's settings and `start_step` alone. It has a length because Lightning reads a
    batch ahead, and drops one, of a loader without; that of the whole run, from step 0, is enough to never end early.

    workers=0 reads in one thread (files are read and checked outside the interpreter's lock). workers>0 reads in as
    many processes, for machines where decoding takes more than one core.
    timeout_s: how long a micro-batch is waited for (and WAIT_S longer where the shards may still be in the making).
    A thread that has not read it by then hangs, which is a ShardError; processes are started again, `max_restarts`
    times in a run, when they hang or die.
    max_bad: damaged samples are replaced, counted and logged until they are more than this share of those read in
    this run, see `Account`; then a ShardError names them. counted: the account of the run that is resumed.
    wait_s, batches: seconds that the consumer waited, and micro-batches it got, after the first;
    first_wait_s: seconds until the first.
    """

    def __init__(
        self,
        reader: BatchReader,
        *,
        start_step: int = 0,
        steps: int | None = None,
        workers: int = 0,
        prefetch: int = 4,
        max_bad: float = 0.001,
        pin_memory: bool = False,
        timeout_s: float = 300.0,
        max_restarts: int = 3,
        counted: Mapping[str, Any] | None = None,
    ) -> None:
        self._reader, self._start_step, self._steps = reader, start_step, steps
        self._workers, self._prefetch, self._max_bad = workers, prefetch, max_bad
        self._pin_memory, self._timeout_s, self._max_restarts = pin_memory, timeout_s, max_restarts
        self.account = Account(counted)
        self.wait_s = self.first_wait_s = 0.0
        self.batches = 0

    def __len__(self) -> int:
        return _ENDLESS if self._steps is None else self._steps * self._reader.settings.accumulate

    def __iter__(self) -> Iterator[AVBatch]:
        numbers = range(self._start_step * self._reader.settings.accumulate, len(self))
        limit_s = self._timeout_s + (WAIT_S if self._reader.shards.is_growing else 0)
        pool = self._pool(numbers, limit_s) if self._workers else None
        readings = pool.readings() if pool else map(self._reader, numbers)
        ahead = ReadAhead(map(pinned, readings) if self._pin_memory else readings, depth=self._prefetch)
        try:
            for number in numbers:
                reading = self._next(ahead, number, limit_s=None if pool else limit_s)
                self.account.add(reading, max_bad=self._max_bad)
                if (number + 1) % self._reader.settings.accumulate == 0:
                    self.account.settle()
                yield reading.batch
        finally:
            if pool:
                pool.shut_down()
            ahead.stop()

    def _pool(self, numbers: range, limit_s: float) -> WorkerPool:
        return WorkerPool(
            self._reader.settings,
            numbers,
            workers=self._workers,
            depth=2 * self._workers,
            timeout_s=limit_s,
            max_restarts=self._max_restarts,
            describe=self._reader.describe,
        )

    def _next(self, ahead: ReadAhead[Reading], number: int, *, limit_s: float | None) -> Reading:
        began = perf_counter()
        try:
            reading = ahead.get(limit_s)
        except TimeoutError:
            raise ShardError(
                f"{self._reader.describe(number)}: not read within {limit_s:g} s; does the storage still answer? If it "
                f"is slow, raise data.timeout_s={self._timeout_s:g}. The run can then be resumed"
            ) from None
        waited = perf_counter() - began
        if number == self._start_step * self._reader.settings.accumulate:
            self.first_wait_s = waited
        else:
            self.wait_s += waited
            self.batches += 1
        return reading
