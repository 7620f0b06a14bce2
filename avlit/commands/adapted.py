"""A module with an adapter in it: the base below it, the adapter on top, and where each comes from."""

from __future__ import annotations

from pathlib import Path

from avlit.adapters import AdapterState, add_adapter
from avlit.checkpoints import Checkpoint, load_checkpoint
from avlit.commit import CheckpointError
from avlit.config import Config, ConfigError
from avlit.inherit import base_of, load_weights_into, trained_by
from avlit.module import AVModule
from avlit.runs import Run, RunNotFoundError, find_run


def start_adapter(
    module: AVModule, config: Config, run: Run, checkpoint: Checkpoint | None
) -> tuple[tuple[str, int], ...]:
    """The adapter of a session: new, another run's that `init=` names, or its own as it was; before the optimizer.

    Returns the lineage before this run, as `start_weights` does.
    """
    source = None
    if config.init:
        path = run.init_checkpoint or Path(config.init)
        if not path.is_dir():
            raise CheckpointError(
                f"init={config.init}: run={run.id} stands on this checkpoint, which is no longer there: its run was "
                "removed, or keeps newer ones (checkpoint.keep); put it back"
            )
        source = load_checkpoint(path)
    stand_on(module, config, root_of(source) if source else None)
    if checkpoint:
        module.resume(checkpoint)
        print(
            f"Goes on from step {checkpoint.step} of {config.train.steps} (a resume: adapter, moments, average, "
            "schedule, data and random numbers as they were)"
        )
        return checkpoint.state.lineage[:-1]
    if source and source.state.adapter:
        go_on_with(module, source)
    return source.state.lineage if source else ()


def root_of(checkpoint: Checkpoint) -> Checkpoint | None:
    """What an adapter's checkpoint stands on: the first of those that its run began from that holds a model.

    The checkpoint itself if it holds one; None where the adapter stands on released weights alone. CheckpointError: it
    is gone, or damaged.
    """
    while checkpoint.state.adapter:
        holds = f"{checkpoint.path}: holds an adapter alone"
        try:
            path = find_run(checkpoint.path.parents[2], checkpoint.path.parents[1]).init_checkpoint
        except RunNotFoundError as error:
            raise CheckpointError(f"{holds}, and it is in no run's folder, so nobody knows its base") from error
        if path is None:
            return None
        if not path.is_dir():
            raise CheckpointError(f"{holds}; the base was in {path}; put that checkpoint back")
        checkpoint = load_checkpoint(path)
    return checkpoint


def stand_on(module: AVModule, config: Config, root: Checkpoint | None) -> None:
    """Load released weights and a root's into a module, then put the config's adapter into it; says what was done."""
    inherited: frozenset[str] = frozenset()
    base = None
    if config.model.weights:
        print(f"model.weights: {module.load_released(config.model.weights)}")
    elif module.base_names and root:
        base = base_of(root, module.base_names)
        print(module.load_base(base))
    if root:
        own_base = module.base_model if root is not base else None  # the base itself stands on none
        report = load_weights_into(module.model, root, ema=True, base_model=own_base)
        inherited = frozenset(report.inherited)
        module.released -= inherited if base is None else inherited - module.base_names
        print(f"The adapter stands on {report}")
    if copied := module.copy_weights(inherited, trained_by(root) if root else frozenset()):
        print(copied)
    parts, own = config.adapter_parts, config.own_modules
    print(add_adapter(module, config.adapter, parts=parts, own_modules=own))


def go_on_with(module: AVModule, source: Checkpoint) -> None:
    """Take the averaged weights of another run's adapter into the module's own, which must be of the same kind.

    ConfigError: it is of another kind, rank or scale, or adapts other layers.
    """
    there, here = AdapterState.of(source.state.adapter), AdapterState.of(module.adapter)
    for key in ("kind", "rank", "alpha"):
        if getattr(there, key) != getattr(here, key) and not (here.kind == "own" and key != "kind"):
            raise ConfigError(
                f"adapter.{key}={getattr(here, key)}: init={source.path} has adapter.{key}={getattr(there, key)}; give "
                "that, or start from the run under it"
            )
    if differing := sorted(set(there.names) ^ set(here.names)):
        raise ConfigError(
            f"init={source.path}: it does not adapt the same layers; in one of the two only: {differing[0]} and "
            f"{len(differing) - 1} others; give the adapter.targets and adapter.modality that it was trained with"
        )
    print(f"The adapter goes on from {load_weights_into(module.model, source, ema=True, base_model=module.base_model)}")
