"""Words with the times at which they are spoken, from which those of a window are told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard


@dataclass(frozen=True)
class TimedWord:
    """A word and when it is spoken, in seconds of the clip."""

    word: str
    start_s: float
    end_s: float


def timed_words(given: object) -> tuple[TimedWord, ...]:
    """A record's `words`, [{`word`, `start_s`, `end_s`}] or None -> the words; ValueError names the entry."""
    if given is None:
        return ()
    form = "words: must be a list of {word, start_s, end_s}"
    if not isinstance(given, list):
        raise ValueError(form)
    words = []
    for number, each in enumerate(given, start=1):
        start_s, end_s = (each.get("start_s"), each.get("end_s")) if isinstance(each, Mapping) else (None,) * 2
        if not _is_time(start_s) or not _is_time(end_s):
            raise ValueError(f"{form}, in seconds; entry {number} is {each!r:.80}")
        word = each.get("word")
        if not isinstance(word, str) or not word.strip() or not 0 <= start_s <= end_s:
            raise ValueError(f"words: entry {number}, {each!r:.80}: needs a word, and 0 <= start_s <= end_s")
        words.append(TimedWord(" ".join(word.split()), float(start_s), float(end_s)))
    return tuple(words)


def _is_time(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def words_between(words: Sequence[TimedWord], start_s: float, end_s: float) -> str:
    """The words whose middle lies in a stretch of the clip, as they are spoken; "" where there are none."""
    return " ".join(each.word for each in words if start_s <= (each.start_s + each.end_s) / 2 < end_s)
