"""Twin Wan transformers for video and sound, joined by the self-attention of every block (UniTalking, sec. 4).

The video twin is the stock diffusers model, the audio twin has blocks of the same shape with a stem and a head of its
own; both run submodule by submodule. N = T * S video tokens, S of one latent frame; L audio tokens, one a latent; R
reference tokens.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanTimeTextImageEmbedding,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

from avlit.models.aligned_rope import aligned_rotary
from avlit.models.backbones import LayerRun, Rotary, Stock, run_layer, wan_rotary
from avlit.models.joint_attention import Mode
from avlit.models.pretrained import WeightsReport, load_backbone
from avlit.models.sizes import TwinWanConfig
from avlit.models.twin_block import Observe, ReferenceAttention, Stream, embed_time, project_out, twin_block
from avlit.randomness import numpy_generator


@dataclass(frozen=True)
class Velocities:
    """The flow's velocity of each stream that was given: video [B, C, T, h, w], audio [B, L, C]."""

    video: Tensor | None
    audio: Tensor | None


class AudioTwin(nn.Module):
    """Wan's blocks, embedders and head, under Wan's names, for audio latents; the stem is convolutional.

    The stem is Ovi's without its gated convolutions, which have 0.5 B weights at this width (chosen). Weights are drawn
    as Wan draws its own; the head starts at zero.
    """

    def __init__(self, config: TwinWanConfig) -> None:
        super().__init__()
        width, padding = config.inner_dim, config.audio_kernel // 2
        self.stem = nn.Sequential(
            nn.Conv1d(config.audio_channels, width, config.audio_kernel, padding=padding),
            nn.SiLU(),
            nn.Conv1d(width, width, config.audio_kernel, padding=padding),
        )
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=width, time_freq_dim=config.freq_dim, time_proj_dim=6 * width, text_embed_dim=config.text_dim
        )
        self.blocks = nn.ModuleList(
            WanTransformerBlock(width, config.ffn_dim, config.num_heads, cross_attn_norm=True)
            for _ in range(config.num_layers)
        )
        self.norm_out = FP32LayerNorm(width, 1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(width, config.audio_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in (self.condition_embedder.text_embedder, self.condition_embedder.time_embedder):
            for layer in (embedder.linear_1, embedder.linear_2):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)

    def embed(self, latents: Tensor) -> Tensor:
        """Audio latents [B, L, C] -> tokens [B, L, D]."""
        return self.stem(latents.transpose(1, 2)).transpose(1, 2).contiguous()


class TwinWan(nn.Module):
    """Noisy video and audio latents, text and reference sound to the flow's velocities (UniTalking, sec. 4).

    backbone: the video twin, the stock diffusers model, its keys under `backbone.`; audio: the audio twin;
    video_references, audio_references: their second key and value sets; reference_embedding: what both read there.
    In mode "separate" the video velocity of a model as built is the stock model's, bit for bit.
    layer_run: how each block is run.
    """

    backbone: Stock
    audio: Stock

    def __init__(self, config: TwinWanConfig, *, seed: int = 0, draws_video: bool = True) -> None:
        """Weights drawn from `seed`, whatever ran before. Under `torch.device("meta")` nothing is drawn.

        draws_video: False leaves the video twin on the meta device, for `load_released` to fill.
        """
        super().__init__()
        config.check()
        self.config = config
        place = nullcontext() if draws_video else torch.device("meta")
        with torch.random.fork_rng(devices=[]), place:
            torch.default_generator.manual_seed(int(numpy_generator(seed, "video twin").integers(2**63)))
            self.backbone = WanTransformer3DModel(
                patch_size=(1, config.patch_size, config.patch_size),
                num_attention_heads=config.num_heads,
                attention_head_dim=config.head_dim,
                in_channels=config.video_channels,
                out_channels=config.video_channels,
                text_dim=config.text_dim,
                freq_dim=config.freq_dim,
                ffn_dim=config.ffn_dim,
                num_layers=config.num_layers,
            )
        self.draw_audio(seed=seed)
        self.layer_run = LayerRun()
        self.rotary_of_shape: dict[tuple[float | torch.device, ...], Rotary] = {}

    def draw_audio(self, *, seed: int = 0) -> None:
        """New weights, a function of `seed` alone, for everything but the video twin.

        Call it between building a model on the meta device and `load_released`.
        """
        config, width = self.config, self.config.inner_dim
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(numpy_generator(seed, "audio twin").integers(2**63)))
            self.audio = AudioTwin(config)
            self.reference_embedding = nn.Linear(config.audio_channels, width)
            self.video_references = nn.ModuleList(ReferenceAttention(width) for _ in range(config.num_layers))
            self.audio_references = nn.ModuleList(ReferenceAttention(width) for _ in range(config.num_layers))

    @property
    def units(self) -> list[nn.Module]:
        """What is sharded as one: blocks that few parameters lie between."""
        return [*self.backbone.blocks, *self.audio.blocks, *self.video_references, *self.audio_references]

    @property
    def num_joint_layers(self) -> int:
        """Blocks in which video and sound meet."""
        return self.config.num_layers

    def forward(
        self,
        video_latents: Tensor | None,
        audio_latents: Tensor | None,
        *,
        text: Tensor,
        video_timestep: Tensor | None = None,
        audio_timestep: Tensor | None = None,
        reference: Tensor | None = None,
        mode: Mode | Sequence[Mode] = "joint",
        num_frames: float | None = None,
        observe: Observe | None = None,
    ) -> Velocities:
        """Velocities of latents video [B, C, T, h, w] and audio [B, L, C]; one of the two may be None.

        A stream without latents costs nothing, and its twin gets no gradient. *_timestep from 0 (clean) to 1000: [B],
        or [B, G] with one for each of G equal runs of tokens (G = T: each latent frame; G = N or L: each token).
        text [B, <= 512, D_text], padded here with zero features. reference [B, <= 257, C], latents of the reference
        sound, padded with zeros; None is all zeros, as in training clips without one. mode: see
        `joint_attention`; one-way is video blind to sound. num_frames: latent frames that video of the same duration
        as sound without video would have, not necessarily whole, for its positions. observe is told the queries,
        keys and values of every block (see `attention_maps`). ValueError for shapes that do not fit together.
        """
        self._check_streams(video_latents, audio_latents, video_timestep, audio_timestep, mode, num_frames)
        if not isinstance(mode, str) and list(mode) != sorted(mode):  # each mode's clips together: one call for each
            order = sorted(range(len(mode)), key=lambda clip: mode[clip])
            found = self.forward(
                _clips(video_latents, order),
                _clips(audio_latents, order),
                text=text[order],
                video_timestep=_clips(video_timestep, order),
                audio_timestep=_clips(audio_timestep, order),
                reference=_clips(reference, order),
                mode=[mode[clip] for clip in order],
                num_frames=num_frames,
                observe=observe,
            )
            back = sorted(range(len(order)), key=lambda place: order[place])
            return Velocities(video=_clips(found.video, back), audio=_clips(found.audio, back))
        latents = audio_latents if video_latents is None else video_latents
        assert latents is not None  # _check_streams
        batch, device, dtype, config = latents.shape[0], latents.device, latents.dtype, self.config
        text = _pad_tokens(text.to(dtype), config.max_text_tokens, "text", "model.max_text_tokens")
        if reference is None:
            reference = latents.new_zeros(batch, 0, config.audio_channels)
        reference = _pad_tokens(
            reference.to(dtype), config.max_reference_tokens, "reference", "model.max_reference_tokens"
        )
        reference = self.reference_embedding(reference)  # [B, R, D]

        streams: list[Stream] = []
        tokens: tuple[Tensor, ...] = ()
        if video_latents is not None and video_timestep is not None:
            num_frames, height, width = video_latents.shape[2:]
            rotary = self._video_rotary(num_frames, height, width, device)
            streams.append(self._stream(self.backbone, self.video_references, text, video_timestep, rotary, dtype))
            tokens += (self.backbone.patch_embedding(video_latents).flatten(2).transpose(1, 2).contiguous(),)
        if audio_latents is not None and audio_timestep is not None and num_frames is not None:
            rotary = self._audio_rotary(audio_latents.shape[1], num_frames, device)
            streams.append(self._stream(self.audio, self.audio_references, text, audio_timestep, rotary, dtype))
            tokens += (self.audio.embed(audio_latents),)
        for layer in range(config.num_layers):
            blocks = [stream.twin.blocks[layer] for stream in streams]
            references = [stream.references[layer] for stream in streams]
            watch = None if observe is None else partial(observe, layer)
            tokens = run_layer(
                twin_block, blocks, references, streams, reference, mode, watch, *tokens,
                run=self.layer_run, units=(*blocks, *references),
            )  # fmt: skip

        outputs = [project_out(stream, x) for stream, x in zip(streams, tokens, strict=True)]
        audio = outputs[-1] if audio_latents is not None else None  # [B, L, C]
        video = self._to_latents(outputs[0], video_latents) if video_latents is not None else None
        return Velocities(video=video, audio=audio)

    def _stream(
        self,
        twin: Stock,
        references: nn.ModuleList,
        text: Tensor,
        timestep: Tensor,
        rotary: Rotary,
        dtype: torch.dtype,
    ) -> Stream:
        temb, modulation = embed_time(twin, timestep, dtype)
        return Stream(twin, references, twin.condition_embedder.text_embedder(text), temb, modulation, rotary)

    def _to_latents(self, output: Tensor, like: Tensor) -> Tensor:
        """[B, N, p * p * C] -> [B, C, T, h, w], the shape of `like`."""
        batch, channels, frames, height, width = like.shape
        patch = self.config.patch_size
        output = output.reshape(batch, frames, height // patch, width // patch, patch, patch, channels)
        return output.permute(0, 6, 1, 2, 4, 3, 5).reshape(like.shape)

    def _video_rotary(self, frames: int, height: int, width: int, device: torch.device) -> Rotary:
        key = (frames, height, width, device)
        if key not in self.rotary_of_shape:
            # A validation may come first: tensors made in inference mode could not enter a training graph later.
            with torch.inference_mode(False):
                self.rotary_of_shape[key] = wan_rotary(self.backbone, frames, height, width, device)
        return self.rotary_of_shape[key]

    def _audio_rotary(self, num_tokens: int, num_frames: float, device: torch.device) -> Rotary:
        key = (num_tokens, num_frames, device)
        if key not in self.rotary_of_shape:
            rope = self.backbone.rope
            axes = (rope.t_dim, rope.h_dim, rope.w_dim)
            with torch.inference_mode(False):
                self.rotary_of_shape[key] = aligned_rotary(num_tokens, num_frames=num_frames, axes=axes, device=device)
        return self.rotary_of_shape[key]

    def _check_streams(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        video_timestep: Tensor | None,
        audio_timestep: Tensor | None,
        mode: Mode | Sequence[Mode],
        num_frames: float | None,
    ) -> None:
        config = self.config
        if video is None and audio is None:
            raise ValueError("neither video_latents nor audio_latents: give at least one")
        for name, latents, timestep in (("video", video, video_timestep), ("audio", audio, audio_timestep)):
            if (latents is None) != (timestep is None):
                raise ValueError(f"{name}_latents and {name}_timestep go together: give both or neither")
        if (video is None or audio is None) and mode != "joint":
            raise ValueError(f"mode={mode!r}: a single stream has nothing to be told apart from; leave mode at 'joint'")
        if (num_frames is None) == (video is None):
            raise ValueError(
                f"num_frames={num_frames}: give it for sound without video, and only then; "
                "with video it is the latents' own"
            )
        if video is not None and video_timestep is not None:
            _, channels, frames, height, width = video.shape
            if channels != config.video_channels:
                raise ValueError(
                    f"video latents have {channels} channels but model.video_channels={config.video_channels}: "
                    "set it to the video codec's channels"
                )
            if height % config.patch_size or width % config.patch_size:
                raise ValueError(
                    f"video latents of {height}x{width}: must be multiples of model.patch_size={config.patch_size}"
                )
            _check_timestep("video", video_timestep, frames * height * width // config.patch_size**2)
        if audio is not None and audio_timestep is not None:
            if audio.shape[-1] != config.audio_channels:
                raise ValueError(
                    f"audio latents have {audio.shape[-1]} channels but model.audio_channels={config.audio_channels}: "
                    "set it to the audio codec's channels"
                )
            _check_timestep("audio", audio_timestep, audio.shape[1])


def _clips(tensor: Tensor | None, order: list[int]) -> Tensor | None:
    return None if tensor is None else tensor[order]


def _check_timestep(name: str, timestep: Tensor, num_tokens: int) -> None:
    if timestep.ndim not in (1, 2) or (timestep.ndim == 2 and num_tokens % timestep.shape[1]):
        raise ValueError(
            f"{name}_timestep has shape {tuple(timestep.shape)} for {num_tokens} tokens: "
            "must be [B] or [B, G] with G a divisor of the tokens"
        )


def _pad_tokens(x: Tensor, length: int, name: str, key: str) -> Tensor:
    """[B, S, D] -> [B, length, D], zeros past S: a clip's result does not depend on its neighbours' lengths."""
    if x.shape[1] > length:
        raise ValueError(f"{name} has {x.shape[1]} tokens but {key}={length}: trim it or raise the limit")
    return F.pad(x, (0, 0, 0, length - x.shape[1]))


def twin_trainable(model: TwinWan, *, which: Literal["audio", "all"]) -> list[str]:
    """Names of the parameters that train.

    audio: UniTalking's first stage (sec. 4.5), the audio twin's stem, attention and feed-forward, with its head,
    modulation tables, norms and reference sets (chosen: nothing else trains them); text and time embedders stay those
    of the video twin. all: everything, as in the second stage.
    """
    names = [name for name, _ in model.named_parameters()]
    if which == "all":
        return names
    if which != "audio":
        raise ValueError(f"trainable={which!r}: must be one of audio, all")
    trained = ("audio.", "audio_references.", "reference_embedding.")
    return [name for name in names if name.startswith(trained) and not name.startswith("audio.condition_embedder.")]


def load_released(model: TwinWan, folder: str | Path) -> WeightsReport:
    """Fill the video twin from a released diffusers folder of its size, and copy its embedders to the audio twin.

    Checks and errors are those of `load_backbone`; nothing changes if there is one. A video twin on the meta device
    takes the folder's tensors as its own. In the report, the copied tensors are among the loaded ones. ValueError also
    for an audio twin on the meta device, which no folder fills.
    """
    if any(parameter.is_meta for parameter in model.audio.parameters()):
        raise ValueError("the audio twin is on the meta device and no released folder has it: call draw_audio first")
    report = load_backbone(model, folder)
    model.audio.condition_embedder.load_state_dict(model.backbone.condition_embedder.state_dict())
    copied = tuple(name for name in report.new if name.startswith("audio.condition_embedder."))
    new = tuple(name for name in report.new if name not in copied)
    return replace(report, loaded=report.loaded + copied, new=new)
