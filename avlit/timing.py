"""The one place for frame rates, sample rates, latent lengths and token counts; every other file asks here."""

from dataclasses import dataclass

VIDEO_FACTORS = {
    "none": (4, 8), "embedded": (4, 8), "cogvideox": (4, 8), "wan2.1": (4, 8), "wan2.2": (4, 16), "ltx2": (8, 32),
}  # fmt: skip
"""Video codec -> how much it divides time and space; without one, the clip that the sound would belong to."""

AUDIO_LATENTS_PER_S = {"embedded": 62.5, "mmaudio": 44100 / 1024, "ltx2": 25.0}
"""Audio codec -> latents a second."""


@dataclass(frozen=True)
class Timing:
    """How a clip's seconds become frames, samples and latent cells.

    fps: video frames a second. num_frames: frames of a clip, 1 modulo `temporal_factor` (causal codecs).
    height, width: pixels, multiples of `spatial_factor`. rate_hz: audio samples a second, mono.
    temporal_factor, spatial_factor: the video codec's reduction (VIDEO_FACTORS).
    """

    fps: float
    num_frames: int
    height: int
    width: int
    rate_hz: int
    temporal_factor: int = 4
    spatial_factor: int = 8

    def __post_init__(self) -> None:
        if self.num_frames % self.temporal_factor != 1 % self.temporal_factor:
            nearest = max(1, (self.num_frames - 1) // self.temporal_factor * self.temporal_factor + 1)
            raise ValueError(
                f"num_frames={self.num_frames}: a causal video codec with {self.temporal_factor}x time needs "
                f"{self.temporal_factor}n+1 frames; the nearest below is {nearest}"
            )
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels % self.spatial_factor:
                raise ValueError(f"{name}={pixels}: must be a multiple of the codec's {self.spatial_factor} pixels")

    @property
    def duration_s(self) -> float:
        """Seconds that the frames cover: each frame lasts 1 / fps."""
        return self.num_frames / self.fps

    @property
    def num_samples(self) -> int:
        """Audio samples of a clip, per track."""
        return round(self.duration_s * self.rate_hz)

    @property
    def latent_frames(self) -> int:
        """Latent frames T: the first pixel frame alone, then one for every `temporal_factor` frames."""
        return 1 + (self.num_frames - 1) // self.temporal_factor

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent height and width (h, w)."""
        return self.height // self.spatial_factor, self.width // self.spatial_factor

    def video_tokens(self, patch: int) -> int:
        """Video tokens of one clip with a spatial patch of `patch` latent cells and no temporal patch."""
        height, width = self.latent_size
        return self.latent_frames * (height // patch) * (width // patch)

    def latent_frame_of(self, frame: int) -> int:
        """The latent frame that holds pixel frame `frame` (causal windows {0}, {1..4}, {5..8}, ...)."""
        return 0 if frame == 0 else 1 + (frame - 1) // self.temporal_factor


def audio_latents_of(codec: str, duration_s: float) -> int:
    """About how many latents an audio codec makes of that much sound; the codec itself knows exactly."""
    return round(duration_s * AUDIO_LATENTS_PER_S[codec])
