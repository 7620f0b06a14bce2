"""The sound that an audio codec's latents are measured over before anything is encoded with it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avlit.errors import UserError
from avlit.sound import gain_to_peak, resample
from data.prepare.descriptions import Rejected
from data.prepare.preparation import Preparation, choose
from data.prepare.sounds import SoundWindows

MEASURED_S = 3600.0
"""Most seconds of sound that are measured: some 155,000 of MMAudio's latents."""


def sounds_to_measure(
    source: Path, *, captions: Path | None, how: Preparation, peak: float | None, codec_hz: int
) -> Iterator[Tensor]:
    """The sound of a preparation's clips as it will be encoded, [1, N] at `codec_hz`, MEASURED_S and a window at most.

    Clips come in an order that depends on nothing but their names below `source`, so that not one folder is all that
    is heard where there is more than can be, and each gives the same share, from its beginning on. Only sound is read:
    of a clip with picture its own, whatever stems there are. Clips without a caption and those that cannot be read are
    passed over, which the preparation reports; raises UserError where that leaves none.
    """
    _, clips, descriptions = choose(source, captions=captions, how=how)
    named = {clip.relative_to(source).as_posix(): clip for clip in clips if descriptions.has(clip)}
    left_s, is_any = MEASURED_S, False
    for name in sorted(named, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        clip_s = 0.0
        for sound in _sounds(named[name], how):
            waveform = resample(sound * gain_to_peak(sound, peak), how.timing.rate_hz, codec_hz)
            yield torch.from_numpy(np.ascontiguousarray(waveform, np.float32))[None]
            is_any = True
            clip_s += len(sound) / how.timing.rate_hz
            if clip_s >= min(MEASURED_S / len(named), left_s):
                break
        left_s -= clip_s
        if left_s <= 0:
            return
    if not is_any:
        raise UserError(
            f"measure_latents=true: source={source} has no sound that can be used; without the word the report says "
            "why not, file by file"
        )


def _sounds(clip: Path, how: Preparation) -> Iterator[np.ndarray]:
    """The windows of a clip's sound [N] that are not silent; of sound alone, with the silence that follows it."""
    try:
        for window in SoundWindows(clip, timing=how.timing, length_step_s=how.length_step_s or 0.0).read():
            if not isinstance(window, Rejected):
                yield np.clip(window.speech, -1.0, 1.0)
    except Rejected:  # which the preparation that follows finds again, and reports
        return
