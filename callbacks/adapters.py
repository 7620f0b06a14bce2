"""An adapter as a callback: put into any recipe's module before it is sharded, and nothing but it may change.

Low-rank updates and a recipe's own modules, which start from zero, alike.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import xxhash
from torch import Tensor, nn

from avlit.adapter_config import AdapterConfig, AdapterPart
from avlit.adapters import NAME, AdapterState, adapter_layers, add_adapter
from avlit.errors import UserError
from avlit.module import AVModule


class FrozenWeightsChangedError(UserError):
    """A weight that an adapter stands on is not what it was; what was trained fits no base that anybody has."""


class Adapter(pl.Callback):
    """Puts an adapter into a module that has none yet, and compares, bit for bit, all else at the end with before.

    That is at `setup`, where the ranks know each other and nothing is sharded and no optimizer built. A session of
    ours comes with the adapter in its module, so that what is wrong with it is refused before the run begins.
    parts, own_modules: what the recipe offers (`Config.adapter_parts`, `Config.own_modules`). report: takes metrics
    and the step; at the end it is told `adapter/PART`, the size of the part's updates over that of the weights under
    them. ConfigError: nothing there can be adapted so. FrozenWeightsChangedError: something else was changed.
    """

    def __init__(
        self,
        config: AdapterConfig,
        *,
        parts: Mapping[str, AdapterPart],
        own_modules: tuple[str, ...],
        report: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    ):
        self.config, self.parts, self.own_modules = config, parts, own_modules
        self.report = report
        self._before: dict[str, str] = {}

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        assert isinstance(module, AVModule)
        if not module.adapter:
            add_adapter(module, self.config, parts=self.parts, own_modules=self.own_modules)

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        self._before = frozen_digests(module.model)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        after = frozen_digests(module.model)
        if differing := [name for name, digest in self._before.items() if after.get(name) != digest]:
            raise FrozenWeightsChangedError(
                f"{len(differing)} frozen tensors were changed by the training, first {differing[0]}: its checkpoints "
                "fit no base; remove what writes to them"
            )
        if trainer.is_global_zero and trainer.world_size == 1:
            sizes = update_sizes(module.model, layers=AdapterState.of(module.adapter).layers)
            self.report(sizes, module.steps_done(trainer))


def frozen_digests(model: nn.Module) -> dict[str, str]:
    """Name -> digest of every parameter that is not trained; of a sharded one, of this rank's shard."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            local: Tensor = getattr(parameter, "to_local", parameter.detach)().detach().cpu().contiguous()
            found[name] = xxhash.xxh3_128(local.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return found


@torch.no_grad()
def update_sizes(model: nn.Module, *, layers: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """`adapter/PART` -> Frobenius norm of the part's updates over that of the weights under them.

    layers: part -> names of its adapted layers; whole modules that are trained have no such size.
    """
    there = adapter_layers(model)
    sizes = {}
    for part, names in layers.items():
        moved = under = 0.0
        for layer in (there[name] for name in names if name in there):
            wrapped: Any = layer  # peft declares its mixin alone
            update, weight = wrapped.get_delta_weight(NAME), wrapped.get_base_layer().weight
            moved, under = moved + float(update.square().sum()), under + float(weight.float().square().sum())
        if under:
            sizes[f"adapter/{part}"] = (moved / under) ** 0.5
    return sizes
