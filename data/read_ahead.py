"""A thread that reads ahead of training, with an end and a time limit."""

import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_JOIN_S = 1.0


class ReadAhead(Generic[_Item]):
    """Takes up to `depth` items from `items` ahead of whoever asks, in a daemon thread.

    Not torchdata's Prefetcher, whose `next` waits for ever. A thread that hangs in a read cannot be ended, but as a
    daemon it does not keep the process from ending.
    """

    def __init__(self, items: Iterator[_Item], *, depth: int) -> None:
        self._items = items
        self._ready: SimpleQueue[_Item | _Raised] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="avlit-read-ahead", daemon=True)
        self._thread.start()

    def get(self, timeout_s: float | None = None) -> _Item:
        """The next item. TimeoutError after `timeout_s`; an error of `items` is raised here, in its turn."""
        try:
            item = self._ready.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError from None
        self._room.release()
        if isinstance(item, _Raised):
            raise item.error
        return item

    def stop(self) -> None:
        """Ends the thread after the item it is at; one that hangs is left behind."""
        self._is_stopped = True
        self._room.release()
        if threading.current_thread() is not self._thread:  # the garbage collector may call from any thread
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while True:
            self._room.acquire()
            if self._is_stopped:
                return
            try:
                self._ready.put(next(self._items))
            except BaseException as error:
                self._ready.put(_Raised(error))
                return


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
