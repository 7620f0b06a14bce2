"""`just train`: a new run of one recipe, from its config to trained weights, tracked and sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from avlit.commands.session import Outcome, join_session, run_session
from avlit.config import Config, load_config, to_yaml
from avlit.durable import write_atomically
from avlit.errors import UserError
from avlit.runs import create_run


def main(words: Sequence[str]) -> int:
    """Train the recipe that the words name; see `just config recipe=…` for all keys."""
    if (status := join_session()) is not None:
        return status
    return train(load_config(words)).exit_status


def train(config: Config, *, parent: str | None = None, files: Mapping[str, str] | None = None) -> Outcome:
    """Train one stage in a new run folder.

    parent: id of the run that this one is a stage of. files: name -> text of what the folder holds from the beginning.
    """
    config, init_run = settle_init(config)
    run = create_run(
        Path(config.runs_dir),
        config.recipe,
        config=to_yaml(config),
        parent=parent,
        init_run=init_run,
        init_checkpoint=config.init,
    )
    for name, text in (files or {}).items():
        write_atomically(run.path / name, text)
    print(f"{config.recipe}: {config.about} Size {config.size}, seed {config.seed}.\nRun {run.id} in {run.path}")
    return run_session(config, run, is_resumed=False)


def settle_init(config: Config) -> tuple[Config, str | None]:
    """The config with the checkpoint folder that `init=` means now, and the id of the run that saved it.

    For before the new run's folder is made: `last` would be that one. UserError: there is no such checkpoint.
    """
    if not config.init:
        return config, None
    from avlit.inherit import resolve_weights  # imports torch

    try:
        source = resolve_weights(config.init, runs_dir=Path(config.runs_dir))
    except UserError as error:
        raise UserError(f"init={config.init}: {str(error).removeprefix(f'init={config.init}: ')}") from error
    return replace(config, init=str(source.path.resolve())), source.state.run or None
