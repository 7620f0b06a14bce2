"""Released diffusers folders into our backbones: everything is checked first, then copied; nothing is unpickled."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from avlit.errors import UserError

FILE_NAME = "diffusion_pytorch_model.safetensors"
# Config values that decide a tensor's shape or meaning; the others (dropout, versions) do not matter here.
COGVIDEOX_KEYS = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "time_embed_dim",
    "text_embed_dim", "patch_size", "patch_size_t", "ofs_embed_dim", "max_text_seq_length",
    "temporal_compression_ratio", "sample_height", "sample_width", "sample_frames",
    "use_rotary_positional_embeddings", "use_learned_positional_embeddings", "flip_sin_to_cos", "freq_shift",
    "norm_eps", "norm_elementwise_affine", "attention_bias", "activation_fn", "timestep_activation_fn",
    "patch_bias",
)  # fmt: skip
WAN_KEYS = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
    "freq_dim", "ffn_dim", "patch_size", "cross_attn_norm", "qk_norm", "eps", "rope_max_seq_len",
    "added_kv_proj_dim",
)  # fmt: skip
# Not image_condition_type, of which only token_replace computes something else, nor in_channels: see `widened`.
HUNYUAN_KEYS = (
    "num_layers", "num_single_layers", "num_refiner_layers", "num_attention_heads", "attention_head_dim",
    "out_channels", "mlp_ratio", "patch_size", "patch_size_t", "qk_norm", "guidance_embeds", "text_embed_dim",
    "pooled_projection_dim", "rope_theta", "rope_axes_dim",
)  # fmt: skip
# The text connectors are not of the transformer; what later releases of LTX-2 added must be off, as the class has it.
LTX2_KEYS = (
    "num_layers", "num_attention_heads", "attention_head_dim", "cross_attention_dim", "in_channels", "out_channels",
    "patch_size", "patch_size_t", "pos_embed_max_pos", "base_height", "base_width", "gated_attn", "cross_attn_mod",
    "audio_num_attention_heads", "audio_attention_head_dim", "audio_cross_attention_dim", "audio_in_channels",
    "audio_out_channels", "audio_patch_size", "audio_patch_size_t", "audio_pos_embed_max_pos", "audio_gated_attn",
    "audio_cross_attn_mod", "activation_fn", "qk_norm", "norm_elementwise_affine", "norm_eps", "caption_channels",
    "attention_bias", "attention_out_bias", "rope_theta", "rope_double_precision", "rope_type",
    "timestep_scale_multiplier", "cross_attn_timestep_scale_multiplier", "use_prompt_embeddings",
    "ff_bias", "audio_ff_bias", "use_keyframes_abs_pos_embedding",
)  # fmt: skip
KEYS_OF = {
    "CogVideoXTransformer3DModel": COGVIDEOX_KEYS,
    "WanTransformer3DModel": WAN_KEYS,
    "HunyuanVideoTransformer3DModel": HUNYUAN_KEYS,
    "LTX2VideoTransformer3DModel": LTX2_KEYS,
}


@dataclass(frozen=True)
class WeightsReport:
    """What reading a folder did, by tensor name.

    loaded: tensors of the model that the folder filled. new: parameters of the model that no released folder has (the
    control). unused: tensors of the folder that the model has no place for.
    """

    folder: str
    loaded: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        unused = f", e.g. {self.unused[0]}" if self.unused else ""
        groups = sorted({name.split(".")[0] for name in self.new})
        new = f" ({', '.join(groups)})" if groups else ""
        return (
            f"weights of {self.folder}: {len(self.loaded)} tensors loaded, {len(self.new)} new{new}, "
            f"{len(self.unused)} unused{unused}"
        )


class HasBackbone(Protocol):
    """A model that holds a stock diffusers transformer as `backbone`."""

    backbone: Any

    def state_dict(self) -> dict[str, Any]: ...


def load_backbone(model: HasBackbone, folder: str | Path, *, widened: Mapping[str, int] | None = None) -> WeightsReport:
    """Fill `model.backbone` from a released diffusers folder, or from its `transformer/` subfolder.

    widened: tensors of which the folder may have only the first columns (second axis), and how many: input channels
    that the model adds to the released ones. The others become zero, so that they change nothing until trained.

    Everything is checked before the first weight is written. A backbone on the meta device takes the folder's tensors
    as its own (in the folder's precision, on the CPU); otherwise values are copied in the model's precision.
    ValueError: no such folder, no safetensors in it, another model's config, missing tensors, wrong shapes, a damaged
    file.
    """
    folder = _transformer_folder(Path(folder))
    _check_config(model.backbone, folder)
    files = _files_of_tensors(folder)
    targets = model.backbone.state_dict(keep_vars=True)

    missing = sorted(targets.keys() - files.keys())
    if missing:
        raise UserError(
            f"model.weights={folder}: {len(missing)} of the backbone's {len(targets)} tensors are not in the folder, "
            f"e.g. {missing[0]}; download it again"
        )
    wanted: dict[Path, list[str]] = {}
    for name in sorted(targets):
        wanted.setdefault(files[name], []).append(name)
    for path, names in wanted.items():
        _check_shapes(path, names, targets, widened or {})
    for path, names in wanted.items():
        with _open(path) as file:
            for name in names:
                fill_tensor(model.backbone, name, _with_columns(file.get_tensor(name), targets[name]))
    if isinstance(model.backbone, WanTransformer3DModel) and model.backbone.rope.freqs_cos.is_meta:
        # Not part of the saved weights, so nothing above has filled them.
        rope = model.backbone.rope
        model.backbone.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)

    loaded = tuple(f"backbone.{name}" for name in sorted(targets))
    new = tuple(name for name in model.state_dict() if not name.startswith("backbone."))
    return WeightsReport(str(folder), loaded, new, tuple(sorted(files.keys() - targets.keys())))


def _transformer_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "transformer"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(
        f"model.weights={folder}: no config.json there or in its transformer/ subfolder; "
        "give the folder of a released model in the diffusers layout"
    )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.weights={folder}: {name} is not readable: {error}; download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"model.weights={folder}: {name} is not readable: not a mapping; download it again")
    return content


def _check_config(backbone: Any, folder: Path) -> None:
    found = _read_json(folder, "config.json")
    expected_class = type(backbone).__name__
    if found.get("_class_name") != expected_class:
        raise UserError(
            f"model.weights={folder}: expected a {expected_class}, found {found.get('_class_name')!r}; "
            "give this model's transformer or set model.variant to match"
        )
    # A key that a released config leaves out has the class's default.
    defaults = {name: value.default for name, value in inspect.signature(type(backbone).__init__).parameters.items()}
    wrong = []
    for key in KEYS_OF[expected_class]:
        expected, value = backbone.config[key], found.get(key, defaults[key])
        expected, value = (tuple(v) if isinstance(v, list | tuple) else v for v in (expected, value))
        if expected != value:
            wrong.append(f"{key}: expected {expected}, found {value}")
    if found.get("image_condition_type") == "token_replace":
        wrong.append("image_condition_type: expected latent_concat or none, found token_replace")
    if wrong:
        raise UserError(f"model.weights={folder}: another model's weights ({'; '.join(wrong)})")


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it, from the index of a sharded folder or from the single file."""
    index = folder / f"{FILE_NAME}.index.json"
    if index.is_file():
        places = _read_json(folder, index.name).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"model.weights={folder}: {index.name} is not readable: no weight_map; download it again")
        for name in sorted(set(places.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"model.weights={folder}: {index.name} names {name!r}, not a safetensors file there")
            if not (folder / name).is_file():
                raise UserError(f"model.weights={folder}: {name} of {index.name} is missing; download it again")
        return {tensor: folder / name for tensor, name in places.items()}
    single = folder / FILE_NAME
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    reason = (
        f"only pickled weights ({', '.join(pickled)}), which can run code and are not read" if pickled else "no weights"
    )
    raise UserError(f"model.weights={folder}: {reason}; expected {FILE_NAME}, single or sharded")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.weights={path.parent}: {path.name} is damaged: {error}; download it again") from error


def _check_shapes(path: Path, names: list[str], targets: dict[str, Tensor], widened: Mapping[str, int]) -> None:
    with _open(path) as file:
        held = set(file.keys())
        for name in names:
            if name not in held:
                raise UserError(f"model.weights={path.parent}: {path.name} lacks {name}, which the index places there")
            shape, expected = tuple(file.get_slice(name).get_shape()), tuple(targets[name].shape)
            fitting = [expected]
            if name in widened:
                fitting.append((expected[0], widened[name], *expected[2:]))
            if shape not in fitting:
                raise UserError(
                    f"model.weights={path.parent}: {name} is {shape}, expected {' or '.join(map(str, fitting))}"
                )


def _with_columns(value: Tensor, target: Tensor) -> Tensor:
    """`value` with zeros on its second axis up to the shape of `target`; itself where the shapes agree."""
    if value.shape == target.shape:
        return value
    wide = value.new_zeros(target.shape)
    wide[:, : value.shape[1]] = value
    return wide


@torch.no_grad()
def fill_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Copy `value` into the parameter or buffer `name`; one on the meta device is replaced by a copy of it instead."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    target = getattr(owner, leaf)
    if not target.is_meta:
        target.copy_(value)
        return
    value = value.clone()  # out of a mapped file, whose tensors are unaligned and change with it
    if isinstance(target, nn.Parameter):
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=target.requires_grad))
    else:
        owner.register_buffer(leaf, value)
