"""Names of an adapter's tensors in the files of each ecosystem, to write them and to read them.

diffusers: `transformer.LAYER.lora_A.weight`, scaled so that any reader's default is right. ComfyUI: `diffusion_model.
LAYER.lora_down.weight` with `.alpha` and the layer names of the model's own release. peft: `base_model.model.LAYER.
lora_A.weight` beside `adapter_config.json`. LAYER is of the stock backbone but in peft's, which takes any module.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from avlit.errors import UserError
from avlit.export.fusion import fuse, take_apart
from avlit.export.updates import Update

BACKBONE = "backbone."
"""Where a recipe's model keeps the stock diffusers model: what other programs know."""

_COGVIDEOX = (
    ("transformer_blocks.", "blocks."), (".attn1.to_out.0", ".attn_out"), (".attn1.to_", "."),
    (".ff.net.0.proj", ".ff_proj"), (".ff.net.2", ".ff_out"),
)  # fmt: skip
_WAN = (
    (".attn1.to_out.0", ".self_attn.o"), (".attn2.to_out.0", ".cross_attn.o"), (".attn1.to_", ".self_attn."),
    (".attn2.to_", ".cross_attn."), (".ffn.net.0.proj", ".ffn.0"), (".ffn.net.2", ".ffn.2"),
)  # fmt: skip
_HUNYUAN = (
    ("single_transformer_blocks.", "single_blocks."), ("transformer_blocks.", "double_blocks."),
    (".attn.to_out.0", ".img_attn.proj"), (".attn.to_add_out", ".txt_attn.proj"),
    (".ff.net.0.proj", ".img_mlp.0"), (".ff.net.2", ".img_mlp.2"),
    (".ff_context.net.0.proj", ".txt_mlp.0"), (".ff_context.net.2", ".txt_mlp.2"),
    (".norm1.linear", ".img_mod.lin"), (".norm1_context.linear", ".txt_mod.lin"),
    (".norm.linear", ".modulation.lin"), (".proj_out", ".linear2"),
)  # fmt: skip
COMFY_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "WanTransformer3DModel": _WAN,
    "LTX2VideoTransformer3DModel": (),
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
}
"""Class of diffusers -> parts of its blocks' layers' names and what ComfyUI's own model calls them, in this order."""
COMFY_ENDS: dict[str, dict[str, str]] = {
    "CogVideoXTransformer3DModel": {name: name for name in ("patch_embed.text_proj", "norm_out.linear", "proj_out")},
    "WanTransformer3DModel": {"proj_out": "head.head"},
    "LTX2VideoTransformer3DModel": {
        "proj_in": "patchify_proj",
        "audio_proj_in": "audio_patchify_proj",
        "proj_out": "proj_out",
        "audio_proj_out": "audio_proj_out",
        "time_embed.linear": "adaln_single.linear",
        "audio_time_embed.linear": "audio_adaln_single.linear",
        "av_cross_attn_video_scale_shift.linear": "av_ca_video_scale_shift_adaln_single.linear",
        "av_cross_attn_audio_scale_shift.linear": "av_ca_audio_scale_shift_adaln_single.linear",
        "av_cross_attn_video_a2v_gate.linear": "av_ca_a2v_gate_adaln_single.linear",
        "av_cross_attn_audio_v2a_gate.linear": "av_ca_v2a_gate_adaln_single.linear",
    },
    "HunyuanVideoTransformer3DModel": {"proj_out": "final_layer.linear"},
}
"""The same for layers before and after the blocks, by their whole names."""
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
COMFY_FUSED: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "HunyuanVideoTransformer3DModel": (
        ("transformer_blocks", "img_attn.qkv", _QKV),
        ("transformer_blocks", "txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        ("single_transformer_blocks", "linear1", (*_QKV, "proj_mlp")),
    )
}
"""Class of diffusers -> blocks, one of ComfyUI's layers there, and the layers here whose rows it has, in order."""
BLOCKS = re.compile(r"((single_)?transformer_blocks|blocks)\.\d+\.")


def comfy_name(layer: str, model: str) -> str:
    """What ComfyUI calls a layer of diffusers' class `model`; UserError where its names are not known here."""
    if (end := COMFY_ENDS.get(model, {}).get(layer)) is not None:
        return end
    if model not in COMFY_NAMES or not BLOCKS.match(layer):
        raise UserError(
            f"format=comfyui: no name is known for {layer} of {model}, only for layers of the blocks of "
            f"{', '.join(COMFY_NAMES)} and some around them; take format=diffusers or format=peft"
        )
    for ours, theirs in COMFY_NAMES[model]:
        layer = layer.replace(ours, theirs)
    return layer


def comfy_place(layer: str, model: str) -> tuple[str, tuple[str, ...]]:
    """What ComfyUI calls the layer that has this one's rows, and all the layers here whose rows that has, in order.

    UserError where its names are not known here.
    """
    for blocks, fused, endings in COMFY_FUSED.get(model, ()):
        found = re.match(rf"({blocks}\.\d+\.)(.+)", layer)
        if found and found[2] in endings:
            return comfy_name(found[1] + fused, model), tuple(found[1] + ending for ending in endings)
    return comfy_name(layer, model), (layer,)


