"""`just reproduce`: a table of a paper, trained row by row and seed by seed, measured beside the paper's numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from avlit.commands.resume import read_allow_change
from avlit.commands.session import join_session
from avlit.commands.table_training import TableTraining, begun, unit_config
from avlit.config import Config, ConfigError, from_yaml, to_yaml
from avlit.paper_table import Extent, PaperTable, Unit, load_table, table_paths
from avlit.runs import Run, create_run, hold, list_runs
from avlit.settings import read_words
from avlit.table_report import TableReport

if TYPE_CHECKING:  # a wrong word must not wait for torch
    from avlit.metrics.picture_judge import PictureJudge
    from avlit.tracking import Tracker

PLAN, MEASURED, GRID = "reproduce.json", "measured", "grid-seed-{seed}.png"


@dataclass(frozen=True)
class Plan:
    """reproduce.json in the parent's folder: what was asked for, without where the runs are and how many train at once.

    clips: held-out clips that are sampled for each run. words: those for all runs.
    """

    table: str
    is_quick: bool
    seeds: tuple[int, ...]
    clips: int
    words: tuple[str, ...]

    @classmethod
    def read(cls, run: Run) -> Plan:
        """What a table began with. ConfigError: it is damaged."""
        try:
            values = json.loads((run.path / PLAN).read_text(encoding="utf-8"))
            return cls(
                str(values["table"]),
                bool(values["is_quick"]),
                tuple(map(int, values["seeds"])),
                int(values["clips"]),
                tuple(map(str, values["words"])),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"run={run.id}: {PLAN} cannot be read ({error}); resume its runs one by one, or start the table anew"
            ) from error

    def to_json(self) -> str:
        """What `read` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def units(self) -> list[Unit]:
        """The runs in the order of training."""
        table, extent = self.extent()
        return table.units(extent, self.words)

    def extent(self) -> tuple[PaperTable, Extent]:
        """The table, and which of its rows and seeds are trained."""
        table = load_table(self.table)
        whole = table.quick if self.is_quick else table.full
        return table, Extent(whole.rows, self.seeds, whole.words)


def main(words: Sequence[str]) -> int:
    """`table=KEY`, then `quick=true`, `seeds=0,1`, `clips=64`, `jobs=2` and words that hold for every run.

    A word that begins with a stage, such as `jova_stage2.train.steps=500`, holds for the runs of that stage. The same
    words again go on with a table that was stopped, or print it again; `new=true` starts another.
    """
    if (status := join_session()) is not None:
        return status
    given = read_words(words)
    if "table" not in given:
        raise ConfigError(f"table=… is missing; there are {', '.join(table_paths())}")
    table = load_table(given.pop("table"))
    is_quick, is_new = read_flag(given, "quick"), read_flag(given, "new")
    allow_change, at_once = read_allow_change(given), read_count(given, "jobs", "1")
    whole = table.quick if is_quick else table.full
    seeds = read_seeds(given.pop("seeds", ",".join(map(str, whole.seeds))))
    clips, runs_dir = read_count(given, "clips", str(table.clips)), Path(given.pop("runs_dir", Config.runs_dir))
    if clips < table.least_clips:
        others = "has controls of two others" if table.given else "is compared with the others' sound"
        raise ConfigError(f"clips={clips}: must be at least {table.least_clips}, as each {others}")
    plan = Plan(table.key, is_quick, seeds, clips, tuple(f"{key}={value}" for key, value in given.items()))
    units = plan.units()
    configs = [unit_config(unit, runs_dir=runs_dir) for unit in units]  # all, before the first trains
    refuse_unread_controls(plan, configs[-1])
    if not is_new and (parent := newest_of(runs_dir, plan)):
        print(f"Goes on with run {parent.id}; new=true would start the table anew")
        return train_table(parent, plan, at_once=at_once, is_resumed=True, allow_change=allow_change)
    if allow_change:
        raise ConfigError("allow_change=true: is for a table that goes on, and this is a new one; leave it out")
    parent = create_run(runs_dir, f"{table.key}_table", config=to_yaml(configs[-1]), files={PLAN: plan.to_json()})
    print(f"{table.about} ({table.paper}): {len(units)} runs. Run {parent.id}")
    return train_table(parent, plan, at_once=at_once, is_resumed=False)


