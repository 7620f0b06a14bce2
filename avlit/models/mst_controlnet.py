"""MTV's model: a stock video transformer with the MST-ControlNet's injection in every layer (MTV, sec. 4.2)."""

from functools import partial
from typing import Literal

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from avlit.models.backbones import (
    LayerRun,
    Rotary,
    Stock,
    cogvideox_prediction,
    cogvideox_rotary,
    cogvideox_time,
    wan_prediction,
    wan_rotary,
    wan_time,
)
from avlit.models.rotation import rotate_pairs
from avlit.models.sizes import MSTControlNetConfig
from avlit.models.track_encoder import ControlTokens, MultiStreamControl


def split_heads(x: Tensor, heads: int, norm: Stock) -> Tensor:
    """[B, S, D] -> normalised heads [B, H, S, D/H]; CogVideoX normalises each head, Wan the full width."""
    if norm.weight.shape[-1] == x.shape[-1]:
        return norm(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    return norm(x.unflatten(-1, (heads, -1))).transpose(1, 2)


class IntervalCrossAttention(nn.Module):
    """Video tokens of one interval read one track's tokens of that interval (MTV, Eq. 2).

    Queries and keys pass the norms of the layer's own self-attention; queries are rotated to their place in a frame,
    keys are not. The output starts at zero, so that training starts from the backbone (chosen).
    """

    def __init__(self, width: int, control_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(control_dim, 2 * width)
        self.to_out = nn.Linear(width, width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, video: Tensor, tokens: Tensor, attention: Stock, rotary: Rotary) -> Tensor:
        """video [B*T, S, D], tokens [B*T, M, E] -> update [B*T, S, D]. rotary: first frame's [S, head] twice."""
        key, value = self.to_kv(tokens).chunk(2, dim=-1)
        query = split_heads(self.to_q(self.norm(video)), attention.heads, attention.norm_q)  # [B*T, H, S, head]
        key = split_heads(key, attention.heads, attention.norm_k)  # [B*T, H, M, head]
        value = value.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(rotate_pairs(query, *rotary), key, value)
        return self.to_out(out.transpose(1, 2).flatten(2))


class LayerInjection(nn.Module):
    """The control of one layer: interval feature injection, then holistic style injection."""

    def __init__(self, config: MSTControlNetConfig) -> None:
        super().__init__()
        width = config.inner_dim
        self.cross = nn.ModuleDict(
            {name: IntervalCrossAttention(width, config.control_dim) for name in config.injections}
        )
        self.style = nn.Linear(config.control_dim, 2 * width) if config.has_style else None
        if self.style is not None:
            nn.init.zeros_(self.style.weight)
            nn.init.zeros_(self.style.bias)

    def forward(self, video: Tensor, control: ControlTokens, attention: Stock, rotary: Rotary) -> Tensor:
        """video [B, N, D] -> [B, N, D]: h' = h + sum of h^track (Eq. 2), then h' (1 + gamma) + beta (Eq. 3).

        Every cross-attention reads the same h. attention: the layer's self-attention, for its heads and norms.
        """
        space = rotary[0].shape[0]
        intervals = video.reshape(-1, space, video.shape[-1])  # [B*T, S, D]
        injected = intervals
        for name, cross in self.cross.items():
            injected = injected + cross(intervals, control.interval[name], attention, rotary)
        video = injected.view_as(video)
        if self.style is None or control.style is None:
            return video
        gamma, beta = self.style(control.style)[:, None].chunk(2, dim=-1)  # [B, 1, D]
        return video * (1 + gamma) + beta


class MSTControlNet(nn.Module):
    """Noisy video latents, text and three demixed tracks to the prediction of the backbone's objective.

    backbone: the stock diffusers model, its keys under `backbone.`; control: track encoders and interaction blocks;
    injections: one for each layer. As built the output equals the stock backbone's, bit for bit.
    layer_run: how each layer is run.
    """

    backbone: Stock

    def __init__(self, config: MSTControlNetConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.backbone = build_backbone(config)
        self.draw_control()
        self.layer_run = LayerRun()
        self.rotary_of_shape: dict[tuple[int, int, int, torch.device], Rotary] = {}

    def draw_control(self) -> None:
        """New random weights for everything but the backbone.

        Call it again once a backbone is loaded into a model that was built on the meta device.
        """
        self.control = MultiStreamControl(self.config)
        self.injections = nn.ModuleList(LayerInjection(self.config) for _ in range(self.config.num_layers))

    @property
    def units(self) -> list[nn.Module]:
        """What is sharded as one: blocks that few parameters lie between."""
        blocks = self.backbone.blocks if self.config.variant == "wan" else self.backbone.transformer_blocks
        return [*blocks, *self.injections, *self.control.blocks, *self.control.encoders.values()]

    def forward(
        self,
        noisy_latents: Tensor,
        *,
        timestep: Tensor,
        text: Tensor,
        speech: Tensor,
        effects: Tensor,
        music: Tensor,
        speech_second: Tensor | None = None,
        keyframe_mask: Tensor | None = None,
    ) -> Tensor:
        """Prediction [B, C, T, h, w] (v for CogVideoX, the flow's velocity for Wan) of latents of the same shape.

        timestep [B] int64. text [B, L, D], padded here with zero features to `max_text_tokens`, so that a clip's
        result does not depend on its neighbours' prompts. Tracks [B, F, K, D] with F = 4 (T - 1) + 1.
        speech_second: the second speaker's; None is silence. keyframe_mask [B, T] bool, True where noisy_latents holds
        a clean frame: those frames are modulated as t=0; None is the stock path. Image-conditioning channels are zero.
        ValueError for shapes that do not fit together.
        """
        self._check_shapes(noisy_latents, text, speech, speech_second)
        is_wan, backbone, dtype = isinstance(self.backbone, WanTransformer3DModel), self.backbone, noisy_latents.dtype
        batch, channels, frames, height, width = noisy_latents.shape
        text = F.pad(text.to(dtype), (0, 0, 0, self.config.max_text_tokens - text.shape[1]))
        latents = noisy_latents
        if empty := self.config.in_channels - channels:
            latents = torch.cat((latents, latents.new_zeros(batch, empty, frames, height, width)), dim=1)

        temb = (wan_time if is_wan else cogvideox_time)(backbone, timestep, dtype)
        control = self.control(
            speech.to(dtype),
            effects.to(dtype),
            music.to(dtype),
            speech_second=None if speech_second is None else speech_second.to(dtype),
            temb=temb,
        )
        rotary = self._rotary(frames, height, width, noisy_latents.device)
        space = rotary[0].shape[0] // frames
        first_frame = (rotary[0][:space], rotary[1][:space])
        inject = [partial(injection, control=control, rotary=first_frame) for injection in self.injections]
        return (wan_prediction if is_wan else cogvideox_prediction)(
            backbone,
            latents,
            temb=temb,
            text=text,
            rotary=rotary,
            keyframe_mask=keyframe_mask,
            inject=inject,
            run=self.layer_run,
        )

    def _rotary(self, frames: int, height: int, width: int, device: torch.device) -> Rotary:
        key = (frames, height, width, device)
        if key not in self.rotary_of_shape:
            make = wan_rotary if isinstance(self.backbone, WanTransformer3DModel) else cogvideox_rotary
            # A validation may come first: tensors made in inference mode could not enter a training graph later.
            with torch.inference_mode(False):
                self.rotary_of_shape[key] = make(self.backbone, frames, height, width, device)
        return self.rotary_of_shape[key]

    def _check_shapes(self, latents: Tensor, text: Tensor, speech: Tensor, speech_second: Tensor | None) -> None:
        config = self.config
        _, channels, frames, height, width = latents.shape
        if channels != config.out_channels:
            raise ValueError(
                f"latents have {channels} channels but model.out_channels={config.out_channels}: "
                "set it to the video codec's channels"
            )
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(f"latents of {height}x{width}: must be multiples of model.patch_size={config.patch_size}")
        if text.shape[1] > config.max_text_tokens:
            raise ValueError(
                f"text has {text.shape[1]} tokens but model.max_text_tokens={config.max_text_tokens}: "
                "trim the prompts or raise it"
            )
        expected = (config.temporal_factor * (frames - 1) + 1, config.audio_layers, config.audio_dim)
        if tuple(speech.shape[1:]) != expected:
            raise ValueError(
                f"track features are {tuple(speech.shape[1:])} for each clip, expected {expected}: frames of "
                f"{frames} latent frames, model.audio_layers and model.audio_dim"
            )
        if speech_second is not None and not config.second_speaker:
            raise ValueError("speech_second is given but model.second_speaker=false: set it to true")


def build_backbone(config: MSTControlNetConfig) -> CogVideoXTransformer3DModel | WanTransformer3DModel:
    """The stock diffusers model of this size, with random weights."""
    if config.variant == "wan":
        return WanTransformer3DModel(
            patch_size=(1, config.patch_size, config.patch_size),
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.wan_freq_dim,
            ffn_dim=config.wan_ffn_dim,
            num_layers=config.num_layers,
        )
    backbone = CogVideoXTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        time_embed_dim=config.time_embed_dim,
        text_embed_dim=config.text_dim,
        num_layers=config.num_layers,
        sample_width=config.sample_width,
        sample_height=config.sample_height,
        sample_frames=config.sample_frames,
        patch_size=config.patch_size,
        temporal_compression_ratio=config.temporal_factor,
        max_text_seq_length=config.max_text_tokens,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=config.learned_positions,
    )
    if config.learned_positions:
        # diffusers makes the table in float64 but adds it in the model's precision.
        backbone.patch_embed.pos_embedding = backbone.patch_embed.pos_embedding.float()
    return backbone


def build_mst_controlnet(config: MSTControlNetConfig, *, seed: int = 0) -> MSTControlNet:
    """The model with weights drawn from `seed`, whatever ran before. Under `torch.device("meta")` nothing is drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MSTControlNet(config)


def mtv_trainable(model: MSTControlNet, *, which: Literal["paper", "control", "all"]) -> list[str]:
    """Names of the parameters that train.

    paper: the MST-ControlNet and the backbone's attention projections. MTV's code selects by substring, so the norm
    before CogVideoX's feed-forward trains with them; of Wan, self- and text cross-attention (chosen).
    control: the backbone frozen (MTV, sec. 5.2, W/o TB). all: everything, for training from scratch.
    """
    names = [name for name, _ in model.named_parameters()]
    if which == "all":
        return names
    if which not in ("paper", "control"):
        raise ValueError(f"trainable={which!r}: must be one of paper, control, all")
    attention = (".attn1.to_", ".attn2.to_") if model.config.variant == "wan" else (".attn1.to_", ".norm2.norm.")
    return [
        name
        for name in names
        if not name.startswith("backbone.") or (which == "paper" and any(part in name for part in attention))
    ]
