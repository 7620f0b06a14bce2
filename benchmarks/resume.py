"""Seconds from the command to the first training step: of a fresh run, and of one that is resumed.

`python -m benchmarks.resume [rounds=3] [KEY=VALUE …]`, further words being those of `just train`.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.kill_fuzz import read_points

WORDS = ("recipe=mtv_stage3", "checkpoint.every=1000", "train.log_every=1", "sample.count=0", "sample.sync_clips=0")


def seconds_to_first_step(folder: Path, *words: str) -> float:
    """Starts `python -m avlit …`, stops it after its first step has been logged."""
    log = folder / "printed.txt"
    before = {path: logged_steps(path) for path in folder.glob("runs/*/spool/metrics.jsonl")}
    began = time.perf_counter()
    with open(log, "wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "avlit", *words], stdout=file, stderr=file)
    while process.poll() is None:
        if any(logged_steps(path) > before.get(path, 0) for path in folder.glob("runs/*/spool/metrics.jsonl")):
            seconds = time.perf_counter() - began
            process.terminate()
            if process.wait() == 143:
                return seconds
        time.sleep(0.01)
    raise SystemExit(log.read_text())


def logged_steps(spool: Path) -> int:
    return sum(name == "train/lr" for name, _ in read_points(spool))


def main(words: list[str] | None = None) -> None:
    """Rounds of both in turn; the median of the differences, pair by pair."""
    given = dict(word.split("=", 1) for word in words or [])
    rounds = int(given.pop("rounds", "3"))
    more = [f"{key}={value}" for key, value in given.items()]
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = [
            f"runs_dir={folder}/runs",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"data.cache_dir={folder}/cache",
        ]
        for number in range(rounds + 1):
            fresh = seconds_to_first_step(folder, "train", *WORDS, *more, *places)
            again = seconds_to_first_step(folder, "resume", "run=last", places[0])
            if number:  # the first round writes the corpus and warms the file cache
                pairs.append((fresh, again))
    differences = [again - fresh for fresh, again in pairs]
    print(f"first step of a fresh run    {median(fresh for fresh, _ in pairs):.2f} s after the command")
    print(f"first step of a resumed run  {median(again for _, again in pairs):.2f} s after the command")
    print(
        f"difference                   {median(differences):+.2f} s "
        f"(pairs from {min(differences):+.2f} to {max(differences):+.2f}; goal: at most +3)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