def resume_table(parent: Run, words: Sequence[str], *, allow_change: bool = False) -> int:
    """Go on with a table, one run at a time; returns the exit status. ConfigError: words were given."""
    if words:
        raise ConfigError(
            f"{words[0]}: run={parent.id} is a table, whose words hold for all runs; start another with "
            "`just reproduce`"
        )
    return train_table(parent, Plan.read(parent), at_once=1, is_resumed=True, allow_change=allow_change)


def refuse_unread_controls(plan: Plan, config: Config) -> None:
    """ConfigError where a row's clips are given a control that its runs would not be trained with."""
    table, extent = plan.extent()
    for row in extent.rows:
        for control in table.given.get(row, ()):
            if control not in config.accepts:
                raise ConfigError(
                    f"table={table.key}: row {row} gives {control}, and with these words {config.recipe} takes "
                    f"{', '.join(config.accepts)} alone; leave out the word that excludes it"
                )


def newest_of(runs_dir: Path, plan: Plan) -> Run | None:
    """The newest table with the same plan, finished or not; says which cannot go on."""
    for run in reversed(list_runs(runs_dir)):
        if run.recipe != f"{plan.table}_table":
            continue
        try:
            if Plan.read(run) == plan:
                return run
        except ConfigError as error:  # it stands in no other's way
            print(f"A table cannot go on: {error}")
    return None


def train_table(parent: Run, plan: Plan, *, at_once: int, is_resumed: bool, allow_change: bool = False) -> int:
    """Train what is left, measure what is not measured yet, and report; returns the exit status."""
    from avlit.tracking import open_parent

    units = plan.units()
    with hold(parent):
        first = from_yaml(
            parent.read_config(), words=[f"runs_dir={parent.path.parent}"], source=str(parent.config_path)
        )
        tracker = open_parent(
            parent,
            uri=first.tracking.uri,
            experiment=first.tracking.experiment,
            is_resumed=is_resumed,
            kind="table",
        )
        parent.update(status="running")
        status = "failed"
        try:
            training = TableTraining(parent, units, allow_change=allow_change)
            training.refuse_other_code()
            exit_status = training.one_by_one() if at_once == 1 else training.side_by_side(at_once)
            if exit_status:
                status = "stopped"
                print(f"The same words again, or `just resume run={parent.id}`, go on with the table")
                return exit_status
            report(parent, plan, measure(parent, plan), tracker)
            status = "finished"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            tracker.finish(status)
            parent.update(status=status)
    return 0


def measure(parent: Run, plan: Plan) -> dict[str, dict[int, dict[str, float]]]:
    """Row -> seed -> metrics of its run; measured once, and read where they were."""
    from avlit.commands.callback_set import read_metrics, write_metrics
    from avlit.commands.control_study import TRUE_CLIPS
    from avlit.commands.corpus_judge import kept_picture_judge, kept_word_judge
    from avlit.commands.table_metrics import measure_run

    extent = plan.extent()[1]
    runs = begun(parent)
    first = next(iter(runs.values()))
    kept_in = Path(from_yaml(first.read_config(), source=str(first.config_path)).data.cache_dir)
    judge, picture_judge = cache(partial(kept_word_judge, kept_in)), cache(partial(kept_picture_judge, kept_in))
    units = [unit for unit in plan.units() if unit.is_measured]
    rows = {unit: [unit.row] if unit.row is not None else [*extent.rows, TRUE_CLIPS] for unit in units}
    paths = {(unit, row): measured_path(parent, runs[unit.name], row, plan) for unit in units for row in rows[unit]}
    left = [unit for unit in units if not all(paths[unit, row].exists() for row in rows[unit])]
    began = time.monotonic()
    for number, unit in enumerate(left):
        seconds = (time.monotonic() - began) / number * (len(left) - number) if number else None
        remaining = "" if seconds is None else f", about {seconds / 60:.1f} min left"
        print(f"Measures {unit.name} ({number + 1} of {len(left)}){remaining}", flush=True)
        if unit.row is not None:
            found = {unit.row: measure_run(runs[unit.name], judge=judge, num_clips=plan.clips)}
        else:
            found = measure_sampled_rows(parent, runs[unit.name], plan, unit, judge=picture_judge)
        for row, metrics in found.items():
            write_metrics(paths[unit, row], metrics)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for (unit, row), path in paths.items():
        results.setdefault(row, {})[unit.seed] = read_metrics(path) or {}
    return results


