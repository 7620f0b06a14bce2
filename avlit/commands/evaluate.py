"""`just evaluate`: the papers' metrics of a run's held-out clips, or of given clips, beside the papers' numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avlit.commands.sample import HELDOUT_KEYS, PLACE_KEYS, newest_checkpoint, read_config
from avlit.config import Config, ConfigError, DataConfig
from avlit.runs import find_run
from avlit.settings import nearest, read_words

if TYPE_CHECKING:  # a wrong word must not wait for torch
    from avlit.evaluation.readings import Readings
    from avlit.evaluation.report import Report
    from avlit.metrics.metric import Tools

NUM_CLIPS = 64
LIST = "list"
OWN_KEYS = ("metrics", "clips", "first_frame")
FILE_KEYS = ("metrics", "clips", "clips_dir", "real_dir", "captions", "runs_dir", "paper")
SAMPLED_KEYS = (
    "run", "runs_dir", "seed", "sample.steps", *PLACE_KEYS, *(key for key in HELDOUT_KEYS if key != "sample.count"),
)  # fmt: skip


def main(words: Sequence[str]) -> int:
    """`run=RUN` (`last`, an id, a folder): clips are sampled for held-out conditions and measured; `data.root=SHARDS`
    takes other held-out clips than the run's own. `first_frame=false` gives no first frame.

    `clips_dir=FOLDER`: clips that are there already, of whatever origin; `real_dir=FOLDER` true clips of the same
    names, `captions=FILE.jsonl` what was asked for, `paper=jova` whose numbers stand beside.
    Both: `metrics=A,B` (all that can be measured), `metrics=list`, `clips=64`, `weights.KEY=PATH` for networks. The
    same words again go on with an evaluation that was stopped, or print it again.
    """
    given = read_words(words)
    weights = read_weights(given)
    names = [name for name in given.pop("metrics", "").split(",") if name]
    if names == [LIST]:
        return print_list(weights)
    if ("run" in given) == ("clips_dir" in given):
        raise ConfigError("give either run=RUN (run=last, an id, a folder) or clips_dir=FOLDER, for what is evaluated")
    if "clips_dir" in given:
        return evaluate_files(given, names=names, weights=weights)
    return evaluate_run(given, names=names, weights=weights)


def read_weights(given: dict[str, str]) -> dict[str, Path]:
    """Take `weights.KEY=PATH` out of the words. ConfigError: no metric reads such a key, or nothing is there."""
    from avlit.metrics.metric import Weights
    from avlit.metrics.registry import metrics

    keys = {need.key for metric in metrics().values() for need in metric.meter.needs if isinstance(need, Weights)}
    found = {}
    for word in [word for word in given if word.startswith("weights.")]:
        key, value = word.removeprefix("weights."), given.pop(word)
        if key not in keys:
            near = nearest(key, sorted(keys))
            known = f"did you mean weights.{near}?" if near else f"there are {', '.join(sorted(keys)) or 'none'}"
            raise ConfigError(f"{word}={value}: no metric reads it; {known}")
        if not Path(value).exists():
            raise ConfigError(f"{word}={value}: there is no such file or folder")
        found[key] = Path(value)
    return found


def print_list(weights: Mapping[str, Path]) -> int:
    """All metrics, with what each needs."""
    from rich.console import Console

    from avlit.commands.measuring import corpus_tools
    from avlit.evaluation.report import listing
    from avlit.metrics.registry import metrics

    tools = corpus_tools(weights, device="cpu", judges=Path(DataConfig.cache_dir))
    Console(width=None if sys.stdout.isatty() else 240).print(listing(list(metrics().values()), tools))
    return 0


def read_count(given: dict[str, str]) -> int:
    """Take `clips=` out of the words."""
    value = given.pop("clips", str(NUM_CLIPS))
    if not (value.isascii() and value.isdigit() and int(value)):
        raise ConfigError(f"clips={value}: must be a whole number of at least 1")
    return int(value)


def evaluate_run(given: dict[str, str], *, names: Sequence[str], weights: Mapping[str, Path]) -> int:
    """Held-out clips of a run's data, or of `data.root`, sampled from its newest checkpoint."""
    num_clips, first_frame = read_count(given), given.pop("first_frame", None)
    if first_frame not in (None, "true", "false"):
        raise ConfigError(f"first_frame={first_frame}: must be true or false")
    run = find_run(Path(given.get("runs_dir", Config.runs_dir)), given["run"])
    try:
        config = read_config(run, given, allowed=SAMPLED_KEYS, what="an evaluation")
    except ConfigError as error:
        if "no such word" in str(error):
            raise ConfigError(f"{error} Besides there are {', '.join((*OWN_KEYS, 'weights.KEY'))}") from error
        raise
    takes_frame = config.codecs.video != "none" and any(word.startswith("image.") for word in config.accepts)
    if first_frame == "true" and not takes_frame:
        raise ConfigError(f"first_frame=true: {config.recipe} takes no first frame; leave it out")
    checkpoint = newest_checkpoint(run, config)

    from avlit.commands.run_evaluation import RunEvaluation, log
    from avlit.evaluation.report import logged_name

    is_first_given = takes_frame and first_frame != "false"
    evaluation = RunEvaluation(run, config, checkpoint, names=names, is_first_given=is_first_given, weights=weights)
    place = f"{logged_name('eval/', Path(given['data.root']).name)}/" if "data.root" in given else "eval/"
    report = evaluation.measure(num_clips=num_clips, place=place)
    finish(report, evaluation.readings, recipe=config.recipe, tools=evaluation.tools)
    log(run, report, evaluation.readings, step=checkpoint.step)
    return 0


