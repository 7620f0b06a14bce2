"""From one sound file to its windows without picture: whole utterances, padded so that few lengths arise."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from avlit.media import MediaError, audio_length_s, probe, read_audio
from avlit.sound import fit
from avlit.timing import Timing
from data.prepare.descriptions import Rejected
from data.prepare.windows import Window, reason, silence

SHORTEST_S = 0.1
"""Less is no word."""

SLACK_S = 0.1
"""A file whose sound ends this much before it says has lost words; encoders' own padding is half as long."""


class SoundWindows:
    """The sound of one file, or its windows of the recipe's length where it is longer than that.

    A sound that is no longer is followed by silence up to a multiple of `length_step_s`, at most the recipe's length.
    Raises Rejected where nothing of the file can be used. The attributes are those of ClipWindows.
    """

    tracks = ""

    def __init__(self, path: Path, *, timing: Timing, length_step_s: float) -> None:
        self._path, self._timing = path, timing
        self._step = max(1, round(length_step_s * timing.rate_hz))
        self.notes: list[str] = []
        try:
            info = probe(path)
            declared_s = info.duration_s if info.fps is None else 0.0  # else it may be the picture's
            self.duration_s = audio_length_s(path)  # decodes all of it
        except MediaError as error:
            raise Rejected(reason(path, error)) from error
        if self.duration_s < declared_s - SLACK_S:
            raise Rejected(
                f"is cut off; it declares {declared_s:.2f} s of sound and ends after {self.duration_s:.2f} s"
            )
        if self.duration_s < SHORTEST_S:
            raise Rejected(f"too short: {self.duration_s:.3f} s; a sound needs {SHORTEST_S:g} s")

    @property
    def is_cut(self) -> bool:
        """Whether a window holds less than the whole sound."""
        return round(self.duration_s * self._timing.rate_hz) > self._timing.num_samples

    def read(self) -> Iterator[Window | Rejected]:
        """Every window in order, or Rejected for one that is left out."""
        length_s, rate_hz = self._timing.duration_s, self._timing.rate_hz
        if not self.is_cut:
            steps = math.ceil(round(self.duration_s * rate_hz) / self._step)
            yield self._window(0, end_s=self.duration_s, count=min(steps * self._step, self._timing.num_samples))
            return
        number = 0
        while round((number + 1) * length_s * rate_hz) <= round(self.duration_s * rate_hz):
            yield self._window(number, end_s=(number + 1) * length_s, count=self._timing.num_samples)
            number += 1
        rest_s = self.duration_s - number * length_s
        if rest_s >= SHORTEST_S:
            self.notes.append(f"its last {rest_s:.2f} s are less than a window of {length_s:.2f} s and are left out")

    def _window(self, number: int, *, end_s: float, count: int) -> Window | Rejected:
        start_s = number * self._timing.duration_s
        try:
            sound = read_audio(self._path, self._timing.rate_hz, start_s=start_s, duration_s=end_s - start_s)
        except MediaError as error:
            return Rejected(reason(self._path, error))
        if why := silence(sound):
            return Rejected(why)
        nothing = np.zeros(count, np.float32)
        return Window(number, start_s, end_s, None, fit(sound, count), nothing, nothing, None)
