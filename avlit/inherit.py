"""From a checkpoint into a model and an optimizer: what `init=` inherits, and a resume restores."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from avlit.checkpoints import Checkpoint, load_checkpoint, newest_valid
from avlit.commit import MANIFEST_NAME, CheckpointError, committed_dirs
from avlit.eight_bit import is_8bit, joined, parts_of
from avlit.ranks import fill, is_part, like_sharded
from avlit.runs import RunNotFoundError, find_run


@dataclass(frozen=True)
class InheritReport:
    """What a model took from a checkpoint, by parameter name.

    inherited: filled from it. new: parameters of the model that it does not have. unused: what it has and the model
    does not. shape_mismatch: names present in both with different shapes (only ever reported in the error).
    """

    source: str
    inherited: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    shape_mismatch: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"weights of {self.source}: {len(self.inherited)} inherited"]
        for label, names in (("new", self.new), ("unused", self.unused)):
            if names:
                lines.append(f"{len(names)} {label} (e.g. {names[0]})")
        return ", ".join(lines)


def resolve_weights(init: str | Path, *, runs_dir: Path = Path("runs")) -> Checkpoint:
    """The checkpoint that `init=` means: a run (`last`, id, folder; its newest valid one) or a checkpoint folder.

    CheckpointError: none there that verifies, with the reason of each. RunNotFoundError: no such run.
    """
    path = Path(init)
    if (path / MANIFEST_NAME).is_file():
        return load_checkpoint(path)
    folder = path if path.is_dir() and committed_dirs(path) else find_run(runs_dir, init).checkpoints_dir
    checkpoint, skipped = newest_valid(folder)
    if checkpoint is None:
        reasons = "".join(f"\n  {reason}" for reason in skipped) or " it has saved none yet"
        raise CheckpointError(f"init={init}: no usable checkpoint in {folder}:{reasons}")
    return checkpoint


@torch.no_grad()
def load_weights_into(
    model: nn.Module, checkpoint: Checkpoint, *, ema: bool = False, base_model: str | None = None
) -> InheritReport:
    """Copy a checkpoint's weights into the parameters and buffers of the same name; checked before anything changes.

    ema: take the averaged weights where there are any. base_model: fingerprint of the released weights the model
    stands on; a checkpoint that was trained on another base is refused.
    CheckpointError: another base, another model, or another shape.
    """
    if base_model is not None:
        check_base(checkpoint, base_model)
    saved = checkpoint.averaged() if ema else checkpoint.weights()
    targets = model.state_dict(keep_vars=True)
    report = InheritReport(
        str(checkpoint.path),
        inherited=tuple(name for name in targets if name in saved),
        new=tuple(name for name in targets if name not in saved),
        unused=tuple(sorted(saved.keys() - targets.keys())),
        shape_mismatch=tuple(n for n, target in targets.items() if n in saved and saved[n].shape != target.shape),
    )
    _refuse_other_model(report, saved, targets)
    for name in report.inherited:
        targets[name].copy_(saved[name])
    return report


def check_base(checkpoint: Checkpoint, base_model: str) -> None:
    """CheckpointError unless the checkpoint was trained on released weights with this fingerprint ("": on none)."""
    if (saved := checkpoint.state.base_model) != base_model:
        raise CheckpointError(
            f"{checkpoint.path}: it was trained on base weights {saved or 'none'}, "
            f"this run has {base_model or 'none'}; set model.weights to the same folder, or init= to a run on the same "
            "base"
        )


def base_of(checkpoint: Checkpoint, names: frozenset[str]) -> Checkpoint:
    """Where a run that stands on the tensors `names`, without saving them, got them from.

    The checkpoint itself if it holds them, else the one that its run began from, and so on. CheckpointError: that one
    is gone, damaged, or not known.
    """
    while missing := sorted(names - checkpoint.weights().keys()):
        lacks = f"{checkpoint.path}: holds {missing[0]} and {len(missing) - 1} others of its base by fingerprint only"
        try:
            path = find_run(checkpoint.path.parents[2], checkpoint.path.parents[1]).init_checkpoint
        except RunNotFoundError as error:
            raise CheckpointError(f"{lacks}, and it is in no run's folder; give the base as model.weights") from error
        if path is None:
            raise CheckpointError(f"{lacks}; it was trained on released weights: give them as model.weights")
        if not path.is_dir():
            raise CheckpointError(f"{lacks}, which were in {path}; put that checkpoint back")
        checkpoint = load_checkpoint(path)
    return checkpoint


def trained_by(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the parameters that a checkpoint's run trained."""
    groups: list[list[str]] = list(checkpoint.state.optimizer.get("groups", []))  # pyright: ignore
    return frozenset(name for group in groups for name in group)


