"""Kills training at random moments, starts it again, and compares with a run that was never stopped.

`just fuzz kills=200` runs it for as long as that takes; tests run it with a few kills. Processes are real and are
killed with SIGKILL; they are forked from a server that has the libraries imported, which saves seconds a start.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = (
    "model.num_layers=1", "model.num_heads=2", "data.num_frames=5", "data.num_clips=16", "data.batch_size=4",
    "validation.clips=4", "validation.every=3", "sample.steps=1", "sample.count=1", "sample.sync_clips=0",
    "sample.every=4", "train.threads=1", "train.log_every=1", "checkpoint.every=1",
)  # fmt: skip
TINY_OF_PAPER = {
    "mtv": ("model.num_interaction_blocks=1", "model.audio_hidden=16"),
    "mmcontrol": ("model.video_head_dim=12", "model.audio_head_dim=8"),
    "jova": ("model.num_single_layers=1", "model.head_dim=16", "model.rope_axes=[4,6,6]"),
}
MODES = ("any time", "in a save", "at a stage's start", "in training")


@dataclass
class Report:
    """What a fuzz did: kills by what was going on, steps compared, and what differed (empty if all is well)."""

    kills: dict[str, int]
    sessions: int
    compared: int
    differing: list[str]
    doubled: list[str]


def tiny(words: Sequence[str]) -> tuple[str, ...]:
    """Settings of a run of seconds for the recipe that the words name, MTV where they name none."""
    papers = [word.partition("=")[2].partition("_")[0] for word in words if word.startswith("recipe=")]
    return (*TINY, *TINY_OF_PAPER.get(papers[0] if papers else "mtv", ()))


def fuzz(folder: Path, words: Sequence[str], *, kills: int, seed: int = 0, sends: bool = False) -> Report:
    """Train a curriculum once undisturbed and once killed `kills` times; words: `recipe=… train.steps=…` and so on.

    sends: with the processes that send to MLflow, whose store is then compared as well; they take most of the time.
    """
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    for each in (undisturbed, killed):
        each.mkdir(parents=True)
    began = time.monotonic()
    assert finish(start(undisturbed, words, sends=sends)) == 0, (undisturbed / "log.txt").read_text()[-3000:]
    duration_s = time.monotonic() - began
    chance = random.Random(seed)
    counted: dict[str, int] = dict.fromkeys((*MODES, "tmp folder seen"), 0)
    sessions = 0
    while True:
        sessions += 1
        process = start(killed, words, sends=sends)
        if sum(counted[mode] for mode in MODES) == kills:
            assert finish(process) == 0, (killed / "log.txt").read_text()[-3000:]
            break
        mode = MODES[chance.randrange(len(MODES))]
        # So short that the kills are over before training is; starting takes some seconds itself.
        await_moment(process, killed / "runs", mode, chance, 2.5 + duration_s / kills)
        if not process.is_alive():
            assert process.exitcode == 0, (killed / "log.txt").read_text()[-3000:]
            break  # it finished before its time: nothing is left to kill
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        counted[mode] += 1
        counted["tmp folder seen"] += any((killed / "runs").glob("[!.]*/checkpoints/*.tmp-*"))
    compared, differing, doubled = compare(undisturbed / "runs", killed / "runs")
    if sends:
        stores = [read_store(each / "mlflow.db") for each in (undisturbed, killed)]
        compared += len(stores[0])
        differing += [f"MLflow: {place}" for place, values in stores[0].items() if stores[1].get(place) != values]
        doubled += [f"MLflow: {place}" for place, values in stores[1].items() if len(values) > 1]
    return Report(counted, sessions, compared, differing, doubled)


def start(folder: Path, words: Sequence[str], *, sends: bool) -> BaseProcess:
    """The command in a process of its own; the same words go on with what an earlier one left."""
    context = multiprocessing.get_context("forkserver")
    places = [f"runs_dir={folder / 'runs'}", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    command = ["curriculum", *tiny(words), *places, f"data.cache_dir={folder.parent / 'cache'}", *words]
    process = context.Process(target=run_command, args=(latest_words(command), str(folder / "log.txt"), sends))
    process.start()
    return process


def latest_words(words: Sequence[str]) -> list[str]:
    """The last of the words that give the same key."""
    return [words[0], *{word.partition("=")[0]: word for word in words[1:]}.values()]


def run_command(words: list[str], log: str, sends: bool) -> None:
    """What the process does: the command line's own entry."""
    from avlit.__main__ import main

    if not sends:
        keep_in_spool()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    status = main(words)
    sys.stdout.flush()
    os._exit(status)


def keep_in_spool() -> None:
    """In this process nothing is sent to MLflow: starting its client takes longer than a run of a few steps."""
    from avlit.tracking.tracker import Tracker

    def start_nothing(self: Tracker) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)  # ends with its input

    Tracker._start_sender = start_nothing


