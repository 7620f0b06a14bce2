"""LTX-2's video codec and latent upsampler from a local diffusers folder.

Clips pass through the codec on their way to a shard, and come back through it when sampled; the upsampler takes sampled
latents from half the resolution to the whole before they are refined.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from avlit.codecs.pretrained import as_user_error, fingerprint, load_model, model_files, model_folder
from avlit.errors import UserError

KEY = "codecs.video_weights"

WHOLE = 121 * 512 * 768
"""Most pixels of a clip (frames x height x width) that are encoded and decoded in one piece: LTX-2's default clip."""

TILE, TILE_STRIDE = 512, 448
"""Height and width of the tiles of larger clips, and what they advance by, in pixels: diffusers' own."""

TILE_FRAMES, TILE_FRAMES_STRIDE = 64, 40
"""Frames of their windows in time, and what they advance by: those of ltx-core, which overlap by three latents."""


class LTX2VideoCodec:
    """diffusers' AutoencoderKLLTX2Video from `folder/vae`: 8x time, 32x space, 128 channels as released.

    Latents are normalised by channel with the `latents_mean` and `latents_std` among the weights and the config's
    `scaling_factor`, as the pipelines do. Encoding takes the mode of the latent distribution, not a sample. Clips of
    more than WHOLE pixels pass in overlapping tiles that are blended, near to but not the same as in one piece; which
    clips do follows from their size alone, so that a clip has one encoding on every machine.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._source, config = model_folder(KEY, folder / "vae", "_class_name", ("AutoencoderKLLTX2Video",))
        self._device, self._dtype = device, dtype
        path = self._source / "config.json"
        for name in (
            "latent_channels", "patch_size", "patch_size_t", "downsample_type", "spatio_temporal_scaling",
            "scaling_factor", "spatial_compression_ratio", "temporal_compression_ratio",
        ):  # fmt: skip
            if config.get(name) is None:  # without ratios diffusers takes 64 and 16, and tiles clips at wrong places
                raise UserError(f"{KEY}: {path} lacks {name}; download it again")
        with as_user_error(f"{KEY}: {path} is not of an LTX-2 VAE"):
            self.channels: int = int(config["latent_channels"])
            scaling = config["spatio_temporal_scaling"]
            halvings = [
                kind for kind, is_on in zip(config["downsample_type"], _each(scaling, config), strict=True) if is_on
            ]
            in_space, in_time = (
                sum(kind in (axis, "spatiotemporal") for kind in halvings) for axis in ("spatial", "temporal")
            )
            self.spatial_factor: int = int(config["patch_size"]) * 2**in_space
            self.temporal_factor: int = int(config["patch_size_t"]) * 2**in_time
            for name, factor in (("spatial", self.spatial_factor), ("temporal", self.temporal_factor)):
                stated = config[f"{name}_compression_ratio"]
                if stated != factor:
                    raise ValueError(f"{name}_compression_ratio={stated}, and layers that make {factor}")
            if config.get("timestep_conditioning") or any(_each(config.get("decoder_inject_noise", False), config)):
                raise ValueError(
                    "timestep_conditioning or decoder_inject_noise: its decoder adds noise, unlike LTX-2's"
                )
            scale = float(config["scaling_factor"])
            if not 0 < scale < float("inf"):
                raise ValueError(f"scaling_factor={scale}")
        mean, std = latent_stats(KEY, self._source, self.channels)
        self._mean, self._std = (value.view(1, -1, 1, 1, 1) for value in (mean, std / scale))  # [1, C, 1, 1, 1]
        self.identity = f"AutoencoderKLLTX2Video-{fingerprint(model_files(self._source))}"

    @cached_property
    def _vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video

        vae = load_model(KEY, AutoencoderKLLTX2Video, self._source, self._dtype).to(self._device)
        vae.enable_slicing()  # one clip at a time: the memory of one, the same numbers
        vae.enable_tiling(TILE, TILE, TILE_FRAMES, tile_sample_stride_num_frames=TILE_FRAMES_STRIDE)
        return vae

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [-1, 1], F = 8n + 1, H and W multiples of 32 -> latents [B, C, n + 1, H/32, W/32]."""
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % self.temporal_factor != 1:
            raise ValueError(
                f"video of shape {tuple(video.shape)}: LTX-2's VAE reads [B, 3, F, H, W] of "
                f"F = {self.temporal_factor}n + 1 frames"
            )
        if video.shape[3] % self.spatial_factor or video.shape[4] % self.spatial_factor:
            raise ValueError(
                f"video of {video.shape[3]}x{video.shape[4]} pixels: this VAE needs multiples of {self.spatial_factor}"
            )
        self._tile(*video.shape[2:])
        self._vae.use_framewise_decoding = self._vae.use_tiling  # diffusers reads this one when it encodes, too
        modes = self._vae.encode(video.to(self._vae.device, self._vae.dtype)).latent_dist.mode()
        return self._normalised(modes.to(video.device, torch.float32))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, T, h, w] -> video [B, 3, 8(T - 1) + 1, 32h, 32w], clipped to [-1, 1].

        h and w must be at least 2: the decoder mirrors the picture at its borders.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels or min(latents.shape[3:]) < 2:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: this VAE decodes [B, {self.channels}, T, h, w] of at least "
                "2 x 2 cells"
            )
        num_frames, height, width = latents.shape[2:]
        self._tile(
            self.temporal_factor * (num_frames - 1) + 1, height * self.spatial_factor, width * self.spatial_factor
        )
        self._vae.use_framewise_decoding = False
        modes = self._own(latents).to(self._vae.device, self._vae.dtype)
        video = self._decode_windows(modes) if self._vae.use_tiling else self._vae.decode(modes).sample
        return video.to(latents.device, torch.float32).clamp(-1.0, 1.0)

    def _tile(self, num_frames: int, height: int, width: int) -> None:
        """Tiles for a clip of more than WHOLE pixels; none is a single cell wide, which the decoder cannot mirror."""
        strides: list[int] = []
        for pixels in (height, width):
            cells, stride = pixels // self.spatial_factor, TILE_STRIDE // self.spatial_factor
            while cells % stride == 1:
                stride -= 1
            strides.append(TILE if pixels <= TILE else stride * self.spatial_factor)
        self._vae.tile_sample_stride_height, self._vae.tile_sample_stride_width = strides
        self._vae.use_tiling = num_frames * height * width > WHOLE

    def _decode_windows(self, modes: Tensor) -> Tensor:
        """Windows in time, each in tiles of space, cross-faded where they overlap.

        diffusers' own windows leave out the last frame of every window but the first instead of the first frame, so
        that all pictures after it come one frame late.
        """
        length, stride = TILE_FRAMES // self.temporal_factor, TILE_FRAMES_STRIDE // self.temporal_factor
        starts = range(0, max(1, modes.shape[2] - 1 - length + stride), stride)
        pieces: list[Tensor] = []
        window = None
        for start in starts:
            before, window = window, self._vae.decode(modes[:, :, start : start + length + 1]).sample
            if before is not None:  # the first frame is the last of its latent's eight, and the window before has it
                window = self._vae.blend_t(before, window[:, :, 1:], TILE_FRAMES - TILE_FRAMES_STRIDE)
            is_last = start == starts[-1]
            pieces.append(window if is_last else window[:, :, : TILE_FRAMES_STRIDE + (before is None)])
        return torch.cat(pieces, dim=2)

    def _normalised(self, modes: Tensor) -> Tensor:
        """The VAE's own latents -> of mean 0 and variance 1 over the videos that LTX-2 measured."""
        return (modes - self._mean.to(modes.device)) / self._std.to(modes.device)

    def _own(self, latents: Tensor) -> Tensor:
        """The inverse of `_normalised`."""
        return latents.float() * self._std.to(latents.device) + self._mean.to(latents.device)


