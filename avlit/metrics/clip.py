"""One clip as metrics see it: its picture and sound, what was asked for, and what is known to be true of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A generated or a real clip. What it does not have, or nobody knows of it, is None.

    frames: uint8 [F, H, W, 3] at `fps`. waveform: float32 [N] mono in [-1, 1] at `rate_hz`. has_own_sound: the sound is
    the model's, or the file's; False where it drove the video. num_given: frames at the beginning that a model was
    given. prompt: the text it was asked with; transcript: the words that are to be said, "" where nobody speaks.

    mouth_boxes: per frame, per person; of a generated clip only where its places are the true clip's, since frames of
    it were given. pose_boxes: those of the true clip whose frames, pose or depth were given.
    speech_envelopes: exact loudness of the speech of each person that drove the video, [F] each. num_speakers: persons
    who speak. event_times_s: when something is heard to happen, in seconds. music_mode: major or minor. brightness [F]:
    of the scene in each frame, as the music asks.
    person: attributes of the person that is to be seen, by name. voice_hz: pitch of the voice that is to be heard.
    depth [F, H, W] in [0, 1], 1 is nearest: the depth that was asked for. reference_image: uint8 [H, W, 3].
    reference_voice: float32 [N'] at `rate_hz` of it. real: the true clip.
    """

    key: str
    fps: float
    frames: np.ndarray | None = None
    waveform: np.ndarray | None = None
    rate_hz: int = 0
    has_own_sound: bool = True
    num_given: int = 0
    prompt: str | None = None
    transcript: str | None = None
    mouth_boxes: Sequence[Sequence[Box]] | None = None
    pose_boxes: Sequence[Sequence[Box]] | None = None
    speech_envelopes: tuple[np.ndarray, ...] | None = None
    num_speakers: int | None = None
    event_times_s: tuple[float, ...] | None = None
    music_mode: str | None = None
    brightness: np.ndarray | None = None
    person: Mapping[str, str] | None = None
    voice_hz: float | None = None
    depth: np.ndarray | None = None
    reference_image: np.ndarray | None = None
    reference_voice: Sound | None = None
    real: Clip | None = None

    @property
    def own_sound(self) -> Sound | None:
        """The sound that was generated, or is the file's own; None where it drove the video."""
        return self.sound if self.has_own_sound else None

    @property
    def sound(self) -> Sound | None:
        """The clip's sound, whoever made it."""
        return None if self.waveform is None else Sound(self.waveform, self.rate_hz)

    @property
    def words(self) -> str | None:
        """The transcript of a clip in which somebody speaks."""
        return self.transcript or None


@dataclass(frozen=True, eq=False)
class Sound:
    """waveform: float32 [N] mono in [-1, 1] at rate_hz."""

    waveform: np.ndarray
    rate_hz: int
