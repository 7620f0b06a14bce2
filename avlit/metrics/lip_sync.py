"""Lip sync on the embedded corpus: does the generated mouth open with the speech that drives it?

An exact counterpart of Sync-C for a world whose mouths are known to be dark; it is no SyncNet and is never called
Sync-C or Sync-D.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

MOUTH_LUMA = 0.22
"""Pixels darker than this, of a range from 0 to 1, count as the inside of a mouth."""


def mouth_aperture(video: Tensor, boxes: Tensor) -> Tensor:
    """Share of mouth-dark pixels inside each frame's mouth box.

    video [B, 3, F, H, W] in [-1, 1]; boxes [B, F, 4] as (x1, y1, x2, y2) in pixels -> [B, F] in [0, 1].
    """
    luma = (video * video.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)).sum(1) * 0.5 + 0.5  # [B, F, H, W]
    dark = torch.sigmoid((MOUTH_LUMA - luma) / 0.03)
    height, width = video.shape[-2:]
    y = torch.arange(height, device=video.device).view(1, 1, -1, 1)
    x = torch.arange(width, device=video.device).view(1, 1, 1, -1)
    x1, y1, x2, y2 = (edge[..., None, None] for edge in boxes.unbind(-1))  # [B, F, 1, 1]
    inside = (x >= x1.floor()) & (x < x2.ceil()) & (y >= y1.floor()) & (y < y2.ceil())
    return (dark * inside).sum((-2, -1)) / inside.sum((-2, -1)).clamp_min(1)


def speech_envelope(waveform: np.ndarray, *, num_frames: int) -> np.ndarray:
    """Root mean square of a waveform [N] in each of `num_frames` equal windows, [F]: computed from the sound alone."""
    edges = np.linspace(0, len(waveform), num_frames + 1).round().astype(int)
    return np.array([np.sqrt(np.mean(np.square(waveform[a:b])) + 1e-12) for a, b in pairwise(edges)])


def sync_correlation(aperture: np.ndarray, envelope: np.ndarray) -> float:
    """Pearson correlation of two curves [F]; 0 where either does not move."""
    a, b = aperture - aperture.mean(), envelope - envelope.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 1e-6 else 0.0


def lip_sync(apertures: np.ndarray, envelopes: np.ndarray) -> tuple[float, float]:
    """Mean sync correlation over clips, with each clip's own speech and with the other clips' (shuffled) speech.

    apertures, envelopes [B, F]. The second number averages over every wrong pairing: what chance gives. B >= 2.
    """
    if len(apertures) < 2:
        raise ValueError(f"lip_sync: {len(apertures)} clip(s); comparing with shuffled speech needs two or more")
    scores = np.array([[sync_correlation(a, e) for e in envelopes] for a in apertures])  # [B, B]
    own = np.eye(len(scores), dtype=bool)
    return float(scores[own].mean()), float(scores[~own].mean())
