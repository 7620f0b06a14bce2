"""`just resume`: goes on with a run, a curriculum, a table or a fine-tuning, where its newest checkpoint left it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avlit.commands.session import Outcome, join_session, run_session
from avlit.commit import committed_dirs, step_of
from avlit.config import Config, ConfigError, from_yaml
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
    if (run.path / "reproduce.json").exists():
        from avlit.commands.reproduce import resume_table

        return resume_table(run, rest, allow_change=allow_change)
    if (run.path / "finetuning.json").exists():
        from avlit.commands.finetune import resume_finetuning

        return resume_finetuning(run, rest, allow_change=allow_change)
    return resume(run, rest, allow_change=allow_change).exit_status


def resume(run: Run, words: Sequence[str], *, allow_change: bool = False) -> Outcome:
    """Go on with a run of one recipe. ConfigError: nothing is left of it to train, or a word can change nothing."""
    text, source = run.read_config(), str(run.config_path)
    here = f"runs_dir={run.path.parent}"  # the folder may have been moved
    config = from_yaml(text, words=[here, *words], source=source)
    refuse_settled(run, from_yaml(text, source=source), config)
    if config.recipe != run.recipe:
        raise ConfigError(
            f"run={run.id}: {run.config_path} is of recipe={config.recipe}; a curriculum whose curriculum.json is gone "
            "cannot go on as a whole, resume its stages one by one"
        )
    steps = config.train.steps
    # By the folders' names: what is in them is verified by the session, once it holds the run.
    done = max((step_of(path) or 0 for path in committed_dirs(run.checkpoints_dir)), default=0)
    if steps < done:
        raise ConfigError(
            f"train.steps={steps}: run={run.id} has done {done} steps, which a resume does not take back; set it to "
            "that or more, or start a new run with `just train`"
        )
    if run.record().status == "finished" and done in (0, steps):
        raise ConfigError(
            f"run={run.id}: has finished its {steps} steps; train.steps=MORE allow_change=true goes on beyond them, "
            f"`just train init={run.id} …` starts a new run from its weights"
        )
    print(f"Resumes {run.recipe}, run {run.id} in {run.path}")
    return run_session(config, run, is_resumed=True, allow_change=allow_change)


def refuse_settled(run: Run, before: Config, now: Config) -> None:
    """ConfigError where the words change what was settled when the run began."""
    if now.run_name != before.run_name:
        raise ConfigError(
            f"run_name={now.run_name}: run={run.id} was named when it began, so this has no effect; leave it out, and "
            "rename it in MLflow's page (`just ui`)"
        )
    if now.tracking.experiment != before.tracking.experiment:
        raise ConfigError(
            f"tracking.experiment={now.tracking.experiment}: run={run.id} is tracked in {before.tracking.experiment}, "
            "and another experiment would hold a second MLflow run of it; leave it out"
        )


def read_allow_change(given: dict[str, str]) -> bool:
    """Take `allow_change=true|false` out of the words."""
    value = given.pop("allow_change", "false")
    if value not in ("true", "false"):
        raise ConfigError(f"allow_change={value}: must be true or false")
    return value == "true"
