"""Which latent frames a training clip gives away clean, so that one model also continues and interpolates clips."""

import numpy as np

from avlit.randomness import Draws
from recipes.mtv.config import KeyframeConfig


def keyframe_mask(draws: Draws, *, latent_frames: int, probabilities: KeyframeConfig) -> np.ndarray | None:
    """True where a latent frame is given, [B, T] on the host; None when no clip of the batch has one.

    The kinds and their probabilities are those of MTV's data code. Its names are followed where they speak for
    themselves; `interpolate` gives every other frame and the `quarter` kinds give a quarter of the clip (chosen).
    """
    if not draws.is_training:
        return None
    kinds = ("image_head", "image_tail", "image_head_tail", "random", "interpolate")
    kinds += ("quarter_random", "quarter_head", "quarter_tail", "quarter_head_tail")
    edges = np.cumsum([getattr(probabilities, kind) for kind in kinds])
    chosen = np.searchsorted(edges, draws.uniform("keyframe_kind"), side="right")
    if (chosen == len(kinds)).all():
        return None
    mask = np.zeros((len(chosen), latent_frames), dtype=bool)
    lots = draws.uniform("keyframe_frames", latent_frames)  # [B, T]
    quarter = max(1, latent_frames // 4)
    for row, kind, lot in zip(mask, chosen, lots, strict=True):
        name = kinds[kind] if kind < len(kinds) else ""
        if name in ("image_head", "image_head_tail"):
            row[0] = True
        if name in ("image_tail", "image_head_tail"):
            row[-1] = True
        if name == "random":
            row[lot < 0.5] = True
        if name == "interpolate":
            row[::2] = True
        if name == "quarter_random":
            row[np.argsort(lot)[:quarter]] = True
        if name in ("quarter_head", "quarter_head_tail"):
            row[:quarter] = True
        if name in ("quarter_tail", "quarter_head_tail"):
            row[-quarter:] = True
        if row.all():
            row[lot.argmax()] = False  # at least one frame is left to learn
    return mask