def measured_path(parent: Run, run: Run, row: str, plan: Plan) -> Path:
    """Where a row's metrics of a run are kept."""
    table, extent = plan.extent()
    place = f"-{extent.rows.index(row) if row in extent.rows else 'true'}" if table.given else ""
    return parent.path / MEASURED / f"{run.id}{place}-{plan.clips}-clips.json"


def measure_sampled_rows(
    parent: Run, run: Run, plan: Plan, unit: Unit, *, judge: Callable[[], PictureJudge]
) -> dict[str, dict[str, float]]:
    """Metrics of all rows of a table whose rows differ in sampling alone, of one seed's run, and its grid."""
    from avlit.commands.control_study import Row, measure_controls

    table, extent = plan.extent()
    rows = {
        row: Row(tuple(f"{key}={value}" for key, value in table.rows[row].items()), table.given[row])
        for row in extent.rows
    }
    grid = parent.path / GRID.format(seed=unit.seed)
    return measure_controls(run, rows, judge=judge, num_clips=plan.clips, grid=grid)


def report(parent: Run, plan: Plan, results: dict[str, dict[int, dict[str, float]]], tracker: Tracker) -> None:
    """Print the table, write it and its plot into the parent's folder, and send all to MLflow."""
    table, extent = plan.extent()
    config = from_yaml(parent.read_config(), source=str(parent.config_path))
    note = (
        f"{config.recipe} at size {config.size}, {config.train.steps} steps, "
        f"{'seed' if len(extent.seeds) == 1 else 'seeds'} {', '.join(map(str, extent.seeds))}; "
        f"of {plan.clips} held-out clips those with one speaker are sampled for each run. ± is the standard deviation "
        "over seeds."
    )
    if table.published:
        note += (
            " The paper's numbers are of its own data, model and metrics: directions can be compared, values cannot."
        )
    if table.given:
        note += f" Of the true clips the same judges say: {true_values(table, results)}."
    made = TableReport(table, extent.rows, results, note)
    grids = [path for seed in extent.seeds if (path := parent.path / GRID.format(seed=seed)).exists()]
    for path in (*made.write(parent.path), *grids):
        tracker.log_artifact(path)
    for row, seeds in results.items():
        for seed, metrics in seeds.items():
            tracker.log_metrics({f"{name_of(row)}/{name}": value for name, value in metrics.items()}, seed)
    print("", made.markdown(), *map(str, (parent.path / "table.png", *grids)), sep="\n")


def true_values(table: PaperTable, results: dict[str, dict[int, dict[str, float]]]) -> str:
    """What the metrics of a table whose rows are sampled are for the true clips, in words."""
    from avlit.commands.control_study import TRUE_CLIPS

    values = next(iter(results[TRUE_CLIPS].values()))  # they are the same clips for all seeds
    return ", ".join(f"{each.name} {values[each.name]:.3f}" for each in table.metrics if each.name in values)


def name_of(row: str) -> str:
    """A row's label as part of a metric's name."""
    return "row " + "".join(letter if letter.isalnum() or letter in "-_. " else "_" for letter in row)


def read_flag(given: dict[str, str], name: str) -> bool:
    """Take `name=true|false` out of the words."""
    value = given.pop(name, "false")
    if value not in ("true", "false"):
        raise ConfigError(f"{name}={value}: must be true or false")
    return value == "true"


def read_count(given: dict[str, str], name: str, default: str) -> int:
    """Take a whole number from 1 on out of the words."""
    value = given.pop(name, default)
    if not (value.isascii() and value.isdigit() and int(value)):
        raise ConfigError(f"{name}={value}: must be a whole number of at least 1")
    return int(value)


def read_seeds(text: str) -> tuple[int, ...]:
    """The value of seeds=."""
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() for number in numbers) or len(set(numbers)) < len(numbers):
        raise ConfigError(f"seeds={text}: must be different whole numbers, for example seeds=0,1,2")
    return tuple(map(int, numbers))
