"""`just curriculum`: all stages of a paper in order, each from the last one's weights, as children of one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from avlit.commands.resume import read_allow_change, resume
from avlit.commands.session import Outcome, join_session
from avlit.commands.train import settle_init, train
from avlit.config import Config, ConfigError, curriculum_keys, from_yaml, load_config, to_yaml
from avlit.runs import Run, create_run, hold, list_runs, stages_of
from avlit.settings import read_words, words_by_stage

PLAN = "curriculum.json"


@dataclass(frozen=True)
class Plan:
    """curriculum.json in the parent's folder: the paper, its stages in order, and the words given for all of them.

    words: without `runs_dir`, which is wherever the parent is. init: as it was given, the parent's run.json says what
    it meant.
    """

    paper: str
    stages: tuple[str, ...]
    words: tuple[str, ...]
    init: str | None

    @classmethod
    def read(cls, run: Run) -> Plan:
        """What a curriculum began with. ConfigError: it is damaged, or the stages of the paper are others now."""
        try:
            values = json.loads((run.path / PLAN).read_text(encoding="utf-8"))
            words = tuple(word for word in values["words"] if not word.startswith("runs_dir="))
            plan = cls(str(values["paper"]), tuple(values["stages"]), words, values["init"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"run={run.id}: {PLAN} cannot be read ({error}); resume its stages one by one") from error
        if plan.stages != (now := tuple(curriculum_keys(plan.paper))):
            raise ConfigError(f"run={run.id}: has the stages {', '.join(plan.stages)}, the paper has {', '.join(now)}")
        return plan

    def to_json(self) -> str:
        """What `read` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def config(self, stage: str, *, runs_dir: Path, init: str | None) -> Config:
        """A stage's config; init: whose weights it starts from."""
        given = words_by_stage(read_words(self.words), self.stages)[stage]
        if settled := {"recipe", "runs_dir", "init"} & given.keys():
            raise ConfigError(f"{stage}.{min(settled)}: is settled for every stage of a curriculum; leave it out")
        given |= {"recipe": stage, "runs_dir": str(runs_dir)} | ({"init": init} if init else {})
        try:
            return load_config([f"{key}={value}" for key, value in given.items()])
        except ConfigError as error:
            raise ConfigError(f"{error} (in {stage}; `{stage}.KEY=VALUE` is a word for that stage alone)") from error


def main(words: Sequence[str]) -> int:
    """`recipe=PAPER` and any words that `just train` takes; they hold for every stage.

    A word that begins with a stage, such as `unitalking_stage2.sample.guidance=3`, holds for that stage alone. The same
    words again go on with a curriculum that was stopped, at its stage and step; `new=true` starts another.
    """
    if (status := join_session()) is not None:
        return status
    given = read_words(words)
    paper = given.pop("recipe", None)
    if paper is None:
        raise ConfigError("recipe=… is missing: name a paper, for example recipe=mtv")
    is_new, allow_change = given.pop("new", "false"), read_allow_change(given)
    if is_new not in ("true", "false"):
        raise ConfigError(f"new={is_new}: must be true or false")
    init = given.pop("init", None)  # of the first stage; the others start from the one before
    runs_dir = Path(given.pop("runs_dir", Config.runs_dir))
    keys = tuple(curriculum_keys(paper))
    plan = Plan(paper, keys, tuple(f"{key}={value}" for key, value in given.items()), init)
    configs = [plan.config(key, runs_dir=runs_dir, init=init) for key in keys]  # all, before the first trains
    if is_new == "false" and (parent := unfinished(runs_dir, plan)):
        print("new=true would start another curriculum instead")
        return resume_curriculum(parent, (), allow_change=allow_change)
    if allow_change:
        reason = f"none in {runs_dir} is unfinished and of the same words" if is_new == "false" else "new=true"
        raise ConfigError(
            f"allow_change=true: is for a curriculum that goes on, and this is a new one ({reason}); leave it out"
        )
    first, init_run = settle_init(configs[0])
    parent = create_run(
        runs_dir,
        f"{paper}_curriculum",
        config=to_yaml(first),
        init_run=init_run,
        init_checkpoint=first.init,
        files={PLAN: plan.to_json()},
    )
    print(f"Curriculum of {paper} in {len(keys)} stages: {', '.join(keys)}. Run {parent.id}")
    return train_stages(parent, plan, is_resumed=False)


def unfinished(runs_dir: Path, plan: Plan) -> Run | None:
    """The newest curriculum with the same words that has not finished; says which others have not."""
    for run in reversed(list_runs(runs_dir)):
        if run.recipe != f"{plan.paper}_curriculum" or run.record().status == "finished":
            continue
        try:
            if Plan.read(run) == plan:
                return run
            print(f"run={run.id} is unfinished too, of other words; `just resume run={run.id}` goes on with it")
        except ConfigError as error:  # it stands in no other's way
            print(f"An unfinished curriculum cannot go on: {error}")
    return None


def resume_curriculum(parent: Run, words: Sequence[str], *, allow_change: bool = False) -> int:
    """Go on at the stage and step where a curriculum was stopped; returns the exit status.

    ConfigError: it has finished, or words were given: they would hold for some of its stages only.
    """
    if words:
        raise ConfigError(
            f"{words[0]}: run={parent.id} is a curriculum, whose words hold for all stages; resume its stage by its "
            "own id to change that one, or start another with `just curriculum`"
        )
    if parent.record().status == "finished":
        raise ConfigError(f"run={parent.id}: all its stages have finished; `just curriculum` starts another")
    print(f"Resumes the curriculum, run {parent.id} in {parent.path}")
    return train_stages(parent, Plan.read(parent), is_resumed=True, allow_change=allow_change)


def train_stages(parent: Run, plan: Plan, *, is_resumed: bool, allow_change: bool = False) -> int:
    """Train what is left of the stages; returns the exit status."""
    from avlit.tracking import open_parent

    runs_dir = parent.path.parent  # all of it may have been moved
    with hold(parent):
        first = from_yaml(parent.read_config(), words=[f"runs_dir={runs_dir}"], source=str(parent.config_path))
        tracker = open_parent(
            parent,
            uri=first.tracking.uri,
            experiment=first.tracking.experiment,
            run_name=first.run_name,
            is_resumed=is_resumed,
        )
        parent.update(status="running")
        started = {run.recipe: run for run in stages_of(parent)}  # of several the newest
        status, init = "failed", parent.init_checkpoint or plan.init
        try:
            for number, key in enumerate(plan.stages, start=1):
                print(f"\n[{number}/{len(plan.stages)}] {key}")
                run = started.get(key)
                if run is None:
                    outcome = train(
                        plan.config(key, runs_dir=runs_dir, init=str(init) if init else None), parent=parent.id
                    )
                elif run.record().status == "finished":
                    print(f"Finished before, run {run.id}")
                    outcome = Outcome(run, json.loads(run.metrics_path.read_text(encoding="utf-8")))
                else:
                    outcome = resume(run, (), allow_change=allow_change)
                if outcome.exit_status:
                    status = "stopped"
                    print(f"`just resume run={parent.id}` goes on with the whole curriculum")
                    return outcome.exit_status
                tracker.log_metrics(outcome.metrics, number)
                init = outcome.run.path
            status = "finished"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            tracker.finish(status)
            parent.update(status=status)
    return 0
