"""MMControl's network: a frozen LTX-2 and a trained dual-stream bypass that adds hints to it (MMControl, sec. 3.3).

The backbone is the stock diffusers model, run block by block. N = T * h * w video tokens, L audio tokens, S text
tokens; R reference images (one latent frame, or none) and P latents of a reference voice lead video and sound. D is the
width of video or of sound.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from avlit.models.backbones import LayerRun, Rotary, Stock, run_layer
from avlit.models.control_unit import Control
from avlit.models.ltx2_backbone import (
    Conditions,
    LatentGrid,
    Modality,
    audio_coords,
    build_ltx2,
    calm_ltx2,
    ltx2_block,
    ltx2_conditions,
    ltx2_rotary,
    ltx2_tokens,
    ltx2_velocity,
    video_coords,
)
from avlit.models.sizes import LTX2Config
from avlit.models.twin_wan import Velocities
from avlit.randomness import numpy_generator

MASK_STD = 0.02  # chosen: MMControl draws the mask's column from scratch and does not say how


class BypassBlock(nn.Module):
    """A trainable copy of one stream of a backbone's block, without attention to the other stream, and its hint.

    As built the hint is zero.
    """

    norm1: Stock
    attn1: Stock
    norm2: Stock
    attn2: Stock
    norm3: Stock
    ff: Stock

    def __init__(self, block: Stock, modality: Modality) -> None:
        super().__init__()
        own = "" if modality == "video" else "audio_"
        for name in ("norm1", "attn1", "norm2", "attn2", "norm3", "ff"):
            self.add_module(name, copy.deepcopy(getattr(block, own + name)))
        table = getattr(block, f"{own}scale_shift_table")
        self.scale_shift_table = nn.Parameter(table.detach().clone())
        width = table.shape[-1]
        self.hint = nn.Linear(width, width, device="meta")
        self.hint.weight = nn.Parameter(table.new_zeros(width, width))
        self.hint.bias = nn.Parameter(table.new_zeros(width))
        self.requires_grad_(True)

    def forward(self, context: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Context tokens [B, N or L, D] -> the same of the next bypass block, and the hint for the main stream."""
        table = self.scale_shift_table + conditions.time.unflatten(-1, (6, -1))  # [B, M, 6, D]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = table.unbind(2)
        normed = self.norm1(context) * (1 + scale) + shift
        context = context + self.attn1(normed, query_rotary_emb=conditions.rotary) * gate
        text = self.attn2(
            self.norm2(context), encoder_hidden_states=conditions.text, attention_mask=conditions.text_mask
        )
        context = context + text
        context = context + self.ff(self.norm3(context) * (1 + ff_scale) + ff_shift) * ff_gate
        return context, self.hint(context)


class BypassStream(nn.Module):
    """The bypass of one modality: context projector and blocks, which are keyed by the layer they stand beside."""

    def __init__(self, backbone: Stock, modality: Modality, layers: tuple[int, ...], *, seed: int) -> None:
        """Everything copies the backbone, but for the projector's mask column, drawn from `seed`, and zero hints."""
        super().__init__()
        inherited = backbone.proj_in if modality == "video" else backbone.audio_proj_in
        column = inherited.weight.new_empty(inherited.out_features, 1)
        if not column.is_meta:
            drawn = numpy_generator(seed, "mask column", modality).normal(0.0, MASK_STD, column.shape)
            column.copy_(torch.from_numpy(drawn))
        self.projector = nn.Linear(inherited.in_features + 1, inherited.out_features, device="meta")
        self.projector.weight = nn.Parameter(torch.cat((inherited.weight.detach(), column), dim=1))
        self.projector.bias = nn.Parameter(inherited.bias.detach().clone())
        self.blocks = nn.ModuleDict(
            {str(layer): BypassBlock(backbone.transformer_blocks[layer], modality) for layer in layers}
        )

    def beside(self, layer: int) -> nn.Module | None:
        """The block beside that layer of the backbone, if there is one."""
        return dict(self.blocks.items()).get(str(layer))


@dataclass(frozen=True)
class Injection:
    """One modality's bypass in one forward pass: which of the main streams it acts on (0 video, 1 sound), and how."""

    stream: BypassStream
    main: int
    conditions: Conditions
    scale: float | Tensor


