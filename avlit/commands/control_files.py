"""Files that a clip is generated after, read as `just prepare` reads them, so that a request equals a training clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from avlit.media import MediaError, read_clip, read_image
from avlit.timing import Timing
from data.prepare.controls import GREY, fit_picture


def read_video(path: Path, timing: Timing) -> np.ndarray:
    """A video's frames at the clip's rate and size, uint8 [F, H, W, 3], F >= 1; fewer than the clip's where it ends."""
    size = (timing.height, timing.width)
    return read_clip(path, fps=timing.fps, size=size, rate_hz=None, duration_s=timing.duration_s).frames


def read_held(path: Path, timing: Timing) -> np.ndarray:
    """The same of the clip's length, uint8 [num_frames, H, W, 3]: where the video ends, its last frame is held."""
    frames = read_video(path, timing)
    return np.concatenate([frames, np.repeat(frames[-1:], timing.num_frames - len(frames), axis=0)])


def read_reference_image(path: Path, timing: Timing) -> np.ndarray:
    """Who is to be seen, before grey where the picture is transparent, at the clip's size: uint8 [H, W, 3].

    MediaError: it cannot be read, or nothing of it can be seen.
    """
    picture = read_image(path, size=None)
    with Image.open(path) as image:
        kept = np.asarray(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))  # [h, w], 255 is opaque
    if not kept.any():
        raise MediaError(f"{path}: is transparent everywhere, so it shows nobody")
    share = kept[..., None] / 255
    return fit_picture((picture * share + GREY * (1 - share)).round().astype(np.uint8), (timing.height, timing.width))
