"""`just train`: a new run of one recipe, from its config to trained weights, tracked and sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avlit.commands.session import Outcome, join_session, run_session
from avlit.config import Config, load_config, to_yaml
from avlit.runs import create_run


def main(words: Sequence[str]) -> int:
    """Train the recipe that the words name; see `just config recipe=…` for all keys."""
    if (status := join_session()) is not None:
        return status
    return train(load_config(words)).exit_status


def train(config: Config, *, parent: str | None = None) -> Outcome:
    """Train one stage in a new run folder. parent: id of the run that this one is a stage of."""
    run = create_run(Path(config.runs_dir), config.recipe, config=to_yaml(config), parent=parent)
    print(f"{config.recipe}: {config.about} Size {config.size}, seed {config.seed}.\nRun {run.id} in {run.path}")
    return run_session(config, run, is_resumed=False)