class BypassLTX2(nn.Module):
    """Noisy latents of video and sound, text and controls to the flow's velocities (MMControl, sec. 3.3).

    backbone: the stock diffusers model, its keys under `backbone.`; as built the model is that alone. bypass: its two
    streams, `video` and `audio`, once `add_bypass` has copied them from the backbone; they then change nothing until
    they are trained. A backbone whose parameters have `requires_grad` False stores nothing before the first hint, since
    nothing there has a gradient; after it, only what leads a gradient through a block to the hints before, not what its
    weights' gradients would need. layer_run: how each layer is run.
    """

    backbone: Stock
    bypass: nn.ModuleDict | None

    def __init__(self, config: LTX2Config, *, seed: int = 0) -> None:
        """Weights drawn from `seed`, whatever ran before, with zero heads. On the meta device nothing is drawn."""
        super().__init__()
        config.check()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(numpy_generator(seed, "backbone").integers(2**63)))
            self.backbone = build_ltx2(config)
        calm_ltx2(self.backbone)
        self.bypass = None
        self.layer_run = LayerRun()
        self.rotary_of_shape: dict[tuple[object, ...], tuple[Rotary, Rotary]] = {}

    @property
    def units(self) -> list[nn.Module]:
        """What is sharded as one: blocks that few parameters lie between."""
        streams = [] if self.bypass is None else self.bypass.values()
        blocks = list(self.backbone.transformer_blocks)
        for stream in streams:
            assert isinstance(stream, BypassStream)
            blocks += stream.blocks.values()
        return blocks

    def add_bypass(self, *, seed: int = 0) -> None:
        """A new bypass, copied from the backbone as it is now: call it once the backbone has its trained weights.

        It takes the backbone's device and precision; another one (float32 beside bfloat16) needs autocast. On the meta
        device nothing is drawn.
        """
        layers = self.config.bypass_layers
        self.bypass = nn.ModuleDict(
            {
                "video": BypassStream(self.backbone, "video", layers, seed=seed),
                "audio": BypassStream(self.backbone, "audio", layers, seed=seed),
            }
        )

    def forward(
        self,
        video_latents: Tensor,
        audio_latents: Tensor,
        *,
        video_timestep: Tensor,
        audio_timestep: Tensor,
        text: Tensor,
        grid: LatentGrid,
        audio_text: Tensor | None = None,
        text_mask: Tensor | None = None,
        control: Control | None = None,
        visual_scale: float | Tensor = 1.0,
        acoustic_scale: float | Tensor = 1.0,
    ) -> Velocities:
        """Velocities of latents video [B, C, R + T, h, w] and audio [B, P + L, C], of their shapes.

        The first R frames and P latents are references, noised like the rest (R = P = 0 without a control); drop their
        velocities, or supervise them. *_timestep: noise level times 1000, [B] or one for each token [B, R + N] and
        [B, P + L]. text [B, S, D_text] for video, audio_text for sound (None: the same); text_mask [B, S] bool, False
        where both are padding. grid: the codecs' rates, for positions. Hints are added times visual_scale to video and
        times acoustic_scale to sound, numbers or one for each clip [B]; a branch with the number 0 is not computed
        (Eq. 5). ValueError for shapes that do not fit together.
        """
        self._check_shapes(video_latents, audio_latents, video_timestep, audio_timestep, control)
        tokens = (
            ltx2_tokens(self.backbone, "video", video_latents),
            ltx2_tokens(self.backbone, "audio", audio_latents),
        )
        num_images, num_voice = (control.num_images, control.num_voice_latents) if control is not None else (0, 0)
        device, dtype = video_latents.device, tokens[0].dtype
        video = ltx2_conditions(
            self.backbone, "video", timestep=video_timestep, text=text, text_mask=text_mask,
            rotary=self._video_rotary(tuple(video_latents.shape[2:]), grid, num_images, device), dtype=dtype,
        )  # fmt: skip
        audio = ltx2_conditions(
            self.backbone, "audio", timestep=audio_timestep, text=text if audio_text is None else audio_text,
            text_mask=text_mask, rotary=self._audio_rotary(audio_latents.shape[1], grid, num_voice, device),
            dtype=dtype,
        )  # fmt: skip

        injections: list[Injection] = []
        if control is not None:
            assert self.bypass is not None  # _check_shapes
            for modality, scale, context in (
                ("video", visual_scale, control.visual.flatten(2).transpose(1, 2)),  # [B, R + N, C + 1]
                ("audio", acoustic_scale, control.acoustic),  # [B, P + L, C + 1]
            ):
                if not isinstance(scale, Tensor) and scale == 0:
                    continue
                stream = self.bypass[modality]
                assert isinstance(stream, BypassStream)
                is_video = modality == "video"
                scale = scale.to(dtype).view(-1, 1, 1) if isinstance(scale, Tensor) else scale
                injections.append(Injection(stream, 0 if is_video else 1, video if is_video else audio, scale))
                tokens += (stream.projector(context.to(video_latents.dtype)),)
        for layer, block in enumerate(self.backbone.transformer_blocks):
            beside = [each.stream.beside(layer) for each in injections]
            tokens = run_layer(
                bypass_layer, block, beside, video, audio, injections, *tokens,
                run=self.layer_run,
            )  # fmt: skip
        batch, channels = video_latents.shape[:2]
        velocity = ltx2_velocity(self.backbone, "video", video, tokens[0])  # [B, R + N, C]
        return Velocities(
            video=velocity.transpose(1, 2).reshape(batch, channels, *video_latents.shape[2:]),
            audio=ltx2_velocity(self.backbone, "audio", audio, tokens[1]),
        )

    def _video_rotary(
        self, size: tuple[int, ...], grid: LatentGrid, num_references: int, device: torch.device
    ) -> tuple[Rotary, Rotary]:
        frames, height, width = size
        return self._rotary(
            "video",
            (frames, height, width, grid, num_references, device),
            lambda: video_coords(frames, height, width, grid=grid, num_references=num_references, device=device),
        )

    def _audio_rotary(
        self, num_latents: int, grid: LatentGrid, num_references: int, device: torch.device
    ) -> tuple[Rotary, Rotary]:
        return self._rotary(
            "audio",
            (num_latents, grid, num_references, device),
            lambda: audio_coords(num_latents, grid=grid, num_references=num_references, device=device),
        )

    def _rotary(
        self, modality: Modality, key: tuple[object, ...], coords: Callable[[], Tensor]
    ) -> tuple[Rotary, Rotary]:
        key = (modality, *key)
        if key not in self.rotary_of_shape:
            # A validation may come first: tensors made in inference mode could not enter a training graph later.
            with torch.inference_mode(False):
                self.rotary_of_shape[key] = ltx2_rotary(self.backbone, modality, coords())
        return self.rotary_of_shape[key]

    def _check_shapes(
        self, video: Tensor, audio: Tensor, video_timestep: Tensor, audio_timestep: Tensor, control: Control | None
    ) -> None:
        config = self.config
        for key, name, found in (
            ("video_channels", "video", video.shape[1]), ("audio_channels", "audio", audio.shape[-1])
        ):  # fmt: skip
            if found != getattr(config, key):
                raise ValueError(
                    f"{name} latents have {found} channels but model.{key}={getattr(config, key)}: "
                    f"set it to the {name} codec's channels"
                )
        batch = video.shape[0]
        for name, timestep, num_tokens in (
            ("video", video_timestep, video[0, 0].numel()), ("audio", audio_timestep, audio.shape[1])
        ):  # fmt: skip
            if tuple(timestep.shape) not in ((batch,), (batch, num_tokens)):
                raise ValueError(
                    f"{name}_timestep has shape {tuple(timestep.shape)}: must be {(batch,)} or {(batch, num_tokens)}"
                )
        if control is None:
            return
        if self.bypass is None:
            raise ValueError("a control for a model without a bypass: call add_bypass first")
        for name, found, expected in (
            ("visual", control.visual.shape, (batch, video.shape[1] + 1, *video.shape[2:])),
            ("acoustic", control.acoustic.shape, (batch, audio.shape[1], audio.shape[2] + 1)),
        ):
            if tuple(found) != tuple(expected):
                raise ValueError(
                    f"the {name} control has shape {tuple(found)}, expected {tuple(expected)}: that of the latents "
                    "with references in front and a mask as one more channel"
                )


