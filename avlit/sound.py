"""Sampled sound as arrays: mixing down, resampling, cutting to length; what media files are read and written with."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from av.audio.frame import AudioFrame
from scipy.signal import resample_poly


def to_mono(frame: AudioFrame) -> np.ndarray:
    """A decoded frame of any sample format -> float32 [N], the mean of its channels."""
    decoded = frame.to_ndarray()
    samples = decoded.astype(np.float64)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if decoded.dtype == np.uint8:
        samples = (samples - 128.0) / 128.0
    elif decoded.dtype in (np.int16, np.int32):
        samples = samples / 2.0 ** (8 * decoded.dtype.itemsize - 1)
    return samples.mean(axis=0).astype(np.float32)


def resample(samples: np.ndarray, source_hz: int, rate_hz: int) -> np.ndarray:
    """[N] -> [ceil(N * rate / source)] by a linear-phase polyphase filter: no delay."""
    if source_hz == rate_hz or samples.size == 0:
        return samples
    ratio = Fraction(rate_hz, source_hz)
    return resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)


def fit(samples: np.ndarray, count: int) -> np.ndarray:
    """[N] -> [count]: cut at the end, or filled with silence."""
    return np.pad(samples[:count], (0, max(0, count - len(samples))))


MOST_GAIN = 30.0
"""What sound is multiplied with at most, 30 dB, so that a nearly silent recording does not become noise."""


def gain_to_peak(samples: np.ndarray, peak: float | None) -> np.float32:
    """What brings the loudest sample of a sound [N] to `peak`; 1 for None, and for silence."""
    loudest = float(np.abs(samples).max(initial=0.0))
    return np.float32(1.0 if peak is None or not loudest else min(peak / loudest, MOST_GAIN))


def write_sound(path: Path, waveform: np.ndarray, *, rate_hz: int) -> None:
    """Mono sound [N] in [-1, 1] -> a WAV file of 16 bits, complete or not at all."""
    import soundfile

    part = path.with_name(f"{path.name}.part")
    soundfile.write(part, np.clip(waveform, -1.0, 1.0), rate_hz, format="WAV", subtype="PCM_16")
    part.replace(path)
