"""What every codec promises: the interface between raw media and the latents and features a model sees."""

from typing import Protocol

from torch import Tensor


class VideoCodec(Protocol):
    """Video to latents and back. `identity` names the codec, its weights and its settings; it is stored with shards."""

    identity: str
    channels: int
    temporal_factor: int
    spatial_factor: int

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [-1, 1] -> normalised latents [B, C, T, h, w]; F must be temporal_factor * n + 1."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, T, h, w] -> video [B, 3, F, H, W] in [-1, 1]."""
        ...


class AudioCodec(Protocol):
    """Mono sound to latents and back, for the branches that generate sound."""

    identity: str
    channels: int
    rate_hz: int

    def num_latents(self, duration_s: float) -> int:
        """Latents L of that much sound."""
        ...

    def encode(self, waveform: Tensor) -> Tensor:
        """[B, N] in [-1, 1] -> latents [B, L, D]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, L, D] -> waveform [B, N]."""
        ...


class TrackEncoder(Protocol):
    """One demixed track to features at the video's frame rate (wav2vec2's hidden layers, or log-mel frames)."""

    identity: str
    layers: int
    dim: int
    rate_hz: int

    def encode(self, waveform: Tensor, *, num_frames: int) -> Tensor:
        """[N] mono in [-1, 1] at `rate_hz` -> [F, K, D] with F = num_frames, K = layers, D = dim."""
        ...


class TextEncoder(Protocol):
    """Prompts to token features."""

    identity: str
    dim: int
    max_tokens: int

    def encode(self, text: str) -> Tensor:
        """A prompt -> [L, D], L at most `max_tokens`; padding features only where the backbone was trained on them."""
        ...
