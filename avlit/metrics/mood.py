"""Does the picture's mood fit the music? On the embedded corpus major is warm, minor is cool and beats are light."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading
from avlit.metrics.lip_sync import sync_correlation
from avlit.metrics.metric import Measure, Meter, Metric, Tools


def warmth(frames: np.ndarray) -> float:
    """Mean red over mean blue, as a logarithm: above 0 is warm. frames: uint8 [F, H, W, 3]."""
    red, blue = (frames[..., channel].mean() + 1 for channel in (0, 2))
    return float(np.log(red / blue))


def pulse(frames: np.ndarray) -> np.ndarray:
    """Mean brightness of each frame, without its linear trend, [F]."""
    light = frames.astype(np.float64).mean((1, 2, 3))
    time = np.arange(len(light))
    return light - np.polyval(np.polyfit(time, light, 1), time) if len(light) > 2 else light - light.mean()


def _open(tools: Tools) -> Measure:
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None and clip.brightness is not None
        seen = clip.frames[clip.num_given :]
        is_warm = warmth(seen) > 0
        asked = clip.brightness[clip.num_given :]
        return {
            "mood": float(is_warm == (clip.music_mode == "major")),
            "mood_pulse": sync_correlation(pulse(seen), asked - asked.mean()),
        }

    return measure


METER = Meter("mood", _open, ("frames", "music_mode", "brightness"))
SOURCE = "exact on the embedded corpus; MTV's visual mood, Section 3"

METRICS = (
    Metric(
        "mood", "share of clips that are warm where the music is major and cool where it is minor; chance is 0.5",
        "higher", 0, 1, "", SOURCE, METER,
    ),
    Metric(
        "mood_pulse", "correlation of the picture's brightness with the music's beat; chance is 0", "higher", -1, 1, "",
        SOURCE, METER,
    ),
)  # fmt: skip
