"""What `just compare` takes for ten runs of 10,000 steps, beside reading their numbers with json alone.

`python -m benchmarks.comparison [runs=10] [steps=10000] [every=10] [rounds=3]`. The runs are made up: as many curves as
a recipe with three losses logs, four clips each. Seconds are of this process' processor time, medians over rounds;
"json" is the standard library's parser over the same lines, which no reader of these files can do without.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import yaml

from avlit.comparison.comparison import compare
from avlit.comparison.page import write_page
from avlit.mp4 import write_mp4
from avlit.runs import Run, create_run
from avlit.tracking import Tracker
from avlit.tracking.spool import POINTS

PARTS = ("video", "audio", "mouth")
ROWS = ("", "/noise/0", "/noise/1", "/noise/2", "/noise/3", "/subset/faces", "/subset/objects")


def make_run(folder: Path, *, seed: int, steps: int, every: int) -> Run:
    """A finished run whose losses fall, with its clips."""
    config = yaml.safe_dump({"recipe": "made_up", "seed": seed, "size": "tiny", "train": {"steps": steps}})
    run = create_run(folder, "made_up", config=config)
    random = np.random.default_rng(seed)
    with patch.object(Tracker, "_start_sender", lambda _: None):
        tracker = Tracker(run, uri=f"sqlite:///{folder / 'mlflow.db'}")
    for step in range(0, steps + 1, every):
        noise = random.normal(size=len(PARTS) * len(ROWS))
        names = (f"loss/{part}{row}" for part in PARTS for row in ROWS)
        losses = {f"train/{name}": 1 / (1 + step / 1000) + 0.1 * float(n) for name, n in zip(names, noise, strict=True)}
        tracker.log_metrics(
            {**losses, "train/lr": 1e-3, "train/grad_norm": 1.0, "throughput/samples_per_s": 50.0}, step
        )
        if step % (steps // 10) == 0:
            tracker.log_metrics({name.replace("train", "val"): value for name, value in losses.items()}, step)
    samples = run.samples_dir / f"step-{steps:08d}"
    samples.mkdir()
    for number in range(4):
        frames = random.integers(0, 255, (13, 32, 32, 3), dtype=np.uint8)
        sound = random.uniform(-0.5, 0.5, 17000).astype(np.float32)
        write_mp4(samples / f"{number:02d}-clip-{number}.mp4", frames, fps=12, waveform=sound, rate_hz=16000)
    run.update(status="finished")
    return run


def processor_s(work: Callable[[], object], rounds: int) -> float:
    """Processor seconds of a call, the median of some."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def main(words: list[str]) -> None:
    """Measures and prints the table."""
    options = {"runs": 10, "steps": 10_000, "every": 10, "rounds": 3}
    options |= {key: int(value) for key, value in (word.split("=") for word in words)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [
            make_run(folder / "runs", seed=seed, steps=options["steps"], every=options["every"])
            for seed in range(options["runs"])
        ]
        lines = [line for run in runs for line in (run.spool_dir / POINTS).read_bytes().splitlines()]
        parsing = processor_s(lambda: [json.loads(line) for line in lines], options["rounds"])
        page = folder / "comparison.html"

        def whole() -> None:
            write_page(compare(runs, media=folder / "media", num_clips=4), page)

        began = time.perf_counter()
        comparing = processor_s(whole, options["rounds"])
        passed = (time.perf_counter() - began) / options["rounds"]
        media = sum(path.stat().st_size for path in (folder / "media").iterdir())
        print(
            f"{options['runs']} runs of {options['steps']} steps, logged every {options['every']}: "
            f"{sum(map(len, lines)) / 1e6:.1f} MB\n"
            f"comparing and writing the page: {comparing:.2f} s of processor time ({passed:.2f} s passed), "
            f"{comparing / parsing:.1f} times json alone ({parsing:.2f} s)\n"
            f"page {page.stat().st_size / 1e6:.2f} MB, clips and spectrograms beside it {media / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
