"""How long a run takes to its first batch wherever it goes on: at the start, within a pass, near its end, in pass 7.

`python -m benchmarks.resume_position [samples=100000] [rounds=7]`. Builds the data module anew each time, as a resume
does; the positions take turns within a round, so that the differences are of one run. One shard of 250 small samples
is written and linked under as many names as make up the set: every name is a file to open and an index to parse.
"""

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.reading import make_sample
from data.batches import Contents
from data.datamodule import AVDataModule
from data.manifest import read_manifest
from data.shard_index import index_path
from data.shards import EncodedSample, ShardWriter

IN_SHARD = 250
BATCH_SIZE = 8
GOAL_S = 3.0


def small(sample: EncodedSample) -> EncodedSample:
    """The same clip with little to read, so that the way to it is measured."""
    cut = {name: array[:1] if name.startswith("text.") else array[..., :2] for name, array in sample.arrays.items()}
    sample = EncodedSample.of_arrays(sample.key, sample.annotation, cut, sample.waveform)
    return replace(sample, waveform=sample.waveform[:160] if sample.waveform is not None else None)


def write_set(root: Path, num_samples: int) -> None:
    """A set of `num_samples`, which IN_SHARD must divide."""
    rng = np.random.default_rng(0)
    with ShardWriter(root, {"fps": 12.0, "rate_hz": 16000}, samples_per_shard=IN_SHARD) as writer:
        for index in range(IN_SHARD):
            writer.add("clips", "train", small(make_sample(index, rng)))
    manifest = read_manifest(root)
    (first,) = manifest.shards
    tar, shards = root / f"{first.name}.tar", [first]
    for number in range(1, num_samples // IN_SHARD):
        shards.append(replace(first, name=f"clips-train-{number:06d}"))
        link = root / f"{shards[-1].name}.tar"
        os.link(tar, link)
        os.link(index_path(tar), index_path(link))
    replace(manifest, shards=tuple(shards)).write(root)


def seconds_to_first_batch(root: Path, start_step: int) -> float:
    """From nothing to the batch of `start_step`."""
    began = time.perf_counter()
    data = AVDataModule(root, batch_size=BATCH_SIZE, contents=Contents(4), seed=0, start_step=start_step)
    data.setup()
    batches = iter(data.train_dataloader())
    assert next(batches).step == start_step
    spent = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return spent


def main(words: list[str]) -> None:
    """Measures and prints the table."""
    options = {"samples": 100_000, "rounds": 7} | {k: int(v) for k, v in (word.split("=") for word in words)}
    torch.set_num_threads(1)
    num_samples = options["samples"] // IN_SHARD * IN_SHARD
    steps = num_samples // BATCH_SIZE  # of a pass
    places = {
        "step 0": 0,
        "the middle of pass 1": steps // 2,
        "the last steps of pass 1": steps - 2,
        "the middle of pass 7": 6 * steps + steps // 2,
    }
    spent: dict[str, list[float]] = {name: [] for name in places}
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), num_samples)
        for turn in range(options["rounds"] + 1):
            for name, step in places.items():
                seconds = seconds_to_first_batch(Path(folder), step)
                if turn:  # the first round warms the page cache
                    spent[name].append(seconds)
    print(f"{num_samples} samples in {num_samples // IN_SHARD} shards, median of {options['rounds']} rounds in turn")
    print(f"{'first batch at':28s} {'ms':>8s} {'later than at step 0':>22s} {'ratio':>7s}")
    start = spent["step 0"]
    for name, found in spent.items():
        later = median(one - zero for one, zero in zip(found, start, strict=True))
        print(f"{name:28s} {1e3 * median(found):8.1f} {1e3 * later:19.1f} ms {median(found) / median(start):7.2f}")
    worst = max(one - zero for found in spent.values() for one, zero in zip(found, start, strict=True))
    print(f"latest of all: {1e3 * worst:.1f} ms after a fresh start's (goal: at most {GOAL_S:.0f} s)")


if __name__ == "__main__":
    main(sys.argv[1:])
