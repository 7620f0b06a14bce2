"""Which clips are held out: whole files where a subset has many, the ends of files where it has few."""

import hashlib
import math
from collections import Counter, deque
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
    speakers: of each file that names one; their files follow each other.
    are_utterances: the files are sounds that mean something as a whole only, so none is cut; each speaker with at least
    1 / share of them holds out `share` of them, the others together.
    """

    def __init__(
        self,
        subsets: Mapping[str, tuple[str, ...]],
        share: float,
        *,
        speakers: Mapping[str, str] | None = None,
        are_utterances: bool = False,
    ) -> None:
        self._speakers = speakers or {}
        self._subsets, self._share = _of_speakers(subsets, self._speakers, share) if are_utterances else subsets, share
        counts = Counter(name for names in self._subsets.values() for name in names)
        self._small = {name for name, count in counts.items() if share == 0 or count * share < 1}
        self._wanted = {name: math.ceil(count * share) for name, count in counts.items()}
        if are_utterances:
            self._small = set()
            self._wanted = {name: min(wanted, counts[name] - 1) for name, wanted in self._wanted.items()}
        self._held = dict.fromkeys(counts, 0)

    @property
    def order(self) -> list[str]:
        """The files in the order to prepare them: shuffled by a hash of their names, the same for the same names."""
        return sorted(self._subsets, key=lambda name: (_digest(self.speaker(name)), _digest(name)))

    def speaker(self, name: str) -> str:
        """Whose sound a file holds: the speaker, or the file itself where it names none."""
        return f"speaker {self._speakers[name]}" if self._speakers.get(name) else name

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


def _of_speakers(
    subsets: Mapping[str, tuple[str, ...]], speakers: Mapping[str, str], share: float
) -> dict[str, tuple[str, ...]]:
    """Name -> its subsets, each with its speaker where that has enough files to hold out some."""
    counts = Counter((subset, speakers.get(name)) for name, names in subsets.items() for subset in names)

    def group(subset: str, speaker: str | None) -> str:
        return f"{subset} of {speaker}" if speaker and counts[subset, speaker] * share >= 1 else subset

    return {name: tuple(group(subset, speakers.get(name)) for subset in names) for name, names in subsets.items()}


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode()).digest()
