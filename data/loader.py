"""The training loader: micro-batches read ahead in a thread or in processes, and an account of waiting and damage."""

import logging
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from time import perf_counter
from typing import Any

import torch
from torchdata.nodes import BaseNode, IterableWrapper, Mapper, Prefetcher

from avlit.batch import AVBatch
from data.batches import BatchReader, ReaderSettings, Reading, pinned, reader_of
from data.sample import DamagedSample
from data.shards import ShardError

ALWAYS_ALLOWED = 8
"""Damaged samples that a run forgives before `max_bad`, a share, can be judged; none if `max_bad` is 0."""

_ENDLESS = 10**9
_log = logging.getLogger(__name__)


class TrainLoader:
    """Iterates AVBatches of steps start_step … steps - 1, `accumulate` micro-batches each.

    What it yields depends on the reader's settings and `start_step` alone; it has no state to save. Its length is that
    of the whole run, from step 0: Lightning compares it with its own count of batches, which goes on at a resume, and
    drops a batch at every resume of a loader without a length.

    workers=0 reads in one thread (files are read and checked outside the interpreter's lock). workers>0 reads in as
    many processes, for machines where decoding takes more than one core.
    max_bad: damaged samples are replaced, counted and logged until they are more than this share of those read in
    this run (and more than ALWAYS_ALLOWED); then a ShardError names them.
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
    ) -> None:
        self._reader, self._start_step, self._steps = reader, start_step, steps
        self._workers, self._prefetch, self._max_bad = workers, prefetch, max_bad
        self._pin_memory = pin_memory
        self.wait_s = self.first_wait_s = 0.0
        self.batches = self.samples = self.replaced = 0
        self.damaged: dict[tuple[str, str], str] = {}

    def __len__(self) -> int:
        return _ENDLESS if self._steps is None else self._steps * self._reader.settings.accumulate

    def __iter__(self) -> Iterator[AVBatch]:
        numbers = range(self._start_step * self._reader.settings.accumulate, len(self))
        workers = _ProcessReader(numbers, self._reader.settings, self._workers) if self._workers else None
        # not torchdata's ParallelMapper: its threads set torch to one thread for the whole process
        readings: BaseNode = workers or Mapper(IterableWrapper(numbers), self._read)
        if self._pin_memory:
            readings = Mapper(readings, _pinned)
        ahead = _ReadAhead(readings, prefetch_factor=self._prefetch, snapshot_frequency=0)
        try:
            yield from self._batches(ahead)
        finally:
            ahead.stop()
            if workers:
                workers.shut_down()

    def _batches(self, readings: BaseNode[Reading | ShardError]) -> Iterator[AVBatch]:
        is_first = True
        while True:
            began = perf_counter()
            try:
                reading = next(readings)
            except StopIteration:
                return
            waited = perf_counter() - began
            if is_first:
                self.first_wait_s, is_first = waited, False
            else:
                self.wait_s += waited
                self.batches += 1
            if isinstance(reading, ShardError):
                raise reading
            self._account(reading)
            yield reading.batch

    def _read(self, number: int) -> Reading | ShardError:
        return _read_or_error(self._reader, number)

    def _account(self, reading: Reading) -> None:
        """Counts in the order of the steps, so that a run stops at the same step however it was read."""
        self.samples += len(reading.batch)
        for damage in reading.damaged:
            self.replaced += 1
            if (damage.shard, damage.key) not in self.damaged:
                self.damaged[damage.shard, damage.key] = damage.reason
                _log.warning("damaged sample replaced at step %d: %s", reading.batch.step, damage)
        read = self.samples + self.replaced
        allowed = max(ALWAYS_ALLOWED, self._max_bad * read) if self._max_bad else 0
        if self.replaced > allowed:
            raise ShardError(
                f"{self.replaced} of {read} samples read were damaged; data.max_bad={self._max_bad} allows fewer:\n"
                + "\n".join(f"  {DamagedSample(*place, why)}" for place, why in list(self.damaged.items())[:10])
                + "\nPrepare these shards again, or raise data.max_bad to train on the rest"
            )


class _ReadAhead(Prefetcher[Reading | ShardError]):
    """torchdata's prefetch thread, with an end: left to the garbage collector it may be asked to join itself."""

    def stop(self) -> None:
        """Ends the thread."""
        self._it = None


class _ProcessReader(BaseNode[Reading | ShardError]):
    """Reads in worker processes, in order, two micro-batches ahead for each worker.

    An executor and not torchdata's process mapper, which waits for ever for a worker that the kernel has killed.
    """

    def __init__(self, numbers: range, settings: ReaderSettings, workers: int, *, timeout_s: float = 900.0) -> None:
        super().__init__()
        self._numbers, self._settings, self._workers, self._timeout_s = numbers, settings, workers, timeout_s
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[tuple[int, Future]] = deque()

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.shut_down()
        # forked from a clean server: a fork of this process could copy locks that its threads hold
        context = multiprocessing.get_context("forkserver")
        self._pool = ProcessPoolExecutor(self._workers, context, initializer=torch.set_num_threads, initargs=(1,))
        self._waiting = iter(self._numbers)
        for _ in range(2 * self._workers):
            self._submit()

    def next(self) -> Reading | ShardError:
        if not self._pending:
            self.shut_down()
            raise StopIteration
        number, future = self._pending.popleft()
        try:
            reading = future.result(self._timeout_s)
        except BrokenProcessPool:
            return ShardError(
                f"a data worker died while micro-batch {number} was read (out of memory?); "
                f"data.workers={self._workers} can be lowered, 0 reads in this process"
            )
        except FutureTimeoutError:
            return ShardError(
                f"micro-batch {number} was not read within {self._timeout_s:.0f} s; is the storage there?"
            )
        self._submit()
        return reading

    def get_state(self) -> dict[str, Any]:
        return {}

    def shut_down(self) -> None:
        """Ends the worker processes."""
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def __del__(self) -> None:
        self.shut_down()

    def _submit(self) -> None:
        assert self._pool is not None
        number = next(self._waiting, None)
        if number is not None:
            self._pending.append((number, self._pool.submit(_read_in_worker, self._settings, number)))


def _read_in_worker(settings: ReaderSettings, number: int) -> Reading | ShardError:
    return _read_or_error(reader_of(settings), number)


def _read_or_error(reader: BatchReader, number: int) -> Reading | ShardError:
    """Errors of the data travel as values: raised across threads they would lose their message in a traceback."""
    try:
        return reader(number)
    except ShardError as error:
        return error


def _pinned(reading: Reading | ShardError) -> Reading | ShardError:
    return pinned(reading) if isinstance(reading, Reading) else reading
