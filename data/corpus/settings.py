"""Size, rates and version of the embedded corpus, and the random streams that make every clip a pure function."""

from dataclasses import dataclass

import numpy as np

from avlit.timing import Timing
from data.clip import SUBSETS

STREAMS = ("scene", "speech", "sounds", "reference", "voice")
"""Independent random streams of a clip, so that its picture can be planned without its voice and the reverse."""


@dataclass(frozen=True)
class CorpusSettings:
    """What a clip of the corpus looks like in numbers; `version` changes whenever the same index gives another clip.

    reference_s: the longest that a reference voice may last, in seconds.
    """

    fps: float = 12.0
    num_frames: int = 25
    height: int = 64
    width: int = 64
    rate_hz: int = 16000
    reference_s: float = 1.4
    version: str = "2"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("fps", self.fps, 1), ("num_frames", self.num_frames, 1), ("height", self.height, 32),
            ("width", self.width, 32), ("rate_hz", self.rate_hz, 8000), ("reference_s", self.reference_s, 0.5),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}={value}: the embedded corpus draws and speaks from {name}={least} upwards")

    @property
    def timing(self) -> Timing:
        """The clip's rate arithmetic, without any codec's constraint."""
        return Timing(
            fps=self.fps, num_frames=self.num_frames, height=self.height, width=self.width, rate_hz=self.rate_hz,
            temporal_factor=1, spatial_factor=1,
        )  # fmt: skip

    @property
    def duration_s(self) -> float:
        return self.timing.duration_s

    @property
    def num_samples(self) -> int:
        return self.timing.num_samples

    @property
    def frame_times(self) -> np.ndarray:
        """Centre of each frame in seconds [F]; frame f is shown from f / fps to (f + 1) / fps."""
        return (np.arange(self.num_frames) + 0.5) / self.fps

    @property
    def unit(self) -> float:
        """Pixels in one drawing unit: 1 at 64x64. Wide or tall frames keep the share of the mouth while heads fit."""
        return min((self.height * self.width) ** 0.5, 1.15 * min(self.height, self.width)) / 64


def identity(settings: CorpusSettings) -> str:
    """The name of this corpus and its settings, as stored with shards made from it."""
    return (
        f"embedded-corpus-{settings.version}:fps={settings.fps:g},frames={settings.num_frames},"
        f"size={settings.height}x{settings.width},rate={settings.rate_hz},"
        f"reference={settings.reference_s:g}"
    )


def stream(subset: str, index: int, seed: int, name: str, *numbers: int) -> np.random.Generator:
    """The generator of one random stream of one clip; the same key gives the same numbers wherever it is asked.

    numbers: which of several such streams.
    """
    if subset not in SUBSETS:
        raise ValueError(f"subset={subset!r}: the embedded corpus has {', '.join(SUBSETS)}")
    if index < 0 or seed < 0:
        raise ValueError(f"index={index}, seed={seed}: both must be 0 or more")
    return np.random.default_rng([seed, SUBSETS.index(subset), index, STREAMS.index(name), *numbers])