class LTX2Upsampler:
    """diffusers' LTX2LatentUpsamplerModel from `folder/latent_upsampler`: twice the height and width, the same frames.

    It works on the VAE's own latents; those given and returned are normalised as `codec`, of the same folder, has them.
    """

    def __init__(
        self,
        folder: Path,
        codec: LTX2VideoCodec,
        *,
        key: str = KEY,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """key: the setting that names `folder`, for messages."""
        self._source, config = model_folder(
            key, folder / "latent_upsampler", "_class_name", ("LTX2LatentUpsamplerModel",)
        )
        self._codec, self._key, self._device, self._dtype = codec, key, device, dtype
        enlarges = (
            bool(config.get("spatial_upsample")),
            bool(config.get("temporal_upsample")),
            config.get("rational_spatial_scale", 2.0) if config.get("use_rational_resampler") else 2.0,
        )
        if config.get("in_channels") != codec.channels or enlarges != (True, False, 2.0):
            raise UserError(
                f"{key}: {self._source / 'config.json'} is of an upsampler with in_channels={config.get('in_channels')}"
                f", spatial_upsample={enlarges[0]}, temporal_upsample={enlarges[1]}, scale {enlarges[2]}; expected the "
                f"spatial upsampler by 2 of the VAE's {codec.channels} channels"
            )
        self.identity = f"LTX2LatentUpsamplerModel-{fingerprint(model_files(self._source))}"

    @cached_property
    def _model(self) -> Any:
        from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

        return load_model(self._key, LTX2LatentUpsamplerModel, self._source, self._dtype).to(self._device)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, T, h, w] -> normalised latents [B, C, T, 2h, 2w]."""
        if latents.ndim != 5 or latents.shape[1] != self._codec.channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: the upsampler reads [B, {self._codec.channels}, T, h, w]"
            )
        enlarged = self._model(self._codec._own(latents).to(self._model.device, self._model.dtype))
        return self._codec._normalised(enlarged.to(latents.device, torch.float32))


def latent_stats(key: str, source: Path, channels: int) -> tuple[Tensor, Tensor]:
    """`latents_mean` and `latents_std` [C] among the weights in `source`, float32 as they are stored.

    UserError: they are missing, of another number of channels, or make no sense.
    """
    names, found = {"latents_mean", "latents_std"}, {}
    with as_user_error(f"{key}: the weights in {source} do not hold latents_mean and latents_std of {channels}"):
        for path in sorted(source.glob("*.safetensors")):
            with safe_open(path, framework="pt") as weights:
                found |= {name: weights.get_tensor(name).float() for name in names & set(weights.keys())}
        if found.keys() != names or any(value.shape != (channels,) for value in found.values()):
            raise ValueError(f"they have {', '.join(f'{name} {list(value.shape)}' for name, value in found.items())}")
        mean, std = found["latents_mean"], found["latents_std"]
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError("they must be finite, and latents_std above 0")
    return mean, std


def _each(value: Any, config: dict[str, Any]) -> list[Any]:
    """A setting that may be one for all blocks, as one for each."""
    return list(value) if isinstance(value, list) else [value] * len(config["downsample_type"])
