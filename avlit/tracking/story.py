"""MLflow's page as one story: what each run is a part of, and a table of runs with columns that say something.

MLflow 3 opens an experiment on a view for language-model apps; its table of training runs has a link of its own, which
takes the columns from a tag of the experiment (what its "Share" button writes there).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from avlit.runs import Run, list_runs
from avlit.tracking.history import History, read_history
from avlit.tracking.lookup import StoreError, reach
from avlit.tracking.sender import SETTINGS

TAG = "story"
VIEW = "avlit"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = (
    "params.`seed`", "params.`train.steps`", "metrics.`val/lip_sync`", "metrics.`val/loss/video`",
    "metrics.`val/loss/audio`", "metrics.`throughput/samples_per_s`",
)  # fmt: skip
"""After the run's name, its story and its age: what was asked for and what came out."""
MOST = 1000


@dataclass(frozen=True)
class Experiment:
    """One experiment of the page. route: of its table of training runs, after the server's address."""

    name: str
    route: str


def tell(store: str, runs_dir: Path) -> list[Experiment]:
    """Write each run's story and the chosen columns into the store; returns the experiments with runs, newest first.

    StoreError: it does not answer.
    """
    reach(store)
    for name, setting in SETTINGS.items():
        os.environ.setdefault(name, setting)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    texts = stories(list_runs(runs_dir))
    found = []
    try:
        client = MlflowClient(store)
        for experiment in client.search_experiments():
            runs = client.search_runs([experiment.experiment_id], max_results=MOST)
            if not runs:
                continue
            for run in runs:
                text = texts.get(run.data.tags.get("avlit_id", ""))
                if text and run.data.tags.get(TAG) != text:
                    client.set_tag(run.info.run_id, TAG, text)
            view = json.dumps(view_state(runs))
            if experiment.tags.get(VIEW_TAG) != view:
                client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view)
            route = f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
            newest = max(run.info.start_time for run in runs)
            found.append((newest, Experiment(experiment.name, f"{route}&viewStateShareKey={quote(VIEW)}")))
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise StoreError(f"{store}: does not answer ({type(error).__name__}: {reason})") from error
    return [experiment for _, experiment in sorted(found, key=lambda pair: -pair[0])]


def view_state(runs: Sequence[Any]) -> dict[str, object]:
    """What MLflow's page shows: newest runs first, stages under their parents, these columns.

    runs: MLflow's. Of the columns those that any run has a value for. Which parents are unfolded cannot be given.
    """
    known = {f"params.`{name}`" for run in runs for name in run.data.params}
    known |= {f"metrics.`{name}`" for run in runs for name in run.data.metrics}
    columns = [f"tags.`{TAG}`", *(column for column in COLUMNS if column in known)]
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {columns[0]: 400},
    }


def stories(runs: Sequence[Run]) -> dict[str, str]:
    """Run id -> what it is a part of, what it started from, and where it was resumed; oldest runs first."""
    stages: dict[str, list[Run]] = {}
    for run in runs:
        if run.parent:
            stages.setdefault(run.parent, []).append(run)
    histories = {run.id: read_history(run) for run in runs}
    names = {key: history.session.name for key, history in histories.items() if history}
    return {run.id: story(run, stages, names, histories[run.id]) for run in runs}


def story(run: Run, stages: Mapping[str, Sequence[Run]], names: Mapping[str, str], history: History | None) -> str:
    """One run's, in words; stages: parent -> its runs; names: run id -> its name on the page."""
    parts = []
    if own := stages.get(run.id):
        parts.append(f"{len(own)} runs: {' → '.join(dict.fromkeys(stage.recipe for stage in own))}")
    elif run.parent and run.parent in stages:
        beside = stages[run.parent]
        parts.append(f"{[stage.id for stage in beside].index(run.id) + 1} of {len(beside)}")
    record = run.record()
    if record.init_checkpoint:
        step = record.init_checkpoint.rpartition("step-")[2]
        source = names.get(record.init_run or "", record.init_run or record.init_checkpoint)
        parts.append(f"from {source}" + (f", step {int(step)}" if step.isdigit() else ""))
    resumed = history.resumed_at if history else ()
    parts += [f"resumed before step {step}" if step else "begun again" for step in resumed]
    return "; ".join(parts) or "alone, from scratch"