def bypass_layer(
    block: Stock,
    beside: Sequence[Stock | None],
    video: Conditions,
    audio: Conditions,
    injections: Sequence[Injection],
    *tokens: Tensor,
) -> tuple[Tensor, ...]:
    """A backbone's block and the bypass beside it: tokens of video, of sound, and the context of each injection.

    beside: each injection's block here, None where it has none.
    h_m <- Block(h)_m + s_m Z(c_m) with c_m the bypass block's output (MMControl, Eq. 5).
    """
    main, contexts = list(ltx2_block(block, video, audio, *tokens[:2])), list(tokens[2:])
    for place, (injection, bypass) in enumerate(zip(injections, beside, strict=True)):
        if bypass is not None:
            contexts[place], hint = bypass(contexts[place], injection.conditions)
            main[injection.main] = main[injection.main] + injection.scale * hint.to(main[injection.main].dtype)
    return (*main, *contexts)


def bypass_trainable(model: BypassLTX2, *, which: Literal["bypass", "backbone"]) -> list[str]:
    """Names of the parameters that train: bypass with its projectors (MMControl), or the backbone before it has one."""
    if which not in ("bypass", "backbone"):
        raise ValueError(f"trainable={which!r}: must be one of bypass, backbone")
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{which}.")]
    if not names:
        raise ValueError("trainable='bypass' for a model without one: call add_bypass first")
    return names
