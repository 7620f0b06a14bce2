"""The tracks of a clip to be made, as files: checked, read window by window for the encoder, and mixed for the ear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avlit.media import MediaError, audio_length_s, read_audio
from avlit.sound import fit

MIX_RATE_HZ = 48000
PIECE_S = 10.0
"""Seconds of sound that are mixed at a time while the mix's peak is looked for."""


@dataclass(frozen=True)
class Soundtrack:
    """Sound files by the name of their track, each starting with the picture; `open_soundtrack` makes one.

    lengths_s: seconds of sound in each file. gain: what the mix is multiplied with so that it stays within [-1, 1].
    """

    paths: Mapping[str, Path]
    lengths_s: Mapping[str, float]
    gain: float = 1.0

    def track(self, name: str, *, rate_hz: int, first: int, count: int) -> np.ndarray:
        """Samples `first` to `first + count` of a track at `rate_hz`, float32 [count]; silence where it has none."""
        start_s = first / rate_hz
        if name not in self.paths or start_s >= self.lengths_s[name]:
            return np.zeros(count, np.float32)
        path = self.paths[name]
        return fit(read_audio(path, rate_hz, start_s=start_s, duration_s=count / rate_hz), count)

    def mix(self, *, first: int, count: int) -> np.ndarray:
        """Samples `first` to `first + count` of all tracks together at MIX_RATE_HZ, float32 [count] in [-1, 1]."""
        total = np.zeros(count, np.float32)
        for name in self.paths:
            total += self.track(name, rate_hz=MIX_RATE_HZ, first=first, count=count)
        return np.clip(self.gain * total, -1.0, 1.0)


def open_soundtrack(paths: Mapping[str, Path], *, duration_s: float) -> Soundtrack:
    """The files, each decoded once to its end, and the gain of their mix over the first `duration_s`.

    Raises MediaError that begins `speech=FILE:` for a file that is missing, broken, cut off or without sound.
    """
    lengths_s = {}
    for name, path in paths.items():
        try:
            lengths_s[name] = audio_length_s(path)
        except MediaError as error:
            raise MediaError(f"{name}={error}") from error
    plain = Soundtrack(dict(paths), lengths_s)
    if len(paths) < 2:
        return plain  # a file's own samples are within [-1, 1]
    num_samples, piece = round(duration_s * MIX_RATE_HZ), round(PIECE_S * MIX_RATE_HZ)
    peak = 1.0
    for first in range(0, num_samples, piece):
        count = min(piece, num_samples - first)
        tracks = [plain.track(name, rate_hz=MIX_RATE_HZ, first=first, count=count) for name in paths]
        peak = max(peak, float(np.abs(np.sum(tracks, axis=0)).max()))
    return Soundtrack(plain.paths, lengths_s, gain=1.0 / peak)
