"""LTX-2's audio codec from a local diffusers folder: sound to mel latents at 25 a second, and back by its vocoder.

Sound passes through it on its way to a shard, and comes back when sampled.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avlit.codecs.ltx2_video import latent_stats
from avlit.codecs.pretrained import as_user_error, fingerprint, load_model, model_files, model_folder
from avlit.errors import UserError
from avlit.sound import resample

KEY = "codecs.audio_weights"

FFT_SIZE = 1024
"""Samples of the spectrogram's window; no config states it (ltx-core, audio_vae/ops.py)."""

LATENT_FACTOR = 4
"""What the VAE divides mel frames and mel bands by: fixed in diffusers' class."""


class LTX2AudioCodec:
    """diffusers' AutoencoderKLLTX2Audio and LTX2Vocoder from `folder/audio_vae` and `folder/vocoder`.

    `rate_hz` is the vocoder's, 24 kHz, of the sound that comes and goes; the VAE hears it at 16 kHz. Mono sound is
    given to both its channels, and the mean of the vocoder's two comes back. A latent packs the VAE's 8 channels of 16
    bands, D = 128 with the bands adjacent, normalised with the `latents_mean` and `latents_std` [D] among the weights.
    One is made of 40 ms: latent l hears mel frames 4l - 3 to 4l and, by causality, all before. Encoding takes the mode
    of the latent distribution, not a sample.

    Weights are float32, whatever the run's precision, as MMAudio's are.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        self._vae_source, config = model_folder(KEY, folder / "audio_vae", "_class_name", ("AutoencoderKLLTX2Audio",))
        self._vocoder_source, vocoder = model_folder(KEY, folder / "vocoder", "_class_name", ("LTX2Vocoder",))
        self._device = device
        path = self._vae_source / "config.json"
        for name in ("latent_channels", "mel_bins", "sample_rate", "mel_hop_length", "in_channels", "ch_mult"):
            if config.get(name) is None:
                raise UserError(f"{KEY}: {path} lacks {name}; download it again")
        with as_user_error(f"{KEY}: {path} is not of an LTX-2 audio VAE"):
            self._num_mels, self._heard_hz = int(config["mel_bins"]), int(config["sample_rate"])
            self._hop, self._num_ears = int(config["mel_hop_length"]), int(config["in_channels"])
            self.channels: int = int(config["latent_channels"]) * (self._num_mels // LATENT_FACTOR)
            if 2 ** (len(config["ch_mult"]) - 1) != LATENT_FACTOR or self._num_mels % LATENT_FACTOR:
                raise ValueError(f"ch_mult={config['ch_mult']} or mel_bins={self._num_mels} does not divide by 4")
            if config.get("causality_axis") != "height":
                raise ValueError(f"causality_axis={config.get('causality_axis')!r}: expected 'height', causal in time")
            if not (0 < self._hop <= FFT_SIZE and self._heard_hz > 0):
                raise ValueError(f"mel_hop_length={self._hop}, sample_rate={self._heard_hz}")
        with as_user_error(f"{KEY}: {self._vocoder_source / 'config.json'} is not of an LTX-2 vocoder"):
            self.rate_hz: int = int(vocoder["output_sampling_rate"])
            made_hop, read = math.prod(vocoder["upsample_factors"]), vocoder["in_channels"]
            if read != self._num_mels * self._num_ears or made_hop * self._heard_hz != self._hop * self.rate_hz:
                raise ValueError(
                    f"it makes {made_hop} samples at {self.rate_hz} Hz of {read} bands, the VAE in {self._vae_source} "
                    f"has {self._num_ears} x {self._num_mels} bands every {self._hop} at {self._heard_hz} Hz"
                )
        self.samples_per_latent: int = LATENT_FACTOR * made_hop
        self._mean, self._std = latent_stats(KEY, self._vae_source, self.channels)  # [D]
        self.identity = f"AutoencoderKLLTX2Audio-{fingerprint([*model_files(self._vae_source), *self._vocoder_files])}"

    @property
    def _vocoder_files(self) -> list[Path]:
        return model_files(self._vocoder_source)

    @cached_property
    def _vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio

        return load_model(KEY, AutoencoderKLLTX2Audio, self._vae_source, torch.float32).to(self._device)

    @cached_property
    def _vocoder(self) -> Any:
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

        return load_model(KEY, LTX2Vocoder, self._vocoder_source, torch.float32).to(self._device)

    @cached_property
    def _filters(self) -> Tensor:
        """Slaney's mel filters [FFT_SIZE // 2 + 1, bands] from 0 to half the rate, each of unit area in Hz."""
        from transformers.audio_utils import mel_filter_bank

        filters = mel_filter_bank(
            FFT_SIZE // 2 + 1, self._num_mels, 0.0, self._heard_hz / 2, self._heard_hz, norm="slaney",
            mel_scale="slaney",
        )  # fmt: skip
        return torch.from_numpy(filters).float().to(self._device)

    def num_latents(self, duration_s: float) -> int:
        """Latents of that much sound, to the nearest 40 ms: 49 of 49 frames at 25 a second, 126 of 121 at 24."""
        return round(round(duration_s * self.rate_hz) / self.samples_per_latent)

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """[B, N] in [-1, 1] at 24 kHz, N >= 960 -> latents [B, L, D], L = N / 960 to the nearest whole number."""
        if waveform.ndim != 2 or waveform.shape[1] < self.samples_per_latent:
            raise ValueError(
                f"a waveform of shape {tuple(waveform.shape)}: LTX-2's audio codec reads mono samples [B, N], "
                f"N >= {self.samples_per_latent}"
            )
        heard = [resample(sound, self.rate_hz, self._heard_hz) for sound in waveform.float().cpu().numpy()]
        mel = self.log_mel(torch.from_numpy(np.stack(heard)).to(self._device))
        modes = self._vae.encode(mel[:, None].expand(-1, self._num_ears, -1, -1)).latent_dist.mode()  # [B, 8, L', 16]
        # the spectrogram has a frame at both ends, and so the VAE up to one latent more
        packed = modes.transpose(1, 2).flatten(2)[:, : round(waveform.shape[1] / self.samples_per_latent)]  # [B, L, D]
        return ((packed - self._mean.to(self._device)) / self._std.to(self._device)).to(waveform.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, L, D] -> waveform [B, 960 L - 720] in [-1, 1] at 24 kHz: the first latent is one mel frame."""
        if latents.ndim != 3 or latents.shape[2] != self.channels or latents.shape[1] == 0:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: LTX-2's audio VAE decodes [B, L, {self.channels}], L > 0"
            )
        packed = latents.to(self._device, torch.float32) * self._std.to(self._device) + self._mean.to(self._device)
        modes = packed.unflatten(2, (-1, self._num_mels // LATENT_FACTOR)).transpose(1, 2)  # [B, 8, L, 16]
        mel = self._vae.decode(modes).sample  # [B, 2, 4L - 3, bands]
        return self._vocoder(mel).mean(1).to(latents.device)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """[B, N] at the VAE's 16 kHz -> natural logarithm of the magnitudes' mel bands, [B, N // 160 + 1, bands]."""
        window = torch.hann_window(FFT_SIZE, device=waveform.device)
        spectrum = torch.stft(
            waveform, FFT_SIZE, self._hop, window=window, center=True, pad_mode="reflect", return_complex=True
        )
        return (spectrum.abs().transpose(1, 2) @ self._filters).clamp_min(1e-5).log()
