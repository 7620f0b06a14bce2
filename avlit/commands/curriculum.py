"""`just curriculum`: all stages of a paper in order, each from the last one's weights, as children of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avlit.commands.train import train
from avlit.config import ConfigError, curriculum_keys, load_config, to_yaml
from avlit.runs import create_run
from avlit.settings import read_words


def main(words: Sequence[str]) -> int:
    """`recipe=PAPER` and any words that `just train` takes; they hold for every stage."""
    given = read_words(words)
    paper = given.pop("recipe", None)
    if paper is None:
        raise ConfigError("recipe=… is missing: name a paper, for example recipe=mtv")
    init = given.pop("init", None)  # of the first stage; the others start from the one before
    rest = [f"{key}={value}" for key, value in given.items()]
    keys = curriculum_keys(paper)
    configs = {key: load_config([f"recipe={key}", *rest]) for key in keys}  # all are checked before the first trains
    first = configs[keys[0]]
    parent = create_run(Path(first.runs_dir), f"{paper}_curriculum")
    parent.write_config(to_yaml(first))

    from avlit.tracking import open_parent

    tracker = open_parent(parent, uri=first.tracking.uri, experiment=first.tracking.experiment, run_name=first.run_name)
    print(f"Curriculum of {paper} in {len(keys)} stages: {', '.join(keys)}. Run {parent.id}")
    status = "failed"
    try:
        for number, key in enumerate(keys, start=1):
            print(f"\n[{number}/{len(keys)}] {key}")
            config = load_config([f"recipe={key}", *rest, *([f"init={init}"] if init else [])])
            outcome = train(config, parent=parent.id)
            if outcome.exit_status:
                status = "stopped"
                return outcome.exit_status
            tracker.log_metrics(outcome.metrics, number)
            init = str(outcome.run.path)
        status = "finished"
    finally:
        parent.update(status=status)
        tracker.finish(status)
    return 0
