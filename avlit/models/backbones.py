"""The stock diffusers video transformers run layer by layer, so that a control can act inside each layer.

Each backbone has three functions: `*_time` (time embedding), `*_rotary` (cosines and sines of a shape) and
`*_prediction` (latents to prediction). They call the stock submodules in the stock order: without a control the result
is the stock model's, bit for bit. S is the number of tokens of one latent frame, N = T * S those of a clip.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from avlit.models.attention import Attention, AttentionMode

Rotary = tuple[Tensor, Tensor]
Stock = Any  # a diffusers module: neither its config nor its submodules are declared to type checkers
Inject = Callable[..., Tensor]
"""A layer's control: (video tokens [B, N, D], attention=the layer's self-attention) -> video tokens [B, N, D]."""

_ATEN = torch.ops.aten
PRODUCTS = frozenset({_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default})
ATTENTIONS = frozenset(
    {
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


Layer = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class LayerRun:
    """How a model runs its layers.

    recompute: activations that the backward pass computes again: blocks, all within a layer; selective, all but the
    results of attention and of every second matrix product. is_compiled: one graph for each kind of layer. attention:
    see `AttentionMode`.
    """

    recompute: Literal["none", "blocks", "selective"] = "none"
    is_compiled: bool = False
    attention: Attention = "sdpa"


def run_layer(function: Layer, *args: object, run: LayerRun, units: Sequence[nn.Module] = ()) -> tuple[Tensor, ...]:
    """One layer. units: modules whose parameters `function` reads without calling them, or calls by `forward`.

    Whoever spreads a unit's parameters over devices gives it a method `within(function, *args)`, which has them at hand
    while the function runs.
    """
    if run.is_compiled:
        function = compiled(function)
    if run.attention != "sdpa":
        function = partial(attending, run.attention, function)
    if run.recompute != "none" and torch.is_grad_enabled():
        contexts = selective_contexts if run.recompute == "selective" else noop_context_fn
        function = partial(checkpoint, function, use_reentrant=False, context_fn=contexts)
    for unit in units:
        if (within := getattr(unit, "within", None)) is not None:
            function = partial(within, function)
    return function(*args)


def attending(attention: Attention, function: Layer, *args: object) -> tuple[Tensor, ...]:
    """The layer with its attention computed so; within what is computed again, too."""
    with AttentionMode(attention):
        return function(*args)


@cache
def compiled(function: Layer) -> Layer:
    """The function compiled, once in a process; modules among its arguments share a graph where they are alike.

    So a layer takes modules, never its number: each number would be compiled by itself.
    """
    # Past torch's own limit of 8 graphs layers run uncompiled: few, where clips of a batch attend differently.
    settings: Any = {"recompile_limit": 64}
    return torch.compile(function, **settings)


def selective_contexts() -> tuple[Any, Any]:
    """For `checkpoint`: attention's results and every second matrix product's are kept (torchtitan's policy)."""
    counts = {False: 0, True: 0}  # while the layer runs first, and while it is computed again

    def policy(context: Any, operation: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
        if operation in PRODUCTS:
            counts[context.is_recompute] += 1
            is_kept = counts[context.is_recompute] % 2 == 1
        else:
            is_kept = operation in ATTENTIONS
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def select_time(at_keyframe: Tensor, at_step: Tensor, keyframe_mask: Tensor | None) -> Tensor:
    """Modulation of each latent frame: [1, D] at t=0 and [B, D] at the step -> [B, 1, D], or [B, T, 1, D] with a mask.

    keyframe_mask [B, T], True where the frame is given clean.
    """
    if keyframe_mask is None:
        return at_step[:, None]
    return torch.where(keyframe_mask[..., None], at_keyframe[:, None], at_step[:, None])[:, :, None]


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x [B, N, D] times scale plus shift, both [B, 1, D] or one a frame [B, T, 1, D]."""
    if scale.ndim == 3:
        return x * scale + shift
    return (x.unflatten(1, (scale.shape[1], -1)) * scale + shift).flatten(1, 2)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update for [B, N, D], the gate [B, 1, D] or one a frame [B, T, 1, D]."""
    if gate.ndim == 3:
        return x + gate * update
    return x + (gate * update.unflatten(1, (gate.shape[1], -1))).flatten(1, 2)


# CogVideoX


def cogvideox_rotary(backbone: Stock, frames: int, height: int, width: int, device: torch.device) -> Rotary:
    """Cosines and sines [N, head] of latents [T, h, w]; other sizes span the stock grid, as the pipeline does."""
    patch = backbone.config.patch_size
    grid = (height // patch, width // patch)
    stock = (backbone.config.sample_height // patch, backbone.config.sample_width // patch)
    # The largest centred rectangle of this shape within the stock grid, rounded as the pipeline rounds.
    if grid[0] / grid[1] > stock[0] / stock[1]:
        size = (stock[0], round(stock[0] / grid[0] * grid[1]))
    else:
        size = (round(stock[1] / grid[1] * grid[0]), stock[1])
    top, left = round((stock[0] - size[0]) / 2), round((stock[1] - size[1]) / 2)
    crop = ((top, left), (top + size[0], left + size[1]))
    cos, sin = get_3d_rotary_pos_embed(
        backbone.config.attention_head_dim, crop, grid_size=grid, temporal_size=frames, device=device
    )
    return cos, sin


def cogvideox_positions(backbone: Stock, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The learned position table as text [1, L, D] and video [1, N, D] for latents [T, h, w].

    Chosen, where the stock model refuses: fewer frames take the table's first (as MTV's code does), more frames and
    other frame sizes are interpolated linearly.
    """
    config, table = backbone.config, backbone.patch_embed.pos_embedding
    patch, tokens = config.patch_size, config.max_text_seq_length
    text, video = table[:, :tokens], table[:, tokens:]
    stock = (
        (config.sample_frames - 1) // config.temporal_compression_ratio + 1,
        config.sample_height // patch,
        config.sample_width // patch,
    )
    size = (frames, height // patch, width // patch)
    if size[1:] == stock[1:] and frames <= stock[0]:
        return text, video[:, : size[0] * size[1] * size[2]]
    grid = video[0].unflatten(0, stock)[:frames].permute(3, 0, 1, 2)[None]  # [1, D, T, h, w]
    return text, F.interpolate(grid.float(), size, mode="trilinear").to(grid.dtype).flatten(2).transpose(1, 2)


def cogvideox_time(backbone: Stock, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Time embedding [B, D] of integer timesteps [B]."""
    return backbone.time_embedding(backbone.time_proj(timestep).to(dtype))


def cogvideox_norm(
    norm: Stock, video: Tensor, text: Tensor, temb: Tensor, temb_clean: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CogVideoXLayerNormZero with t=0 modulation of the masked latent frames; text always follows the step's time."""
    if mask is None or temb_clean is None:
        return norm(video, text, temb)
    shift, scale, gate, text_shift, text_scale, text_gate = norm.linear(norm.silu(temb)).chunk(6, dim=1)
    clean = norm.linear(norm.silu(temb_clean)).chunk(6, dim=1)
    video = affine(norm.norm(video), select_time(1 + clean[1], 1 + scale, mask), select_time(clean[0], shift, mask))
    text = norm.norm(text) * (1 + text_scale)[:, None] + text_shift[:, None]
    return video, text, select_time(clean[2], gate, mask), text_gate[:, None]


def cogvideox_layer(
    block: Stock,
    video: Tensor,
    text: Tensor,
    temb: Tensor,
    temb_clean: Tensor | None,
    mask: Tensor | None,
    rotary: Rotary,
    inject: Inject,
) -> tuple[Tensor, Tensor]:
    """CogVideoXBlock.forward with the injection between the attention's residual and the feed-forward."""
    normed, normed_text, gate, text_gate = cogvideox_norm(block.norm1, video, text, temb, temb_clean, mask)
    out, text_out = block.attn1(hidden_states=normed, encoder_hidden_states=normed_text, image_rotary_emb=rotary)
    video, text = add_gated(video, gate, out), text + text_gate * text_out
    video = inject(video, attention=block.attn1)
    normed, normed_text, gate, text_gate = cogvideox_norm(block.norm2, video, text, temb, temb_clean, mask)
    out = block.ff(torch.cat((normed_text, normed), dim=1))
    tokens = text.shape[1]
    return add_gated(video, gate, out[:, tokens:]), text + text_gate * out[:, :tokens]


def cogvideox_prediction(
    backbone: Stock,
    latents: Tensor,
    *,
    temb: Tensor,
    text: Tensor,
    rotary: Rotary,
    keyframe_mask: Tensor | None,
    inject: Sequence[Inject],
    run: LayerRun,
) -> Tensor:
    """Latents [B, C_in, T, h, w], text [B, L, D] -> prediction [B, C_out, T, h, w]: the stock model's forward."""
    batch, _, frames, height, width = latents.shape
    patch = backbone.config.patch_size
    text = backbone.patch_embed.text_proj(text)  # [B, L, D]
    x = backbone.patch_embed.proj(latents.transpose(1, 2).flatten(0, 1))  # [B*T, D, h/p, w/p]
    video = x.unflatten(0, (batch, frames)).flatten(3).transpose(2, 3).flatten(1, 2)  # [B, N, D]
    if backbone.config.use_learned_positional_embeddings:
        text_position, position = cogvideox_positions(backbone, frames, height, width)
        text, video = text + text_position.to(text.dtype), video + position.to(video.dtype)

    temb_clean = None
    if keyframe_mask is not None:
        temb_clean = cogvideox_time(backbone, torch.zeros(1, dtype=torch.int64, device=latents.device), latents.dtype)
    for block, control in zip(backbone.transformer_blocks, inject, strict=True):
        video, text = run_layer(
            cogvideox_layer, block, video, text, temb, temb_clean, keyframe_mask, rotary, control,
            run=run, units=(block,),
        )  # fmt: skip

    out = backbone.proj_out(backbone.norm_out(backbone.norm_final(video), temb=temb))  # [B, N, C * p * p]
    out = out.reshape(batch, frames, height // patch, width // patch, -1, patch, patch)
    return out.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, -1, frames, height, width)


# Wan


def wan_rotary(backbone: Stock, frames: int, height: int, width: int, device: torch.device) -> Rotary:
    """Cosines and sines [N, head] of latents [T, h, w].

    Computed afresh in float32: the stock buffers are not saved with the weights, stay on the meta device when a model
    is built there, and lose precision with `.to(bfloat16)`.
    """
    config = backbone.config
    with torch.device(device):
        rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
        cos, sin = rope(torch.empty(1, 1, frames, height, width, device="meta"))
    return cos[0, :, 0], sin[0, :, 0]


def wan_time(backbone: Stock, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Time embedding [B, D] of integer timesteps [B]."""
    embedder = backbone.condition_embedder
    x = embedder.timesteps_proj(timestep).to(embedder.time_embedder.linear_1.weight.dtype)
    return embedder.time_embedder(x).to(dtype)


def wan_layer(
    block: Stock,
    video: Tensor,
    text: Tensor,
    modulation: Tensor,
    rotary: Rotary,
    inject: Inject,
) -> tuple[Tensor]:
    """WanTransformerBlock.forward with the injection between the text cross-attention and the feed-forward.

    modulation [B, 1, 6, D], or one a frame [B, T, 1, 6, D].
    """
    table = block.scale_shift_table + modulation.float()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(-2)
    normed = affine(block.norm1(video.float()), 1 + scale, shift).type_as(video)
    video = add_gated(video.float(), gate, block.attn1(normed, None, None, rotary)).type_as(video)
    video = video + block.attn2(block.norm2(video.float()).type_as(video), text, None, None)
    video = inject(video, attention=block.attn1)
    normed = affine(block.norm3(video.float()), 1 + ffn_scale, ffn_shift).type_as(video)
    return (add_gated(video.float(), ffn_gate, block.ffn(normed).float()).type_as(video),)


def wan_prediction(
    backbone: Stock,
    latents: Tensor,
    *,
    temb: Tensor,
    text: Tensor,
    rotary: Rotary,
    keyframe_mask: Tensor | None,
    inject: Sequence[Inject],
    run: LayerRun,
) -> Tensor:
    """Latents [B, C_in, T, h, w], text [B, L, D] -> prediction [B, C_out, T, h, w]. WanTransformer3DModel.forward.

    Keyframes take t=0 in every layer and in the output head, as Wan's own timesteps for each token do.
    """
    batch, _, frames, height, width = latents.shape
    patch, embedder = backbone.config.patch_size[-1], backbone.condition_embedder
    text = embedder.text_embedder(text)  # [B, L, D]
    video = backbone.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # [B, N, D]

    temb_clean = temb[:1]
    if keyframe_mask is not None:
        temb_clean = wan_time(backbone, torch.zeros(1, dtype=torch.int64, device=latents.device), latents.dtype)
    clean, step = (embedder.time_proj(embedder.act_fn(t)) for t in (temb_clean, temb))  # [1, 6D], [B, 6D]
    modulation = select_time(clean, step, keyframe_mask).unflatten(-1, (6, -1))  # [B, 1, 6, D] or [B, T, 1, 6, D]
    layout = (rotary[0][None, :, None], rotary[1][None, :, None])  # [1, N, 1, head]
    for block, control in zip(backbone.blocks, inject, strict=True):
        (video,) = run_layer(
            wan_layer, block, video, text, modulation, layout, control, run=run, units=(block,)
        )  # fmt: skip

    table = backbone.scale_shift_table + select_time(temb_clean, temb, keyframe_mask)[..., None, :]
    shift, scale = table.unbind(-2)  # [B, 1, D] or [B, T, 1, D]
    out = backbone.proj_out(affine(backbone.norm_out(video.float()), 1 + scale, shift).type_as(video))
    out = out.reshape(batch, frames, height // patch, width // patch, patch, patch, -1)
    return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)
