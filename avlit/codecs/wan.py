"""Wan's codecs from local diffusers folders: the VAEs of Wan 2.1 and 2.2, and umT5.

Clips pass through them on their way to a shard, and come back through the VAE when sampled.
"""

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avlit.codecs.pretrained import as_user_error, fingerprint, load_model, load_tokenizer, model_files, model_folder
from avlit.errors import UserError

TEXT_TOKENS = 512
"""Text tokens that Wan's cross-attention reads, zeros past the prompt's, without a mask."""


class WanCodec:
    """diffusers' AutoencoderKLWan from `folder/vae`: 4x8x8 of 16 channels (Wan 2.1), 4x16x16 of 48 (Wan 2.2).

    Latents are normalised by channel with the config's `latents_mean` and `latents_std`, as the pipelines do. Encoding
    takes the mode of the latent distribution, not a sample, so that a video has one encoding.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._source, config = model_folder(
            "codecs.video_weights", folder / "vae", "_class_name", ("AutoencoderKLWan",)
        )
        self._device, self._dtype = device, dtype
        path = self._source / "config.json"
        for name in ("z_dim", "dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            if name not in config:
                raise UserError(f"codecs.video_weights: {path} lacks {name}; download it again")
        with as_user_error(f"codecs.video_weights: {path} is not of a Wan VAE"):
            self.channels: int = int(config["z_dim"])
            # Wan 2.1's config states no factors; its layers do
            self.temporal_factor: int = 2 ** sum(bool(halves) for halves in config["temperal_downsample"])
            self.spatial_factor: int = 2 ** (len(config["dim_mult"]) - 1) * int(config.get("patch_size") or 1)
            for name, factor in (("temporal", self.temporal_factor), ("spatial", self.spatial_factor)):
                stated = config.get(f"scale_factor_{name}")
                if stated is not None and stated != factor:
                    raise ValueError(f"scale_factor_{name}={stated}, and layers that make {factor}")
            if self.temporal_factor != 4:  # diffusers' class encodes four frames at a time, whatever its layers
                raise ValueError(f"temperal_downsample={config['temperal_downsample']} has not two halvings of time")
            self._mean, self._std = (
                torch.tensor(config[name], dtype=torch.float32).view(1, -1, 1, 1, 1)  # [1, C, 1, 1, 1]
                for name in ("latents_mean", "latents_std")
            )
            if not self._mean.shape[1] == self._std.shape[1] == self.channels:
                raise ValueError(
                    f"{self._mean.shape[1]} latents_mean and {self._std.shape[1]} latents_std of z_dim={self.channels}"
                )
            if not (self._mean.isfinite().all() and self._std.isfinite().all() and (self._std > 0).all()):
                raise ValueError("latents_mean and latents_std must be finite, and latents_std above 0")
        self.identity = f"AutoencoderKLWan-{fingerprint(model_files(self._source))}"

    @cached_property
    def _vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        vae = load_model("codecs.video_weights", AutoencoderKLWan, self._source, self._dtype).to(self._device)
        vae.enable_slicing()  # one clip at a time: the memory of one, the same numbers
        return vae

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [-1, 1], F = 4n + 1, H and W multiples of s = `spatial_factor` -> [B, C, n + 1, H/s, W/s].

        Each latent channel has mean 0 and variance 1 over the videos that Wan measured.
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % self.temporal_factor != 1:
            raise ValueError(
                f"video of shape {tuple(video.shape)}: Wan's VAE reads [B, 3, F, H, W] of "
                f"F = {self.temporal_factor}n + 1 frames"
            )
        if video.shape[3] % self.spatial_factor or video.shape[4] % self.spatial_factor:
            raise ValueError(
                f"video of {video.shape[3]}x{video.shape[4]} pixels: this VAE needs multiples of {self.spatial_factor}"
            )
        modes = self._vae.encode(video.to(self._vae.device, self._vae.dtype)).latent_dist.mode()
        latents = modes.to(video.device, torch.float32)
        return (latents - self._mean.to(video.device)) / self._std.to(video.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, T, h, w] -> video [B, 3, 4(T - 1) + 1, s h, s w], clipped to [-1, 1]."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: this VAE decodes [B, {self.channels}, T, h, w]")
        scaled = latents.float() * self._std.to(latents.device) + self._mean.to(latents.device)
        video = self._vae.decode(scaled.to(self._vae.device, self._vae.dtype)).sample
        return video.to(latents.device, torch.float32)


class UMT5Encoder:
    """transformers' UMT5EncoderModel from `folder/text_encoder` and `folder/tokenizer`, as Wan uses umT5-xxl.

    Prompts are cleaned as diffusers' WanPipeline cleans them, which repairs broken characters where the package ftfy is
    installed; the identity tells the two apart. Features are the prompt's own: the model fills them up to
    TEXT_TOKENS with the zeros that Wan reads past them. Longer prompts are cut.
    """

    max_tokens = TEXT_TOKENS

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._source, _ = model_folder(
            "codecs.text_weights", folder / "text_encoder", "architectures", ("UMT5EncoderModel",)
        )

        from transformers import UMT5Config

        with as_user_error(f"codecs.text_weights: {self._source / 'config.json'} cannot be read as UMT5Config"):
            config = UMT5Config.from_pretrained(self._source, local_files_only=True)
        self._tokenizer, words = load_tokenizer(folder / "tokenizer", model=self._source, vocab_size=config.vocab_size)
        self.dim: int = config.d_model
        self._device, self._dtype = device, dtype
        cleaning = "ftfy" if find_spec("ftfy") else "html"
        files = [*model_files(self._source), *words]
        self.identity = f"UMT5EncoderModel-{self.max_tokens}-{cleaning}-{fingerprint(files)}"

    @cached_property
    def _model(self) -> Any:
        from transformers import UMT5EncoderModel

        return load_model("codecs.text_weights", UMT5EncoderModel, self._source, self._dtype).to(self._device)

    @torch.no_grad()
    def encode(self, text: str) -> Tensor:
        """A prompt -> [L, D] on the CPU, its tokens and the end's, L from 1 (an empty prompt) to 512."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self._tokenizer(prompt_clean(text), max_length=self.max_tokens, truncation=True, return_tensors="pt")
        # unpadded: the pipeline's mask hides the padding from the prompt, so its features are these
        features = self._model(tokens.input_ids.to(self._model.device)).last_hidden_state  # [1, L, D]
        return features[0].float().cpu()
