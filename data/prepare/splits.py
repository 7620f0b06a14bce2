"""Which clips are held out: whole files where a subset has many, the ends of files where it has few."""

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeVar

Item = TypeVar("Item")
Mode = Literal["train", "heldout", "tail", "longer_tail"]


class Splitter:
    """Decides for one file after the other, in `order`, so that no moment of a file is on both sides.

    A subset with at least 1 / share files holds out whole files, `share` of them. A file of a smaller subset is cut in
    time: its last windows are held out, `share` of them, and at least one until each of its subsets has one; windows
    that overlap the held-out ones are left out. A file that turns out to give nothing is replaced by the next.

    subsets: of each file, by name; the same names and share give the same split wherever the files lie.
    """

    def __init__(self, subsets: Mapping[str, tuple[str, ...]], share: float) -> None:
        self._subsets, self._share = subsets, share
        counts: dict[str, int] = {}
        for names in subsets.values():
            for name in names:
                counts[name] = counts.get(name, 0) + 1
        self._small = {name for name, count in counts.items() if share == 0 or count * share < 1}
        self._wanted = {name: math.ceil(count * share) for name, count in counts.items()}
        self._held = dict.fromkeys(counts, 0)

    @property
    def order(self) -> list[str]:
        """The files in the order to prepare them: shuffled by a hash of their names, the same for the same names."""
        return sorted(self._subsets, key=lambda name: hashlib.blake2b(name.encode()).digest())

    def mode(self, name: str) -> Mode:
        """Where the windows of a file go; `tail` and `longer_tail` (at least one window) are cut by `cut_tail`."""
        if self._share == 0:
            return "train"
        names = self._subsets[name]
        lacks = any(self._held[subset] < self._wanted[subset] for subset in names)
        if any(subset in self._small for subset in names):
            return "longer_tail" if lacks else "tail"
        return "heldout" if lacks else "train"

    def note(self, name: str, *, held_windows: int) -> None:
        """Takes note of what a file gave to the held-out split."""
        if held_windows:
            is_whole = not any(subset in self._small for subset in self._subsets[name])
            for subset in self._subsets[name]:
                self._held[subset] += is_whole or subset in self._small

    def cut_tail(self, items: Iterable[Item], *, gap: int, at_least_one: bool) -> Iterator[tuple[str, Item]]:
        """Windows in order -> (`train`, `heldout` or `gap`, window): the last held out, `gap` before them left out.

        Holds back only what may become held-out. A file too short for a window on each side is all for training.
        """
        waiting: deque[Item] = deque()
        count = 0
        for item in items:
            waiting.append(item)
            count += 1
            while len(waiting) > self._tail(count, gap, at_least_one) + gap:
                yield "train", waiting.popleft()
        held = self._tail(count, gap, at_least_one)
        for place, item in enumerate(waiting):
            from_end = len(waiting) - place
            yield ("heldout" if from_end <= held else "gap" if held else "train"), item

    def _tail(self, count: int, gap: int, at_least_one: bool) -> int:
        """Windows held out of `count`; grows by at most one with each."""
        held = max(math.floor(count * self._share + 0.5), int(at_least_one))
        return held if count > held + gap else max(0, min(held, count - gap - 1))
