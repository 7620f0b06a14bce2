"""One branch of the twin MM-DiT: the stock HunyuanVideo transformer, how its weights start, what enters its blocks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAdaNorm,
    HunyuanVideoPatchEmbed,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor, nn

from avlit.models.backbones import Rotary, Stock
from avlit.models.mmdit_block import Branch
from avlit.models.sizes import TwinMMDiTConfig
from avlit.randomness import numpy_generator


@dataclass(frozen=True)
class BranchText:
    """The text of one branch.

    features [B, S, D_text]. lengths: each clip's tokens before the padding, 1 to S, on the host; None is S for all. As
    in the stock model nothing reads padding. Attention takes a mask [B, 1, 1, all tokens] where a length is below S,
    and no mask, as flash kernels need it, where none is. pooled [B, pooled_dim]: what the model takes beside it.
    """

    features: Tensor
    lengths: Sequence[int] | None = None
    pooled: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.features.shape[1]

    @property
    def is_padded(self) -> bool:
        """Whether some clip is shorter than S."""
        return self.lengths is not None and min(self.lengths) < self.num_tokens

    @property
    def is_text(self) -> Tensor:
        """Which tokens are no padding, bool [B, S], on the host."""
        lengths = [self.num_tokens] * len(self.features) if self.lengths is None else list(self.lengths)
        return torch.arange(self.num_tokens) < torch.tensor(lengths)[:, None]


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Within it torch draws a function of (seed, name); outside nothing changes."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(numpy_generator(seed, name).integers(2**63)))
        yield


def build_branch(config: TwinMMDiTConfig, in_channels: int, out_channels: int, patch_size: int) -> Stock:
    """The stock model for these latents, its head at zero."""
    branch = HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.num_layers,
        num_single_layers=config.num_single_layers,
        num_refiner_layers=config.num_refiner_layers,
        mlp_ratio=config.mlp_ratio,
        patch_size=patch_size,
        guidance_embeds=config.embedded_guidance is not None,
        text_embed_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim or config.text_dim,
        rope_theta=config.rope_theta,
        rope_axes_dim=config.rope_axes,
    )
    _start(branch)
    _zero(branch.proj_out)
    return branch


def build_ends(config: TwinMMDiTConfig, channels: int) -> tuple[HunyuanVideoPatchEmbed, nn.Linear]:
    """New projections of latents with one place a frame, in and out; the second starts at zero."""
    embedder = HunyuanVideoPatchEmbed((1, 1, 1), channels, config.inner_dim)
    head = nn.Linear(config.inner_dim, channels)
    _start(embedder)
    _zero(head)
    return embedder, head


def build_adapters(config: TwinMMDiTConfig) -> nn.ModuleList | None:
    """A linear layer a block for fusion "cross_linear", at zero: the branches start as they were alone (chosen)."""
    if config.fusion != "cross_linear":
        return None
    layers = config.num_layers + config.num_single_layers
    adapters = [nn.Linear(config.inner_dim, config.inner_dim) for _ in range(layers)]
    for adapter in adapters:
        _zero(adapter)
    return nn.ModuleList(adapters)


def enter_branch(
    twin: Stock,
    latents: Tensor,
    text: BranchText,
    timestep: Tensor,
    rotary: Rotary,
    scale: float | None,
) -> tuple[Branch, Tensor, Tensor]:
    """What a branch keeps through all blocks, its tokens [B, N, D] and its refined text [B, S, D].

    latents [B, C, T, h, w]; rotary [N, head] twice; scale: the guidance that the model is told, if it takes one.
    """
    features = text.features.to(latents.dtype)
    is_text = text.is_text.to(latents.device, non_blocking=True)  # [B, S]
    pooled = text.pooled
    if pooled is None:  # as the refiner pools for its own time embedding
        weights = is_text.float()[..., None]
        pooled = (features * weights).sum(1) / weights.sum(1)
    pooled = pooled.to(latents.dtype)
    guidance = None
    if scale is not None:
        guidance = pooled.new_full((len(latents),), 1000 * scale)
    temb, _ = twin.time_text_embed(timestep, pooled, guidance)  # [B, D]
    tokens = twin.x_embedder(latents)  # [B, N, D]
    # The refiner always takes its mask: only text passes it, and only once.
    refined = twin.context_embedder(features, timestep, is_text)  # [B, S, D]
    seen = None
    if text.is_padded:
        seen = torch.cat((is_text.new_ones(tokens.shape[:2]), is_text), dim=1)  # [B, N + S]
    cos, sin = rotary
    still = (refined.shape[1], cos.shape[1])  # text has no positions
    rotary = (torch.cat((cos, cos.new_ones(still))), torch.cat((sin, sin.new_zeros(still))))  # [N + S, head]
    return Branch(twin, tokens.shape[1], temb, rotary, seen), tokens, refined


def _start(module: nn.Module) -> None:
    """What HunyuanVideo draws otherwise than diffusers: its modulation is zero, so that blocks start as identities."""
    for each in module.modules():
        if isinstance(each, AdaLayerNormZero | AdaLayerNormZeroSingle | AdaLayerNormContinuous | HunyuanVideoAdaNorm):
            _zero(each.linear)
        elif isinstance(each, TimestepEmbedding):
            nn.init.normal_(each.linear_1.weight, std=0.02)
            nn.init.normal_(each.linear_2.weight, std=0.02)
        elif isinstance(each, HunyuanVideoPatchEmbed):
            nn.init.xavier_uniform_(each.proj.weight.flatten(1))  # as a linear layer over a patch
            assert each.proj.bias is not None
            nn.init.zeros_(each.proj.bias)


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
