"""Where a session's first weights come from: its own newest checkpoint, those that `init=` names, released ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from avlit.config import Config, ConfigError
from avlit.runs import Run

if TYPE_CHECKING:
    from avlit.checkpoints import Checkpoint
    from avlit.module import AVModule


def newest_checkpoint(run: Run) -> Checkpoint | None:
    """What a session goes on from, None before the first save; says which newer ones are damaged.

    CheckpointError: there are checkpoints, and none that verifies.
    """
    from avlit.checkpoints import newest_valid
    from avlit.commands.callback_set import is_resumable
    from avlit.commit import CheckpointError, sweep

    sweep(run.checkpoints_dir)
    checkpoint, skipped = newest_valid(run.checkpoints_dir, accept=is_resumable)
    for reason in skipped:
        print(f"checkpoint left out: {reason}")
    if checkpoint is None and skipped:
        raise CheckpointError(
            f"run={run.id}: none of its {len(skipped)} checkpoints can be read; "
            f"remove {run.checkpoints_dir} to train it from the beginning"
        )
    return checkpoint


def start_weights(
    module: AVModule, config: Config, run: Run, checkpoint: Checkpoint | None
) -> tuple[tuple[str, int], ...]:
    """Load released weights, then the run's own checkpoint or those of `init=`; freeze; say what came from where.

    Returns the lineage before this run: (run id, step) of the checkpoints that its first weights descend from.
    """
    from avlit.inherit import base_of, load_weights_into, trained_by

    if config.adapter.is_on:
        from avlit.commands.adapted import start_adapter

        return start_adapter(module, config, run, checkpoint)
    source = init_source(run, config.init) if config.init and not checkpoint else None
    if source and source.state.adapter:
        raise ConfigError(
            f"init={config.init}: holds an adapter alone; say adapter={source.state.adapter.get('kind')} to go on with "
            "it, or make a model of it first: `just export format=avlit merge=true`"
        )
    base = None
    if config.model.weights:
        print(f"model.weights: {module.load_released(config.model.weights)}")
    elif module.base_names and (begun := checkpoint or source):
        base = base_of(begun, module.base_names)
        print(module.load_base(base))
    if checkpoint:
        module.freeze()
        module.resume(checkpoint)
        print(
            f"Goes on from step {checkpoint.step} of {config.train.steps} (a resume: weights, moments, average, "
            "schedule, data and random numbers as they were)"
        )
        return checkpoint.state.lineage[:-1]
    lineage: tuple[tuple[str, int], ...] = ()
    inherited: frozenset[str] = frozenset()
    if source:
        own_base = module.base_model if source is not base else None  # the base itself stands on none
        report = load_weights_into(module.model, source, ema=True, base_model=own_base)
        lineage, inherited = source.state.lineage, frozenset(report.inherited)
        module.released -= inherited if base is None else inherited - module.base_names  # no folder has them any more
        print(f"init={config.init} (a new run from weights, not a resume): {report}")
    elif not config.model.weights:
        print("Starts from scratch: no `init=` and no `model.weights=` given.")
    if copied := module.copy_weights(inherited, trained_by(source) if source else frozenset()):
        print(copied)
    module.freeze()
    frozen = [name for name, parameter in module.model.named_parameters() if not parameter.requires_grad]
    if frozen:
        print(f"{len(frozen)} parameters are frozen (e.g. {frozen[0]})")
    return lineage


def init_source(run: Run, init: str) -> Checkpoint:
    """The checkpoint that `init=` named when the run began: the run that saved it may have moved on since.

    CheckpointError: it is gone, or damaged.
    """
    from avlit.checkpoints import load_checkpoint
    from avlit.commit import CheckpointError

    path = run.init_checkpoint or Path(init)
    try:
        if not path.is_dir():
            raise CheckpointError("it is no longer there: its run was removed, or keeps newer ones (checkpoint.keep)")
        return load_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"init={init}: run={run.id} starts from this checkpoint and has saved none of its own, but "
            f"{str(error).removeprefix(f'{path}: ')}; put it back, or start a new run with `just train`"
        ) from error