def finish(process: BaseProcess) -> int | None:
    """Its exit status."""
    process.join(600)
    return process.exitcode


def await_moment(process: BaseProcess, runs: Path, mode: str, chance: random.Random, patience_s: float) -> None:
    """Wait until it is time to kill, for `patience_s` at most, or until the process has ended."""
    limit = time.monotonic() + patience_s
    saves, stages = "[!.]*/checkpoints/*", "[!.]*"  # a run's folder begins with a dot until it is complete
    seen, folders = set(runs.glob(saves)), set(runs.glob(stages))
    if mode == "any time":
        process.join(chance.uniform(0, patience_s))
        return
    while process.is_alive() and time.monotonic() < limit:
        new = set(runs.glob(saves)) - seen
        if mode == "in a save" and any(".tmp-" in path.name for path in new):
            process.join(chance.uniform(0, 0.004))
            return
        if mode == "at a stage's start" and set(runs.glob(stages)) - folders:
            process.join(chance.uniform(0, 0.3))
            return
        if mode == "in training" and new:
            process.join(chance.uniform(0, 0.4))
            return
        time.sleep(0.0005)


def compare(undisturbed: Path, killed: Path) -> tuple[int, list[str], list[str]]:
    """(points compared, what differs, points that were logged with more than one value)."""
    from avlit.checkpoints import newest_valid
    from avlit.runs import list_runs

    pairs = [{run.recipe: run for run in list_runs(folder)} for folder in (undisturbed, killed)]
    compared, differing, doubled = 0, [], []
    if pairs[0].keys() != pairs[1].keys() or len(list_runs(killed)) != len(pairs[1]):
        differing.append(f"runs: {[run.id for run in list_runs(killed)]}")
    for recipe in pairs[0].keys() & pairs[1].keys():
        points = [read_points(pair[recipe].spool_dir / "metrics.jsonl") for pair in pairs]
        for place in sorted(points[0].keys() | points[1].keys()):
            compared += 1
            if points[0].get(place) != points[1].get(place):
                differing.append(f"{recipe} {place}: {points[0].get(place)} undisturbed, {points[1].get(place)} killed")
            if len(points[1].get(place, ())) > 1:
                doubled.append(f"{recipe} {place}")
        last = [newest_valid(pair[recipe].checkpoints_dir)[0] for pair in pairs]
        if last[0] is None or last[1] is None:
            differing += [f"{recipe}: has no checkpoint"] * (last[0] is not last[1])
            continue
        for part in ("weights", "ema", "optimizer"):
            tensors = [getattr(each, part)() for each in last]
            names = tensors[0].keys() | tensors[1].keys()
            compared += len(names)
            differing += [
                f"{recipe} {part} {name}"
                for name in names
                if name not in tensors[0] or name not in tensors[1] or not tensors[0][name].equal(tensors[1][name])
            ]
        if last[0].state.extra != last[1].state.extra or last[0].state.counters != last[1].state.counters:
            differing.append(f"{recipe}: counters or callbacks' state")
    return compared, differing, doubled


def read_points(spool: Path) -> dict[tuple[str, int], set[float]]:
    """(metric, step) -> its values, without those that tell the time."""
    points: dict[tuple[str, int], set[float]] = {}
    for line in spool.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        for name, value in record.get("m", {}).items():
            if not name.startswith("throughput/"):
                points.setdefault((name, record["s"]), set()).add(value)
    return points


def read_store(path: Path) -> dict[tuple[str, str, int], list[float]]:
    """(run's recipe, metric, step) -> its values in an MLflow store, without those that tell the time."""
    with sqlite3.connect(path) as store:
        rows = store.execute(
            "select tags.value, key, step, metrics.value from metrics "
            "join (select run_uuid, value from tags where key = 'recipe') tags using (run_uuid)"
        ).fetchall()
    found: dict[tuple[str, str, int], list[float]] = {}
    for recipe, name, step, value in rows:
        if not name.startswith("throughput/"):
            found.setdefault((recipe, name, step), []).append(value)
    return found


def preload() -> None:
    """Let the server that processes are forked from import what each of them needs."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.kill_fuzz_imports"])


def main(words: Sequence[str]) -> int:
    """`kills=25`, `seed=0`, `mlflow=false` for speed, and words for the curriculum; prints what was found."""
    given = dict(word.split("=", 1) for word in words)
    kills, seed = int(given.pop("kills", "25")), int(given.pop("seed", "0"))
    sends = given.pop("mlflow", "true") == "true"
    given = {"recipe": "mtv", "train.steps": str(max(10, kills))} | given  # enough of them to be killed in
    preload()
    folder = Path(tempfile.mkdtemp(prefix="avlit-fuzz-"))
    began = time.monotonic()
    report = fuzz(folder, [f"{key}={value}" for key, value in given.items()], kills=kills, seed=seed, sends=sends)
    print(f"{report}\n{time.monotonic() - began:.0f} s")
    if report.differing or report.doubled:
        print(f"kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
