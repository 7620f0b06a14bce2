"""Embedded audio: log-mel track features at the video's frame rate, and log-mel latents that can be heard again."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SILENCE_POWER = 1e-7
"""Power below which sound counts as silence: a band 70 dB below full scale, where real recordings have their noise."""

FEATURE_SCALE = 3.0 * math.log(10.0)
"""Divisor of log-mel features over silence: 30 dB over it is 1, full scale 2.3."""


def mel_filters(*, num_mels: int, fft_size: int, rate_hz: int) -> Tensor:
    """Triangular filters [fft_size // 2 + 1, num_mels], equally spaced on the HTK mel scale up to rate_hz / 2.

    Each filter has unit area in bins, so a band's value is the mean power over its width, and a filter narrower than
    a bin takes its value between the two nearest (low bands of short windows would be empty otherwise).
    """

    def to_mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    mels = torch.linspace(0.0, to_mel(rate_hz / 2), num_mels + 2, dtype=torch.float64)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0) * fft_size / rate_hz  # in bins
    low, center, high = edges[:-2], edges[1:-1], edges[2:]
    low, high = torch.minimum(low, center - 1.0), torch.maximum(high, center + 1.0)
    bins = torch.arange(fft_size // 2 + 1, dtype=torch.float64)[:, None]
    filters = torch.minimum((bins - low) / (center - low), (high - bins) / (high - center)).clamp_min(0.0)
    return (filters / filters.sum(0)).float()


def power_spectrum(waveform: Tensor, *, fft_size: int, hop: int) -> Tensor:
    """[..., N] -> [..., N // hop + 1, fft_size // 2 + 1]; a full-scale sine peaks at 1; frame i is centred on i * hop.

    Outside the waveform is silence, so any length from one sample on can be analysed.
    """
    window = torch.hann_window(fft_size, device=waveform.device)
    padded = F.pad(waveform.float(), (fft_size // 2, fft_size // 2))
    spectrum = torch.fft.rfft(padded.unfold(-1, fft_size, hop) * window)
    return (spectrum.real.square() + spectrum.imag.square()) * (2.0 / window.sum()) ** 2


class EmbeddedTrackEncoder:
    """One track to log-mel features: each video frame is cut into `layers` spans of equal time, one mel frame each.

    The spans stand where wav2vec2's hidden layers stand, so the same model reads either. Time stays local: a feature
    knows only the sound of its span and 16 ms around it.
    """

    identity = "embedded-track-1"
    layers = 4
    dim = 32
    rate_hz = 16000
    fft_size = 512
    hop = 160

    def __init__(self) -> None:
        self._filters = mel_filters(num_mels=self.dim, fft_size=self.fft_size, rate_hz=self.rate_hz)

    def encode(self, waveform: Tensor, *, num_frames: int) -> Tensor:
        """[N] mono in [-1, 1] at 16 kHz -> [F, 4, 32]: 0 in silence, 1 to 2 in the formants of speech.

        The waveform covers the clip: frame f gets samples f * N / F to (f + 1) * N / F.
        """
        if waveform.ndim != 1 or waveform.numel() == 0:
            raise ValueError(
                f"a track of shape {tuple(waveform.shape)}: the track encoder reads mono samples [N], N > 0"
            )
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames}: a clip has at least one frame")
        power = power_spectrum(waveform, fft_size=self.fft_size, hop=self.hop) @ self._filters.to(waveform.device)
        levels = torch.log1p(power / SILENCE_POWER) / FEATURE_SCALE  # [M, D]
        spans = _span_means(waveform.numel() / self.hop, levels.shape[0], num_frames * self.layers)
        return (spans.to(waveform.device) @ levels).view(num_frames, self.layers, self.dim)


@lru_cache(maxsize=16)
def _span_means(length: float, num_mel_frames: int, num_spans: int) -> Tensor:
    """Weights [num_spans, num_mel_frames]: each span's mean over the mel frames it overlaps; `length` in hops.

    Mel frame i stands for the time from i - 1/2 to i + 1/2 hops.
    """
    spans = torch.linspace(0.0, length, num_spans + 1, dtype=torch.float64)
    frames = torch.arange(num_mel_frames, dtype=torch.float64)
    overlap = torch.minimum(spans[1:, None], frames + 0.5) - torch.maximum(spans[:-1, None], frames - 0.5)
    overlap = overlap.clamp_min(0.0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


class EmbeddedAudioCodec:
    """Mono sound to log-mel latents and back by Griffin and Lim's phase reconstruction; no weights, deterministic.

    One latent for every 256 samples, 62.5 a second, of 64 mel bands.
    """

    identity = "embedded-audio-1"
    channels = 64
    rate_hz = 16000
    fft_size = 1024
    hop = 256
    iterations = 32
    log_mean, log_std = -14.5, 2.5
    """Of the log power, pauses included, over 24 clips of the corpus's speech (-14.7, 2.4) and 12 spoken digits
    (-14.3, 2.4): latents are (log power - log_mean) / log_std."""

    def __init__(self) -> None:
        self._filters = mel_filters(num_mels=self.channels, fft_size=self.fft_size, rate_hz=self.rate_hz)
        self._window = torch.hann_window(self.fft_size)

    def num_latents(self, duration_s: float) -> int:
        """Latents of that much sound, the last one filled up with silence."""
        return -(-round(duration_s * self.rate_hz) // self.hop)

    def encode(self, waveform: Tensor) -> Tensor:
        """[B, N] in [-1, 1] at 16 kHz -> latents [B, L, 64], L = ceil(N / 256), latent l centred on its 256 samples."""
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise ValueError(f"a waveform of shape {tuple(waveform.shape)}: the audio codec reads mono samples [B, N]")
        length = -(-waveform.shape[1] // self.hop) * self.hop
        waveform = F.pad(waveform.float(), (0, length - waveform.shape[1]))
        magnitude = self._analyse(waveform).abs()  # [B, L, K]
        power = magnitude.square() @ self._filters.to(waveform.device)
        return ((power + SILENCE_POWER).log() - self.log_mean) / self.log_std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, L, 64] -> waveform [B, 256 L] in [-1, 1] at 16 kHz; the phase is reconstructed, not kept."""
        if latents.ndim != 3 or latents.shape[2] != self.channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: the audio codec decodes [B, L, {self.channels}]"
            )
        power = (latents.float() * self.log_std + self.log_mean).exp() - SILENCE_POWER
        magnitude = self._spread(power.clamp_min(0.0)).sqrt()  # [B, L, K]
        # zero phase to begin with: another beginning (random, steady sines) ends within 0.1 dB of it, and needs numbers
        estimate = previous = torch.complex(magnitude, torch.zeros_like(magnitude))
        for _ in range(self.iterations):  # Perraudin et al. 2013, Fast Griffin-Lim, alpha = 0.99
            consistent = self._analyse(self._synthesise(estimate))
            momentum = consistent + 0.99 * (consistent - previous)
            previous = consistent
            estimate = magnitude * momentum / momentum.abs().clamp_min(1e-9)
        return self._synthesise(estimate).clamp(-1.0, 1.0)

    def _spread(self, power: Tensor) -> Tensor:
        """Mel power [B, L, D] -> non-negative power of each bin [B, L, K] whose mel bands are the given ones."""
        filters = self._filters.to(power.device)
        shares = filters.sum(1).clamp_min(1e-9)
        spectrum = (power @ filters.T) / shares  # [B, L, K]
        for _ in range(8):  # Lee and Seung's multiplicative update for least squares keeps it non-negative
            spectrum = spectrum * (power @ filters.T) / (spectrum @ filters @ filters.T).clamp_min(1e-12)
        return spectrum

    def _analyse(self, waveform: Tensor) -> Tensor:
        """[B, N], N a multiple of the hop -> complex spectrum [B, N / hop, K]; a full-scale sine has magnitude 1."""
        pad = (self.fft_size - self.hop) // 2
        window = self._window.to(waveform.device)
        frames = F.pad(waveform, (pad, pad)).unfold(-1, self.fft_size, self.hop) * window
        return torch.fft.rfft(frames) * (2.0 / window.sum())

    def _synthesise(self, spectrum: Tensor) -> Tensor:
        """The least-squares waveform [B, N] of a spectrum [B, L, K]: windowed overlap-add."""
        batch, count, _ = spectrum.shape
        window, pad = self._window.to(spectrum.device), (self.fft_size - self.hop) // 2
        frames = torch.fft.irfft(spectrum, n=self.fft_size) * (window.sum() / 2.0) * window  # [B, L, fft_size]
        pieces = torch.cat([frames.transpose(1, 2), window.square().expand(1, count, -1).transpose(1, 2)])
        length = count * self.hop + 2 * pad
        added = F.fold(pieces, (1, length), kernel_size=(1, self.fft_size), stride=(1, self.hop))[:, 0, 0]
        return (added[:batch] / added[batch:].clamp_min(1e-3))[:, pad : pad + count * self.hop]