@torch.no_grad()
def load_base(model: nn.Module, checkpoint: Checkpoint, names: frozenset[str]) -> str:
    """Copy a checkpoint's tensors `names`, averaged ones where there are any; returns their fingerprint.

    CheckpointError: the model's have other shapes.
    """
    saved, targets = checkpoint.averaged(), model.state_dict(keep_vars=True)
    digest = xxhash.xxh3_128()
    for name in sorted(names):
        if saved[name].shape != targets[name].shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {list(saved[name].shape)} there, {list(targets[name].shape)} in the "
                "model; use the size= and model.* settings it was trained with"
            )
        digest.update(f"{name}:{saved[name].dtype}:{list(saved[name].shape)}:".encode())
        digest.update(saved[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name in names:
        targets[name].copy_(saved[name])
    return digest.hexdigest()


@torch.no_grad()
def restore_weights(model: nn.Module, checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Copy a checkpoint's trained weights into the model they were saved from, bit for bit.

    names: what the model would save. CheckpointError: the checkpoint holds other tensors or shapes.
    """
    saved, targets = checkpoint.weights(), model.state_dict(keep_vars=True)
    if differing := sorted(saved.keys() ^ set(names)):
        raise CheckpointError(
            f"{checkpoint.path}: {len(differing)} tensors are not in both the checkpoint and the model, first "
            f"{', '.join(differing[:3])}; a run is resumed with the code and the config it was trained with"
        )
    for name, tensor in saved.items():
        if tensor.shape != targets[name].shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {list(tensor.shape)} there, {list(targets[name].shape)} in the model"
            )
    for name, tensor in saved.items():
        fill(targets[name], tensor)


def _refuse_other_model(report: InheritReport, saved: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    if len(report.unused) > len(saved) // 2:
        raise CheckpointError(
            f"init={report.source}: it is of another model: {len(report.unused)} of its {len(saved)} tensors have no "
            f"place here, first {', '.join(report.unused[:3])}; this model begins {', '.join(list(targets)[:3])}"
        )
    if report.shape_mismatch:
        first = ", ".join(
            f"{name} {list(saved[name].shape)} there, {list(targets[name].shape)} here"
            for name in report.shape_mismatch[:3]
        )
        raise CheckpointError(
            f"init={report.source}: {len(report.shape_mismatch)} tensors have another shape: {first}; "
            "use the size= and model.* settings it was trained with"
        )


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """An optimizer's state as tensors `<parameter>/<slot>` and JSON values; the tensors are the live ones, not copies.

    names: parameter name -> parameter, of all that the optimizer holds.
    """
    name_of = {id(parameter): name for name, parameter in names.items()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, object]] = {}
    groups = []
    for group in optimizer.param_groups:
        if unnamed := [p for p in group["params"] if id(p) not in name_of]:
            raise ValueError(
                f"{len(unnamed)} parameters of the optimizer have no name, first of shape {unnamed[0].shape}"
            )
        groups.append([name_of[id(p)] for p in group["params"]])
        for parameter in group["params"]:
            name = name_of[id(parameter)]
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors |= {f"{name}/{slot}{ending}": part for ending, part in parts_of(value).items()}
                else:
                    scalars.setdefault(name, {})[slot] = value
    return tensors, {"groups": groups, "scalars": scalars, "states": "8bit" if is_8bit(optimizer) else "fp32"}


def check_same_parameters(meta: Mapping[str, object], here: list[list[str]]) -> None:
    """CheckpointError unless an optimizer's saved state is of these groups of parameters, by name."""
    there: list[list[str]] = [list(group) for group in meta.get("groups", [])]  # pyright: ignore
    if here != there:
        differing = sorted({n for group in here for n in group} ^ {n for group in there for n in group})
        raise CheckpointError(
            f"the optimizer's state is of other parameters: {len(there)} groups of {sum(map(len, there))} there, "
            f"{len(here)} of {sum(map(len, here))} here, first that differ: {', '.join(differing[:3]) or 'their order'}"
        )


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, object],
) -> None:
    """Give an optimizer the state `flatten_optimizer` took, bit for bit and in its precision.

    Learning rate, decay and the like stay what the config made them.
    CheckpointError: it was of other parameters, groups or shapes.
    """
    name_of = {id(parameter): name for name, parameter in names.items()}
    check_same_parameters(meta, [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups])
    states, saved = ("8bit" if is_8bit(optimizer) else "fp32"), meta.get("states", "fp32")
    if states != saved:
        raise CheckpointError(
            f"optimizer.states={states}: the checkpoint's moments are {saved}, of which no others are made; resume "
            f"with optimizer.states={saved}, or start a new run with init="
        )
    scalars: dict = dict(meta.get("scalars", {}))  # pyright: ignore[reportArgumentType, reportCallIssue]
    slots: dict[str, dict[str, object]] = {name: dict(values) for name, values in scalars.items()}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in names:
            raise CheckpointError(f"the optimizer's state has {key}, which belongs to no parameter")
        if tensor.ndim and tensor.shape != names[name].shape and not slot.endswith(".scale"):
            raise CheckpointError(
                f"the optimizer's state has {key} of {list(tensor.shape)}, its parameter is {list(names[name].shape)}"
            )
        slots.setdefault(name, {})[slot] = tensor
    optimizer.state.clear()
    for group in optimizer.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            values = slots.get(name_of[id(parameter)], {})
            if values:
                optimizer.state[parameter] = {
                    slot: _placed(value, parameter, on_device=on_device)
                    for slot, value in joined(values, parameter).items()
                }


def _placed(value: object, parameter: nn.Parameter, *, on_device: bool) -> object:
    if not isinstance(value, Tensor):
        return value
    if is_part(value):
        return value
    if is_part(parameter) and value.shape == parameter.shape:
        return like_sharded(value, parameter)
    # the step count of an unfused optimizer stays on the CPU, where it is read every step
    return value.to(parameter.device, copy=True) if value.ndim or on_device else value.clone()
