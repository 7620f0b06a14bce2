"""`just resume`: goes on with a run, or a curriculum, exactly where its newest checkpoint left it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avlit.commands.session import join_session, run_session
from avlit.config import ConfigError, from_yaml
from avlit.runs import Run, find_run
from avlit.settings import read_words


def main(words: Sequence[str]) -> int:
    """`run=ID_OR_FOLDER` or `run=last`, and config keys that are to change; `allow_change=true` if they change more
    than where things are and what is reported.
    """
    if (status := join_session()) is not None:
        return status
    given = read_words(words)
    word = given.pop("run", None)
    if word is None:
        raise ConfigError("run=… is missing: run=last, the id of a run, or its folder")
    if "init" in given:
        raise ConfigError(f"init={given['init']}: starts a new run from weights (`just train`); a resume has its own")
    allow_change = read_allow_change(given)
    run = find_run(Path(given.pop("runs_dir", "runs")), word)
    if word == "last" and run.parent:  # a curriculum that was stopped is what a user means, not its stage alone
        run = find_run(run.path.parent, run.parent)
    rest = [f"{key}={value}" for key, value in given.items()]
    if (run.path / "curriculum.json").exists():
        from avlit.commands.curriculum import resume_curriculum

        return resume_curriculum(run, rest, allow_change=allow_change)
    return resume(run, rest, allow_change=allow_change)


def resume(run: Run, words: Sequence[str], *, allow_change: bool = False) -> int:
    """Go on with a run of one recipe; returns the exit status. ConfigError: there is nothing left of it to train."""
    here = f"runs_dir={run.path.parent}"  # the folder may have been moved
    words = [here, *words]
    config = from_yaml(run.read_config(), words=words, source=str(run.config_path))
    if run.record().status == "finished":
        from avlit.commands.session import newest_checkpoint

        checkpoint = newest_checkpoint(run)
        if checkpoint is None or checkpoint.step >= config.train.steps:
            raise ConfigError(
                f"run={run.id}: has finished its {config.train.steps} steps; train.steps=MORE allow_change=true goes "
                f"on beyond them, `just train init={run.id} …` starts a new run from its weights"
            )
    print(f"Resumes {run.recipe}, run {run.id} in {run.path}")
    return run_session(config, run, is_resumed=True, allow_change=allow_change).exit_status


def read_allow_change(given: dict[str, str]) -> bool:
    """Take `allow_change=true|false` out of the words."""
    value = given.pop("allow_change", "false")
    if value not in ("true", "false"):
        raise ConfigError(f"allow_change={value}: must be true or false")
    return value == "true"
