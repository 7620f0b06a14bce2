"""Files that a clip is generated after: read as `just prepare` reads them, so that a request equals a training clip,
and written for held-out clips, to be looked at and given again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from avlit.commands.clips import to_frames
from avlit.commands.request import STRUCTURE_KEYS
from avlit.media import MediaError, read_clip, read_image, write_mp4
from avlit.sound import write_sound
from avlit.timing import Timing
from data.datamodule import HeldoutClip
from data.encode import Encoders
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


@torch.no_grad()
def write_controls(clips: Sequence[HeldoutClip], encoders: Encoders, folder: Path) -> list[Path]:
    """What held-out clips have as controls and reference voices, decoded from the latents that the model is given.

    `KEY.reference_image.png`, `KEY.depth.mp4`, `KEY.pose.mp4` and `KEY.reference.wav`, as far as a clip has them, in
    `folder`, which is made if there is anything. Returns the paths.
    """
    paths: list[Path] = []
    for number, clip in enumerate(clips):
        batch, found = clip.batch, {}
        if encoders.video is not None:
            for name in (*STRUCTURE_KEYS, "reference_image"):
                latents = getattr(batch, name)
                if latents is not None and any(getattr(batch, f"has_{name}")):
                    found[name] = to_frames(encoders.video.decode(latents.float())[0].clamp(-1, 1).cpu())
        has_voice = batch.reference is not None and any(batch.has_reference)
        if found or has_voice:
            folder.mkdir(parents=True, exist_ok=True)
        stem = f"{number:02d}-{batch.keys[0]}"
        for name, frames in found.items():
            paths.append(folder / f"{stem}.{name}.{'png' if name == 'reference_image' else 'mp4'}")
            if name == "reference_image":
                Image.fromarray(frames[0]).save(paths[-1])
            else:
                write_mp4(paths[-1], frames, fps=clip.annotation.fps)
        if has_voice and encoders.audio is not None:
            assert batch.reference is not None
            latents = batch.reference[:, batch.reference[0].any(-1)]  # zeros after its end are no sound
            voice = encoders.audio.decode(latents.float())[0].clamp(-1, 1).cpu().numpy()
            paths.append(folder / f"{stem}.reference.wav")
            write_sound(paths[-1], voice, rate_hz=encoders.audio.rate_hz)
    return paths
