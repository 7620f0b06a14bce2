"""Reference voices cut from a clip's own file, where the window is not (MMControl, Section 4.1), or given beside it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from avlit.media import MediaError, read_audio
from data.encode import Encoders
from data.prepare.controls import beside
from data.prepare.descriptions import Rejected
from data.prepare.windows import reason, silence
from data.sample import MAX_REFERENCES

LEAST_CLIP_S = 2.0
"""Shorter clips are left out: what a window leaves of them is no voice (MMControl, Section 4.1)."""

LEAST_S = 0.1
"""A shorter reference is no word."""

ROUNDING_S = 1e-6

REFERENCE_FILE = "reference.wav"
"""After a clip's name: a sound of its speaker that is used instead."""


class OwnReferences:
    """Sounds of one file's speaker, for each of its windows. Raises Rejected where the file is too short for any.

    duration_s: of the file. reference_s: the longest reference. only_before: what comes before a window is taken
    wherever there is any, as for files whose end is held out.
    """

    def __init__(
        self, path: Path, *, rate_hz: int, duration_s: float, reference_s: float, only_before: bool = False
    ) -> None:
        self._path, self._rate_hz, self._duration_s, self._reference_s = path, rate_hz, duration_s, reference_s
        self._only_before = only_before
        self._given: np.ndarray | None = None
        if (given := beside(path, REFERENCE_FILE)).exists():
            try:
                self._given = read_audio(given, rate_hz, duration_s=reference_s)
            except MediaError as error:
                raise Rejected(f"{given.name}: {reason(given, error)}") from error
            if len(self._given) < LEAST_S * rate_hz:
                raise Rejected(f"{given.name}: {len(self._given) / rate_hz:.3f} s long; a voice needs {LEAST_S:g} s")
            if why := silence(self._given):
                raise Rejected(f"{given.name}: {why}")
        elif duration_s < LEAST_CLIP_S - ROUNDING_S:
            raise Rejected(
                f"{duration_s:.2f} s, less than {LEAST_CLIP_S:g} s: too short for a reference voice apart from the "
                f"window; lay one beside it as {given.name}"
            )

    def of_window(self, start_s: float, end_s: float) -> tuple[tuple[np.ndarray, ...], float]:
        """(up to three sounds [N] in [-1, 1], where in the file the last of them ends) of a window at those seconds.

        The window and the sounds have no moment in common. Sounds are of the whole length wherever one of that is
        left, those nearest to the window; else the longest rest is the only one. Rejected where all is silent or none
        is left.
        """
        if self._given is not None:
            return (self._given,), 0.0
        sounds: list[np.ndarray] = []
        last_s, why = 0.0, ""
        for piece_start_s, piece_end_s in self._pieces(start_s, end_s):
            try:
                sound = read_audio(
                    self._path, self._rate_hz, start_s=piece_start_s, duration_s=piece_end_s - piece_start_s,
                    after_picture=True,
                )  # fmt: skip
            except MediaError as error:
                raise Rejected(reason(self._path, error)) from error
            if len(sound) < LEAST_S * self._rate_hz or (why := silence(sound)):
                continue
            sounds.append(sound)
            last_s = max(last_s, piece_end_s)
            if len(sounds) == MAX_REFERENCES:
                break
        if not sounds:
            left = f"what is left of the clip is {why}" if why else "nothing is left of the clip"
            raise Rejected(f"no reference voice apart from the window: {left}")
        return tuple(sounds), last_s

    def _pieces(self, start_s: float, end_s: float) -> Iterator[tuple[float, float]]:
        """Seconds (start, end) in which a reference may lie, the nearest first, before and after by turns."""
        length_s, rest_s = self._reference_s, self._duration_s - end_s
        before = [(start_s - (n + 1) * length_s, start_s - n * length_s) for n in range(_whole(start_s, length_s))]
        after = [(end_s + n * length_s, end_s + (n + 1) * length_s) for n in range(_whole(rest_s, length_s))]
        if self._only_before and start_s >= LEAST_S:
            yield from before or [(0.0, start_s)]
            return
        if before or after:
            for place in range(max(len(before), len(after))):
                yield from (*before[place : place + 1], *after[place : place + 1])
            return
        rests = [(0.0, start_s), (end_s, self._duration_s)]
        yield from (rest for rest in sorted(rests, key=lambda rest: rest[0] - rest[1]) if rest[1] - rest[0] >= LEAST_S)


def own_references(
    path: Path, encoders: Encoders, *, rate_hz: int, duration_s: float, is_one_voice: bool, only_before: bool
) -> OwnReferences | None:
    """What gives reference voices to the windows of a file: None where encoders keep none, or nobody knows whose.

    is_one_voice: one person is heard in the file; else only a sound beside it can be used. Raises Rejected.
    """
    if not encoders.reference_tokens or encoders.audio is None:
        return None
    if not is_one_voice and not beside(path, REFERENCE_FILE).exists():
        return None
    reference_s = 1000.0 * encoders.reference_tokens / encoders.audio.num_latents(1000.0)
    return OwnReferences(path, rate_hz=rate_hz, duration_s=duration_s, reference_s=reference_s, only_before=only_before)


def _whole(seconds: float, length_s: float) -> int:
    return max(0, int((seconds + ROUNDING_S) // length_s))
