"""Whose voice a sound is, by its pitch: does generated speech have the reference voice's fundamental frequency?

Exact, and without weights. It is no speaker embedding and is never called speaker similarity: of a timbre it knows the
pitch and nothing of the formants.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOWEST_HZ, HIGHEST_HZ = 65.0, 340.0
"""Between which a pitch is looked for: speaking voices."""

WINDOW_S, HOP_S = 0.05, 0.01

VOICED = 0.5
"""Least normalised autocorrelation at the pitch period of a stretch of sound that counts as voiced."""

SMALLER_PERIOD = 0.85
"""Of several periods that nearly fit the shortest is taken, which need fit only this well beside the best one."""

FLOOR_DB = 25.0
"""Stretches this far below the loudest are pauses."""


def pitch_contour(waveform: np.ndarray, rate_hz: int) -> np.ndarray:
    """Fundamental frequency in Hz of a waveform [N] in every 10 ms, [M], NaN where nothing is voiced.

    The peak of the autocorrelation, normalised by the energies of the two stretches that it compares. All NaN in
    silence; empty (M = 0) for a sound shorter than two of the longest periods.
    """
    longest, shortest = math.ceil(rate_hz / LOWEST_HZ), math.floor(rate_hz / HIGHEST_HZ)
    size, hop = round(WINDOW_S * rate_hz), round(HOP_S * rate_hz)
    if len(waveform) < size + longest:
        return np.zeros(0)
    spans = np.lib.stride_tricks.sliding_window_view(waveform.astype(np.float64), size + longest)[
        ::hop
    ]  # [M, size+lag]
    lags = np.arange(shortest - 1, longest + 1)
    head = spans[:, :size]
    energy = np.cumsum(np.pad(np.square(spans), ((0, 0), (1, 0))), axis=1)
    fits = np.stack([
        (head * spans[:, lag : lag + size]).sum(1)
        / np.sqrt(energy[:, size] * (energy[:, lag + size] - energy[:, lag]) + 1e-12)
        for lag in lags
    ], axis=1)  # fmt: skip  # [M, lags]
    return np.array([_pitch(fit, lags, rate_hz) for fit in fits]) * _is_loud(energy[:, size])


def _is_loud(energy: np.ndarray) -> np.ndarray:
    """1, or NaN in pauses, [M]."""
    return np.where(energy > max(energy.max() * 10 ** (-FLOOR_DB / 10), 1e-6), 1.0, np.nan)


def _pitch(fit: np.ndarray, lags: np.ndarray, rate_hz: int) -> float:
    peaks = 1 + np.flatnonzero((fit[1:-1] >= fit[:-2]) & (fit[1:-1] >= fit[2:]))
    if not len(peaks) or fit[peaks].max() < VOICED:
        return math.nan
    place = int(peaks[fit[peaks] >= SMALLER_PERIOD * fit[peaks].max()][0])
    left, middle, right = fit[place - 1 : place + 2]
    curve = left - 2 * middle + right
    offset = 0.5 * (left - right) / curve if curve < 0 else 0.0  # the peak of the parabola through three lags
    return rate_hz / float(lags[place] + offset)


def pitch_hz(waveform: np.ndarray, rate_hz: int) -> float:
    """Median fundamental frequency of a waveform [N] in Hz; NaN where nothing in it is voiced."""
    contour = pitch_contour(waveform, rate_hz)
    return float(np.nanmedian(contour)) if np.isfinite(contour).any() else math.nan


@dataclass(frozen=True)
class PitchFollowing:
    """How near generated voices are to reference voices in pitch.

    error, error_shuffled: mean distance in semitones to the clip's own reference, and to the other clips'. correlation:
    of generated and reference pitch on a logarithmic scale, 0 where either does not vary. voiced: share of clips with a
    pitch; the others count in nothing else. All NaN but `voiced` where fewer than two have one.
    """

    error: float
    error_shuffled: float
    correlation: float
    voiced: float


def pitch_following(
    generated: Sequence[float] | np.ndarray, references: Sequence[float] | np.ndarray
) -> PitchFollowing:
    """Pitches of generated voices and of their references in Hz, [B] each; NaN where a generated one has none.

    ValueError: the lengths differ, there is no clip, or a reference has no pitch.
    """
    generated_hz, reference_hz = np.asarray(generated, float), np.asarray(references, float)
    if generated_hz.shape != reference_hz.shape or not len(generated_hz):
        raise ValueError(f"pitch_following: {len(generated_hz)} voices and {len(reference_hz)} references")
    if not np.isfinite(reference_hz).all():
        raise ValueError("pitch_following: a reference voice has no pitch")
    has = np.isfinite(generated_hz)
    voiced = float(has.mean())
    if has.sum() < 2:
        return PitchFollowing(math.nan, math.nan, math.nan, voiced)
    made, asked = 12 * np.log2(generated_hz[has]), 12 * np.log2(reference_hz[has])
    distance = np.abs(made[:, None] - asked[None])  # [B, B]
    own = np.eye(len(made), dtype=bool)
    made, asked = made - made.mean(), asked - asked.mean()
    norm = float(np.linalg.norm(made) * np.linalg.norm(asked))
    correlation = float(made @ asked) / norm if norm > 1e-6 else 0.0
    return PitchFollowing(float(distance[own].mean()), float(distance[~own].mean()), correlation, voiced)