def to_diffusers(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Tensors for a pipeline's `load_lora_weights` and a transformer's `load_lora_adapter`; layers of the backbone."""
    tensors = {}
    for name, update in updates.items():
        tensors[f"transformer.{name}.lora_A.weight"] = update.down
        tensors[f"transformer.{name}.lora_B.weight"] = update.up * update.scaling
        if update.magnitude is not None:
            tensors[f"transformer.{name}.lora_magnitude_vector"] = update.magnitude
    return tensors


def to_comfyui(updates: Mapping[str, Update], *, model: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for ComfyUI's LoRA loaders, under the names of the model's own release.

    weights: layer -> weight [out, in] of diffusers' class `model`, for what ComfyUI keeps as one layer.
    """
    tensors = {}
    for place, layers in dict(comfy_place(name, model) for name in updates).items():
        update = (
            updates[layers[0]]
            if len(layers) == 1
            else fuse([updates.get(layer) for layer in layers], [weights[layer] for layer in layers])
        )
        key = f"diffusion_model.{place}"
        tensors[f"{key}.lora_down.weight"] = update.down
        tensors[f"{key}.lora_up.weight"] = update.up
        tensors[f"{key}.alpha"] = torch.tensor(update.scaling * update.rank)
        if update.magnitude is not None:
            tensors[f"{key}.dora_scale"] = update.magnitude[:, None].clone()
    return tensors


def to_peft(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Tensors for `PeftModel.from_pretrained` of a whole recipe's network."""
    tensors = {}
    for name, update in updates.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = update.down
        tensors[f"{key}.lora_B.weight"] = update.up
        if update.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = update.magnitude
    return tensors


DOWN = (".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight", ".lora.down.weight")
UP = (".lora_B.weight", ".lora_up.weight", ".lora_B.default.weight", ".lora.up.weight")
MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale")
ALPHA = (".alpha",)
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.diffusion_model.")


def read_updates(
    tensors: Mapping[str, Tensor],
    *,
    layers: Callable[[str], tuple[str, ...] | None],
    sizes: Mapping[str, int],
    scaling: Callable[[str, int], float],
    source: str,
) -> dict[str, Update]:
    """Updates by layer of this model, from a file of any of the layouts.

    layers: a file's layer name without prefix -> this model's layers whose rows it has, None where it has none. sizes:
    layer -> rows. scaling: (layer, rank) -> the factor where the file has no `.alpha`. UserError: a tensor belongs to
    nothing, a layer lacks a half, or has other rows.
    """
    found: dict[tuple[str, ...], dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        split = _split(key)
        layer = layers(split[0]) if split else None
        if split is None or layer is None:
            strange.append(key)
            continue
        found.setdefault(layer, {})[split[1]] = tensor.float()
    if strange:
        raise UserError(
            f"{source}: {len(strange)} of its {len(tensors)} tensors have no place in this model, first {strange[0]}; "
            "is it of another model, or another kind than LoRA and DoRA?"
        )
    updates = {}
    for place, parts in found.items():
        layer = place[0]
        if not {"down", "up"} <= parts.keys():
            raise UserError(f"{source}: {layer} has only {', '.join(parts)}; an update has two halves")
        rank = parts["down"].shape[0]
        factor = float(parts["alpha"]) / rank if "alpha" in parts else scaling(layer, rank)
        magnitude = parts["magnitude"].flatten() if "magnitude" in parts else None
        whole = Update(parts["down"], parts["up"], factor, magnitude)
        rows = [sizes[each] for each in place]
        if len(whole.up) != sum(rows):
            raise UserError(f"{source}: {layer} has {len(whole.up)} rows there, and {sum(rows)} in this model")
        of_parts = [whole] if len(place) == 1 else take_apart(whole, rows)
        updates |= {each: part for each, part in zip(place, of_parts, strict=True) if part is not None}
    return updates


def layer_finder(names: set[str], *, model: str) -> Callable[[str], tuple[str, ...] | None]:
    """For `read_updates`: finds layers of this module by the names that any of the layouts gives them.

    names: of the module's linear layers. model: diffusers' class of its backbone.
    """
    backbone = [name.removeprefix(BACKBONE) for name in names if name.startswith(BACKBONE)]
    known = {name: (BACKBONE + name,) for name in backbone} | {name: (name,) for name in names}
    if model in COMFY_NAMES:
        ends = COMFY_ENDS[model]
        places = dict(comfy_place(name, model) for name in backbone if BLOCKS.match(name) or name in ends)
        known |= {place: tuple(BACKBONE + name for name in layers) for place, layers in places.items()}
    flat = {name.replace(".", "_"): layer for name, layer in known.items()}  # kohya's: lora_unet_blocks_0_self_attn_q
    return lambda name: known.get(name) or flat.get(name.removeprefix("lora_unet_").removeprefix("lora_transformer_"))


def _split(key: str) -> tuple[str, str] | None:
    """(layer without prefix, which of its tensors) of a file's key."""
    kinds = {"down": DOWN, "up": UP, "magnitude": MAGNITUDE, "alpha": ALPHA}
    for kind, endings in kinds.items():
        if ending := next((ending for ending in endings if key.endswith(ending)), None):
            name = key.removesuffix(ending)
            prefix = next((each for each in PREFIXES if name.startswith(each)), "")
            return name.removeprefix(prefix), kind
    return None
