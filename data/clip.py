"""RawClip: one clip before encoding, as the embedded corpus renders it and `just prepare` cuts it."""

from dataclasses import dataclass, field

import numpy as np

SUBSETS = ("basic_face", "single_character", "multiple_characters", "sound_event", "visual_mood")
"""DEMIX's five subsets (MTV, Section 3), in the order of the curriculum."""


@dataclass(frozen=True)
class RawClip:
    """Frames and demixed tracks of one clip, with its annotations.

    frames uint8 [F, H, W, 3] RGB, or None: sound without a picture. speech, effects, music float32 [N] mono in
    [-1, 1] at `rate_hz`; silence is zeros. speech_second: a second speaker's own track, or None. The clip's sound
    is their sum.
    mouth_boxes: per frame, per person (x1, y1, x2, y2) in pixels; no entry where no mouth is seen.
    truth: the embedded corpus's exact ground truth (JSON values only); empty for real clips.
    captions: the clip in other words, by style (`data.captions.STYLES`); empty where `caption` is all there is.
    reference_image uint8 [H, W, 3]: a person of the clip before grey; depth and pose uint8 [F, H, W, 3]: the frames'
    depth (white is nearest) and skeletons as pictures. None where the clip has none, or nobody asked.
    references: at most three other utterances of the speaker who talks most, float32 [N'] mono in [-1, 1] at
    `rate_hz`; none overlaps the clip's own sound.
    """

    key: str
    subset: str
    fps: float
    rate_hz: int
    frames: np.ndarray | None
    speech: np.ndarray
    effects: np.ndarray
    music: np.ndarray
    speech_second: np.ndarray | None
    caption: str
    transcript: str
    mouth_boxes: list[list[tuple[float, float, float, float]]]
    truth: dict[str, object] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    references: tuple[np.ndarray, ...] = ()
    reference_image: np.ndarray | None = None
    depth: np.ndarray | None = None
    pose: np.ndarray | None = None

    @property
    def mix(self) -> np.ndarray:
        """The clip's sound [N]: the sum of its tracks, clipped to [-1, 1]."""
        total = self.speech + self.effects + self.music
        if self.speech_second is not None:
            total = total + self.speech_second
        return np.clip(total, -1.0, 1.0)
