"""From what was read off single clips to one number for all of them, with its 95 % interval by bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Reading = float | tuple[float, ...] | tuple[str, ...]
"""What is read off one clip: its value, or what values of several clips are made of. JSON holds it."""

Estimator = Callable[[np.ndarray], float]
"""Rows of clips, int64 [n], each as often as it counts -> the metric over them."""

Summary = Callable[[Sequence[Reading]], Estimator]
"""Readings of all clips -> the metric over any of them; what all rows share is computed once."""

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A metric over `count` clips. low, high: its 95 % interval, None where it cannot be resampled."""

    value: float
    low: float | None
    high: float | None
    count: int


def estimate(readings: Sequence[Reading], summary: Summary, *, is_resampled: bool = True, seed: int = 0) -> Estimate:
    """The metric over clips with the percentile bootstrap over them; no interval of fewer than two clips."""
    over, count = summary(readings), len(readings)
    value = over(np.arange(count))
    if count < 2 or not is_resampled or not math.isfinite(value):
        return Estimate(value, None, None, count)
    rows = np.random.default_rng(seed).integers(count, size=(NUM_RESAMPLES, count))
    values = np.array([over(each) for each in rows])
    values = values[np.isfinite(values)]  # every clip drawn the same: compared with no other
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(value, float(low), float(high), count)


def mean(readings: Sequence[Reading]) -> Estimator:
    """The mean of values."""
    values = np.array(readings, float)  # [B]
    return lambda rows: float(values[rows].mean())


def share(readings: Sequence[Reading]) -> Estimator:
    """Sum over sum of (part, whole), as a word error rate counts: long clips weigh more."""
    pairs = np.array(readings, float)  # [B, 2]

    def over(rows: np.ndarray) -> float:
        part, whole = pairs[rows].sum(0)
        return float(part / whole) if whole else math.nan

    return over


def among_others(likeness: Callable[[Reading, Reading], float]) -> Summary:
    """The mean over all wrong pairings of clips: what chance gives. likeness: of a clip with another clip's truth."""

    def summary(readings: Sequence[Reading]) -> Estimator:
        pairs = np.array([[likeness(a, b) for b in readings] for a in readings], float)  # [B, B]
        np.fill_diagonal(pairs, np.nan)

        def over(rows: np.ndarray) -> float:
            part = pairs[np.ix_(rows, rows)]
            return float(np.nanmean(part)) if np.isfinite(part).any() else math.nan

        return over

    return summary


def frechet(readings: Sequence[Reading]) -> Estimator:
    """Fréchet distance of generated and real features, given as (*generated, *real) of each clip.

    |m1 - m2|² + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2) of the normal distributions with their means and covariances; the
    last trace is the sum of the singular values of X1 X2ᵀ / (n - 1), so that no root of a D x D matrix is taken.
    """
    generated, real = np.split(np.array(readings, np.float64), 2, axis=1)  # [B, D] each

    def over(rows: np.ndarray) -> float:
        return frechet_distance(generated[rows], real[rows])

    return over


def frechet_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Of features [n, D] and [m, D]; NaN for fewer than two of either. Singular covariances are no obstacle."""
    if min(len(generated), len(real)) < 2:
        return math.nan
    a, b = (x - x.mean(0) for x in (generated, real))
    scale = math.sqrt((len(a) - 1) * (len(b) - 1))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum() / scale
    spread = np.square(a).sum() / (len(a) - 1) + np.square(b).sum() / (len(b) - 1)
    return float(np.square(generated.mean(0) - real.mean(0)).sum() + spread - 2 * root)
