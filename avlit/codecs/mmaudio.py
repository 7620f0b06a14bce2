"""MMAudio's codec at 44.1 kHz from a local diffusers folder: sound to mel latents, and back through its vocoder.

Sound passes through it on its way to a shard, and comes back when sampled.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avlit.codecs.pretrained import as_user_error, fingerprint, load_model, model_files, model_folder
from avlit.errors import UserError

LATENT_STATS = "latent_stats.safetensors"
"""File beside `audio_vae/` and `vocoder/`: `mean` and `std` [D] of the VAE's own latents, over the data trained on."""


class MMAudioCodec:
    """diffusers' MMAudioVAE and MMAudioVocoder from `folder/audio_vae` and `folder/vocoder`.

    The VAE reads 128 bands of a log-mel spectrogram of its own (2048 samples, hop 512, 0 to 22050 Hz, natural logarithm
    clamped at 1e-5, padded by reflection and not centred), and halves it in time: D = 40 channels, one latent for every
    1024 samples, 43.07 a second. Latents are normalised by channel where `folder` has LATENT_STATS, else multiplied by
    the config's `scaling_factor`. Encoding takes the mode of the latent distribution, not a sample.

    Weights are float32, whatever the run's precision: the window and the filters of the spectrogram are among them.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        key = "codecs.audio_weights"
        self._vae_source, config = model_folder(key, folder / "audio_vae", "_class_name", ("MMAudioVAE",))
        self._vocoder_source, vocoder = model_folder(key, folder / "vocoder", "_class_name", ("MMAudioVocoder",))
        self._device = device
        path = self._vae_source / "config.json"
        for name in ("latent_channels", "mel_bins", "sample_rate", "n_fft", "hop_length", "scaling_factor"):
            if name not in config:
                raise UserError(f"{key}: {path} lacks {name}; download it again")
        with as_user_error(f"{key}: {path} is not of an MMAudio VAE"):
            self.channels: int = int(config["latent_channels"])
            self.rate_hz: int = int(config["sample_rate"])
            fft_size, hop, scale = int(config["n_fft"]), int(config["hop_length"]), float(config["scaling_factor"])
            if not (0 < hop <= fft_size and (fft_size - hop) % 2 == 0 and self.rate_hz > 0 and self.channels > 0):
                raise ValueError(
                    f"n_fft={fft_size}, hop_length={hop}, sample_rate={self.rate_hz}, latent_channels={self.channels}"
                )
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"scaling_factor={scale}")
        self.samples_per_latent: int = 2 * hop  # the encoder halves the mel frames once
        self._shortest = max(self.samples_per_latent, (fft_size - hop) // 2 + 1)  # more than the reflected padding
        with as_user_error(f"{key}: {self._vocoder_source / 'config.json'} is not of an MMAudio vocoder"):
            made = (vocoder["num_mels"], math.prod(vocoder["upsample_rates"]))
        if made != (config["mel_bins"], hop):
            raise UserError(
                f"{key}: the vocoder in {self._vocoder_source} makes {made[1]} samples of {made[0]} mel bands, the VAE "
                f"in {self._vae_source} reads {config['mel_bins']} bands every {hop}; expected the two of one release"
            )
        files = [*model_files(self._vae_source), *model_files(self._vocoder_source)]
        self._mean, self._std = torch.zeros(self.channels), torch.full((self.channels,), 1.0 / scale)  # [D]
        if (folder / LATENT_STATS).exists():
            self._mean, self._std = _read_latent_stats(folder / LATENT_STATS, self.channels)
            files.append(folder / LATENT_STATS)
        self.identity = f"MMAudioVAE-{fingerprint(files)}"

    @cached_property
    def _vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioVAE

        return load_model("codecs.audio_weights", MMAudioVAE, self._vae_source, torch.float32).to(self._device)

    @cached_property
    def _vocoder(self) -> Any:
        from diffusers.models.autoencoders.mmaudio_vocoder import MMAudioVocoder

        return load_model("codecs.audio_weights", MMAudioVocoder, self._vocoder_source, torch.float32).to(self._device)

    def num_latents(self, duration_s: float) -> int:
        """Latents of that much sound, the rest (up to 23 ms) cut off: 215 of 5 s, 217 of 121 frames at 24 a second."""
        return round(duration_s * self.rate_hz) // self.samples_per_latent

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """[B, N] in [-1, 1] at 44.1 kHz, N >= 1024 -> latents [B, L, D], L = N // 1024."""
        return ((self._modes(waveform) - self._mean.to(self._device)) / self._std.to(self._device)).to(waveform.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, L, D] -> waveform [B, 1024 L] in [-1, 1] at 44.1 kHz."""
        if latents.ndim != 3 or latents.shape[2] != self.channels or latents.shape[1] == 0:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: MMAudio's VAE decodes [B, L, {self.channels}], L > 0"
            )
        modes = latents.to(self._device, torch.float32) * self._std.to(self._device) + self._mean.to(self._device)
        mel = self._vae.decode(modes.transpose(1, 2)).sample  # [B, mel bands, 2L]
        return self._vocoder(mel).sample[:, 0].to(latents.device)

    def _modes(self, waveform: Tensor) -> Tensor:
        """[B, N] -> the VAE's own latents [B, L, D] on the codec's device."""
        if waveform.ndim != 2 or waveform.shape[1] < self._shortest:
            raise ValueError(
                f"a waveform of shape {tuple(waveform.shape)}: MMAudio's VAE reads mono samples [B, N], "
                f"N >= {self._shortest}"
            )
        samples = waveform.to(self._device, torch.float32)
        return self._vae.encode(samples).latent_dist.mode().transpose(1, 2)


@torch.no_grad()
def write_latent_stats(folder: Path, waveforms: Iterable[Tensor], *, device: str = "cpu") -> Path:
    """Measures each latent channel's mean and std over waveforms [B, N] and writes them where MMAudioCodec reads them.

    Raises UserError where the file is there already (shards may be made with it), where it cannot be written, and for
    sound that leaves a channel constant.
    """
    path = folder / LATENT_STATS
    if path.exists():
        raise UserError(
            f"codecs.audio_weights: {path} is there already, and shards may be made with it; leave it to use it, or "
            "take it away to measure again, and encode them again"
        )
    codec = MMAudioCodec(folder, device=device)
    count = 0
    total = torch.zeros(codec.channels, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for waveform in waveforms:
        latents = codec._modes(waveform).flatten(0, 1).double().cpu()  # [B * L, D]
        count += len(latents)
        total += latents.sum(0)
        squares += latents.square().sum(0)
    mean = total / max(count, 1)
    std = (squares / max(count, 1) - mean.square()).clamp_min(0).sqrt()
    if not (std.isfinite().all() and (std > 1e-6).all()):
        raise UserError(f"codecs.audio_weights: {count} latents are too few or too alike for {path}; give more sound")
    whole = path.with_suffix(".tmp")
    with as_user_error(f"codecs.audio_weights: {path} cannot be written"):
        save_file({"mean": mean.float(), "std": std.float()}, whole)
        whole.rename(path)
    return path


def _read_latent_stats(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    with as_user_error(f"codecs.audio_weights: {path} does not hold `mean` and `std` of {channels} latent channels"):
        stats = load_file(path)
        if stats.keys() != {"mean", "std"} or {value.shape for value in stats.values()} != {(channels,)}:
            raise ValueError(f"it has {', '.join(f'{name} {list(value.shape)}' for name, value in stats.items())}")
        mean, std = stats["mean"].float(), stats["std"].float()
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError("it has values that are not finite, or a std that is not above 0")
    return mean, std
