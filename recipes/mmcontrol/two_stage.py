"""MMControl's second stage: a sampled draft enlarged, noised again and refined by a distilled LoRA (MMControl, 3.4).

As LTX-2's own pipelines have it: the spatial upsampler doubles height and width of the draft's latents, the controls
are those of the whole size, and three steps without guidance follow. The sound stays the draft's, as in the later of
those pipelines; the first ones, and diffusers', decode what the three steps make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders.lora_pipeline import LTX2LoraLoaderMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from avlit.adapters import merge
from avlit.batch import AVBatch
from avlit.codecs.ltx2_video import LTX2Upsampler, LTX2VideoCodec
from avlit.config import SampleConfig
from avlit.errors import UserError
from avlit.models.backbones import Stock
from avlit.objectives import flow_diffuse
from avlit.sampling import Latents
from data.encode import Encoders

if TYPE_CHECKING:  # the recipe's own module hands this one on
    from recipes.mmcontrol.recipe import MMControl

SIGMAS = (0.909375, 0.725, 0.421875)
"""Noise levels before the last, 0 (LTX-2, `STAGE_2_DISTILLED_SIGMA_VALUES`)."""

LORA = "sample.distilled_lora"
UPSAMPLER = "sample.upsampler_weights"
ADAPTER = "distilled"
TEXT_SIDE = ("connectors.", "text_embedding_projection.")
"""Keys of layers before the transformer, which LTX-2's own pipelines leave as they are, too."""


class Refiner:
    """Latents of half the height and width -> refined latents of the whole, with the draft's sound.

    upsample: normalised latents [B, C, T, h, w] -> [B, C, T, 2h, 2w]. lora: see `read_lora`; it acts on the frozen
    backbone alone, at scale 1, and is gone when a call returns.
    """

    num_steps = len(SIGMAS)

    def __init__(self, module: MMControl, *, upsample: Callable[[Tensor], Tensor], lora: Mapping[str, Tensor]) -> None:
        self._module, self._upsample, self._lora = module, upsample, dict(lora)

    @torch.no_grad()
    def __call__(
        self,
        batch: AVBatch,
        draft: Latents,
        *,
        seeds: Sequence[int],
        settings: SampleConfig,
        on_step: Callable[[], None] | None = None,
    ) -> Latents:
        """Conditions and controls of `batch` are those of the whole size; its clips have `draft`'s sound.

        x = (1 - s) z + s noise with s the first of SIGMAS and z the enlarged draft. The sound goes through the same
        levels beside it, as the video attends to it, but what it becomes is dropped. References lead as grey
        and silence that are noised alike, so that what is known of them comes through the hints alone, as in the first
        stage (chosen).
        """
        module = self._module
        assert batch.video_latents is not None and draft.video is not None and draft.audio is not None
        video, audio = self._upsample(draft.video).to(batch.video_latents), draft.audio.to(batch.video_latents)
        if video.shape != batch.video_latents.shape:
            raise ValueError(
                f"a draft of {tuple(draft.video.shape)} for a clip of {tuple(batch.video_latents.shape)}: it must have "
                "half the height and width"
            )
        control = module.control_of(batch, settings)
        clean = module.controls.led_by_blank(Latents(video=video, audio=audio), control)
        noise = module.start(batch, control, seeds=seeds, stage="refined ")
        assert clean.video is not None and clean.audio is not None
        assert noise.video is not None and noise.audio is not None
        level = torch.full((len(batch),), SIGMAS[0], device=video.device)
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=list(SIGMAS), device=video.device)
        with distilled(module.model.backbone, self._lora):
            made = module.denoise(
                batch,
                Latents(
                    video=flow_diffuse(clean.video, noise.video, level),
                    audio=flow_diffuse(clean.audio, noise.audio, level),
                ),
                control=control,
                scheduler=scheduler,
                seeds=seeds,
                settings=settings,
                is_guided=False,
                on_step=on_step,
            )
        return Latents(video=made.video, audio=draft.audio)


def build_refiner(module: MMControl, encoders: Encoders) -> Refiner:
    """The second stage that the module's config describes; UserError for files that are not what it needs.

    An adapter of the run's own is merged into the backbone's weights, in which the LoRA comes and goes.
    """
    settings, codecs, codec = module.config.sample, module.config.codecs, encoders.video
    assert isinstance(codec, LTX2VideoCodec) and settings.distilled_lora is not None  # MMControlConfig.check
    key, folder = UPSAMPLER, settings.upsampler_weights
    if folder is None:
        key, folder = "codecs.video_weights", codecs.video_weights
    merge(module.model.backbone)
    upsample = LTX2Upsampler(Path(folder or ""), codec, key=key, device=str(module.device))
    return Refiner(module, upsample=upsample, lora=read_lora(module.model.backbone, Path(settings.distilled_lora)))


def read_lora(backbone: Stock, path: Path) -> dict[str, Tensor]:
    """A LoRA of LTX-2's transformer, in the released keys or diffusers', as diffusers names its tensors, on the host.

    UserError: no such file, not safetensors, or not of this backbone.
    """
    if not path.is_file():
        raise UserError(f"{LORA}={path}: there is no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{LORA}={path}: cannot be read as safetensors (pickled weights are not opened): {error}"
        ) from error
    state: Any = LTX2LoraLoaderMixin.lora_state_dict(tensors)
    found = {name: tensor for name, tensor in state.items() if not name.startswith(TEXT_SIDE)}
    if problem := _misfit(backbone, found):
        raise UserError(
            f"{LORA}={path}: {problem}; expected a LoRA of this run's transformer, such as "
            "ltx-2-19b-distilled-lora-384.safetensors of LTX-2 19B"
        )
    return found


def _misfit(backbone: Stock, lora: Mapping[str, Tensor]) -> str | None:
    """Why tensors are no LoRA of the backbone; None if they are."""
    layers = {f"transformer.{name}": each for name, each in backbone.named_modules() if isinstance(each, nn.Linear)}
    if not lora:
        return "holds no tensor of a transformer"
    for name, tensor in lora.items():
        layer, _, part = name.rpartition(".lora_")
        if part not in ("A.weight", "B.weight") or layer not in layers:
            return f"{name} is of no layer that the transformer has"
        other = lora.get(f"{layer}.lora_{'B' if part == 'A.weight' else 'A'}.weight")
        rank = None if other is None else other.shape[0 if part == "B.weight" else -1]
        width = layers[layer].in_features if part == "A.weight" else layers[layer].out_features
        expected = (rank, width) if part == "A.weight" else (width, rank)
        if rank is None or tuple(tensor.shape) != expected:
            return f"{name} is {list(tensor.shape)}, for a layer of {layers[layer]}"
    return None


@contextmanager
def distilled(backbone: Stock, lora: Mapping[str, Tensor]) -> Iterator[None]:
    """The backbone with the LoRA added to its layers; after it the same modules and parameters, bit for bit."""
    like = next(backbone.parameters())
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    state = {name: tensor.to(like.device, like.dtype) for name, tensor in lora.items()}
    try:
        backbone.load_lora_adapter(state, adapter_name=ADAPTER, low_cpu_mem_usage=True)
        yield
    finally:
        backbone.unload_lora()
        for name, parameter in backbone.named_parameters():  # the adapter's loader freezes all
            parameter.requires_grad_(name in trained)