def evaluate_files(given: dict[str, str], *, names: Sequence[str], weights: Mapping[str, Path]) -> int:
    """Clips in a folder."""
    from avlit.commands.measured_clips import media_in, of_file, read_records
    from avlit.commands.measuring import corpus_tools, device, keep, opened, progress
    from avlit.discovery import RECIPES
    from avlit.evaluation.published import published_numbers
    from avlit.evaluation.readings import Readings, meter_ids
    from avlit.evaluation.report import FOLDER, Report
    from avlit.metrics.registry import chosen, meters

    for key, value in given.items():
        if key not in FILE_KEYS:
            near = nearest(key, list(FILE_KEYS))
            raise ConfigError(
                f"{key}={value}: has no effect on clips_dir={given['clips_dir']}; "
                + (f"did you mean {near}?" if near else f"there are {', '.join(FILE_KEYS)}")
            )
    folder, num_clips = Path(given["clips_dir"]), read_count(given) if "clips" in given else None
    paper = given.get("paper")
    if paper is not None and not (RECIPES / paper / "recipe.py").exists():
        known = sorted(path.parent.name for path in RECIPES.glob("*/recipe.py"))
        raise ConfigError(f"paper={paper}: must be one of {', '.join(known)}")
    paths = media_in(folder)[:num_clips]
    real = {path.stem: path for path in media_in(Path(given["real_dir"]))} if "real_dir" in given else {}
    if missing := [path for path in paths if real and path.stem not in real]:
        raise ConfigError(f"real_dir={given['real_dir']}: has no clip named {missing[0].stem}")
    captions = Path(given["captions"]) if "captions" in given else None
    records = read_records(captions)
    if records and not any(path.name in records for path in paths):
        raise ConfigError(f"captions={captions}: names none of the clips in {folder}, such as {paths[0].name}")
    tools = corpus_tools(weights, device=device(), judges=None)
    metrics = chosen(names, tools)
    ids = meter_ids(meters(metrics), tools)
    files = [path for path in (*paths, *(real[path.stem] for path in paths if real), *([captions] if captions else []))]
    settings = {"files": {str(path.resolve()): _stamp(path) for path in files}}
    readings = Readings.open(Path(given.get("runs_dir", Config.runs_dir)) / FOLDER, settings)
    left = [number for number in range(len(paths)) if readings.lacks(number, ids)]
    measures = opened(ids, tools, needed={name for number in left for name in readings.lacks(number, ids)})
    with progress(len(left)) as bar:
        for number in left:
            path = paths[number]
            clip = of_file(path, about=records.get(path.name, {}), real=real.get(path.stem))
            keep(readings, number, clip, clip.real, ids=ids, measures=measures)
            bar.update()
    numbers = published_numbers(paper) if paper else []
    note = f"{len(paths)} clips of {folder}. 95 %: bootstrap over clips."
    report = Report.of(metrics, readings, ids=ids, count=len(paths), published=numbers, note=note)
    finish(report, readings, recipe=paper, tools=tools)
    return 0


def _stamp(path: Path) -> tuple[int, int]:
    known = path.stat()
    return known.st_size, known.st_mtime_ns


def finish(report: Report, readings: Readings, *, recipe: str | None, tools: Tools) -> None:
    """Print the table, write it beside the readings, and say what of the paper could not be measured, and why."""
    from rich.console import Console

    from avlit.evaluation.published import published_numbers
    from avlit.metrics.registry import metrics

    report.write(readings.folder)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(report.table())
    print(report.note)
    if report.idle:
        print(f"Nothing to measure in these clips: {', '.join(report.idle)}")
    known = metrics()
    papers = dict.fromkeys(each.metric for each in published_numbers(recipe.partition("_")[0])) if recipe else ()
    for name in papers:
        if name in known and (lacks := known[name].meter.lacks(tools)):
            print(f"Not measured, though in the paper: {name} needs {'; '.join(lacks)}")
    print(f"{readings.folder / 'table.md'}\n`just evaluate metrics=list` shows every metric and what it needs")
