"""Adapters: a few trained weights on a frozen model, put in once its weights are loaded and before anything is trained.

Low-rank ones are peft's: a linear layer `x` becomes `x.base_layer` with `x.lora_A.default`, `x.lora_B.default` and, for
DoRA, `x.lora_magnitude_vector.default`. From then on all else of the module counts as released: no checkpoint holds it,
and all know it by its fingerprint.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from avlit.adapter_config import AdapterConfig, AdapterPart
from avlit.errors import ConfigError, UserError
from avlit.randomness import numpy_generator

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from avlit.module import AVModule

NAME = "default"
"""What peft calls the one adapter of a model."""


@dataclass(frozen=True)
class AdapterState:
    """What a checkpoint says of its adapter: enough to put the same one into the same base.

    layers: part of the model (`adapter.modality`) -> names of its linear layers that are adapted; of kind own
    {"own": beginnings of the names of what is trained}.
    """

    kind: str
    rank: int
    alpha: float
    layers: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "AdapterState":
        """What `asdict` made of one, read from JSON; UserError where it is of no adapter."""
        try:
            known = {each.name: values[each.name] for each in fields(cls)}
            layers = {str(part): tuple(map(str, names)) for part, names in known["layers"].items()}
            state = cls(**{**known, "layers": layers})
            if state.kind not in ("lora", "dora", "rslora", "own") or state.rank < 1 or not state.alpha > 0:
                raise ValueError(str(known)[:80])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"state.json says nothing of an adapter that can be read: {error}") from error
        return state

    @property
    def names(self) -> tuple[str, ...]:
        """All layers."""
        return tuple(name for names in self.layers.values() for name in names)

    @property
    def scaling(self) -> float:
        """What an update B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.kind == "rslora" else self.rank)


def add_adapter(
    module: "AVModule", config: AdapterConfig, *, parts: Mapping[str, AdapterPart], own_modules: tuple[str, ...]
) -> str:
    """Put the adapter into a module whose weights are all loaded, and leave it alone trainable; in words what was.

    The module computes what it did, bit for bit. Its `base_model` becomes the fingerprint of all that is frozen.
    parts, own_modules: what the recipe offers (`Config.adapter_parts`, `Config.own_modules`). ConfigError: nothing
    there can be adapted so.
    """
    model = module.model
    if config.kind == "own":
        trained = [name for name in model.state_dict() if name.startswith(own_modules)]
        if not trained:
            raise ConfigError(f"adapter=own: the model has none of {', '.join(own_modules)}; take adapter=lora")
        layers = {"own": own_modules}
    else:
        layers, trained = target_layers(model, config, parts=parts), []
    state = AdapterState(config.kind, config.rank, config.scale, layers)
    frozen = model.state_dict().keys() - set(trained)
    module.base_model = fingerprint_of(module.base_model, model.state_dict(), names=frozen - module.released)
    if config.kind != "own":
        inject(model, state.names, config, seed=module.seed)
        trained = [name for name in model.state_dict() if is_adapter_name(name)]
    module.released = frozenset(model.state_dict().keys() - set(trained))
    wanted = set(trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    module.adapter = asdict(state)
    total = sum(parameter.numel() for parameter in module.trained_parameters.values())
    what = ", ".join(own_modules)
    if config.kind != "own":
        counts = ", ".join(f"{len(names)} of {part}" for part, names in layers.items())
        what = f"rank {config.rank}, linear layers: {counts}"
    return f"adapter={config.kind}: {total / 1e6:.3f} M weights train ({what}); all else is frozen"


def target_layers(
    model: nn.Module, config: AdapterConfig, *, parts: Mapping[str, AdapterPart]
) -> dict[str, tuple[str, ...]]:
    """Part -> names of its linear layers that are adapted. ConfigError: a part has none, or one of the targets."""
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    try:
        chosen = config.chosen(parts)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    found: dict[str, tuple[str, ...]] = {}
    for name, part in chosen.items():
        inside = [each for each in linear if any(re.match(pattern, each) for pattern in part.modules)]
        targets = config.targets or part.targets
        found[name] = tuple(each for each in inside if _ends_with(each, targets))
        if not found[name]:
            endings = sorted({re.sub(r"^.*\.(?=[a-z])", "", each) for each in inside})
            raise ConfigError(
                f"adapter.targets={list(targets)}: no linear layer of adapter.modality={name} ends so; there are "
                f"{', '.join(endings[:12]) or 'none'}"
            )
    for target in config.targets:
        if not any(_ends_with(each, [target]) for names in found.values() for each in names):
            raise ConfigError(
                f"adapter.targets={config.targets}: {target} ends the name of no linear layer of {', '.join(found)}"
            )
    return found


def inject(model: nn.Module, layers: Iterable[str], config: AdapterConfig, *, seed: int) -> None:
    """Wrap the linear layers `layers`; new weights are a function of `seed`, in float32 whatever the base is in."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.scale,  # pyright: ignore[reportArgumentType] an int in the signature, any number in use
        lora_dropout=config.dropout,
        target_modules=f"({'|'.join(map(re.escape, layers))})",
        use_dora=config.kind == "dora",
        use_rslora=config.kind == "rslora",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(numpy_generator(seed, "adapter").integers(2**63)))
        inject_adapter_in_model(settings, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        if is_adapter_name(name):
            parameter.data = parameter.data.float()


def adapter_layers(model: nn.Module) -> dict[str, "LoraLayer"]:
    """Name -> layer of what peft wrapped; names as before."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every update to its layer's weight and take the adapter out: the model's names are as they were before."""
    for layer in adapter_layers(model).values():
        merged: Any = layer
        merged.merge()
    take_out(model)


def take_out(model: nn.Module) -> None:
    """Remove the adapter; what was not merged is lost."""
    for name, layer in adapter_layers(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def is_adapter_name(name: str) -> bool:
    """Whether a tensor's name is of peft's low-rank matrices or DoRA's lengths."""
    return re.search(rf"\.lora_(A|B|magnitude_vector)\.{NAME}(\.weight)?$", name) is not None


def fingerprint_of(base_model: str, tensors: Mapping[str, Tensor], *, names: Iterable[str]) -> str:
    """128 bits of released weights' own fingerprint (`base_model`, "" for none) and of the tensors `names`, as hex."""
    digest = xxhash.xxh3_128(base_model.encode())
    for name in sorted(names):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}:".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
