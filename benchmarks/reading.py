"""How fast samples are read: through the index, by webdataset's own reader, and as raw bytes, interleaved in one run.

`python -m benchmarks.reading [samples=1000] [rounds=5]`. One core, warm page cache; trust the ratios on a busy machine.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.batches import BatchReader, Contents, ReaderSettings
from data.loader import TrainLoader
from data.shards import Annotation, EncodedSample, ShardSet, ShardWriter

BATCH_SIZE = 8
TEXT_TOKENS = 32


def make_sample(index: int, rng: np.random.Generator) -> EncodedSample:
    """About 300 KB: latents of 246 KB, text of 33 KB, three tracks of 20 KB, as in the design's measurement."""
    annotation = Annotation(
        caption=f"Two person conversation. Person1 is speaking. Scene Description: number {index}.",
        transcript="one two three",
        subset="clips",
        fps=12.0,
        rate_hz=16000,
        num_frames=25,
        height=240,
        width=256,
        mouth_boxes=[[(10.25, 20.5, 30.75, 40.0)]] * 25,
    )
    latents, text, *tracks = (
        rng.standard_normal(shape, np.float32)
        for shape in ((16, 8, 30, 32), (TEXT_TOKENS, 512), (25, 1, 128), (25, 1, 128), (25, 1, 128))
    )
    sound = np.zeros(33333, np.float32)
    speech, effects, music = tracks
    texts = {"caption": text}
    return EncodedSample(f"clip-{index:06d}", annotation, texts, latents, None, speech, effects, music, waveform=sound)


def write_set(root: Path, num_samples: int) -> None:
    """A shard set of `num_samples`, 100 in a shard."""
    rng = np.random.default_rng(0)
    with ShardWriter(root, {"fps": 12.0, "rate_hz": 16000}, samples_per_shard=100) as writer:
        for index in range(num_samples):
            writer.add("clips", "train", make_sample(index, rng))


def read_raw(root: Path) -> None:
    """All bytes of the tars, 4 MiB at a time, looked at by nobody."""
    buffer = bytearray(1 << 22)
    for tar in sorted(root.glob("*.tar")):
        with tar.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_webdataset(root: Path) -> None:
    """webdataset's reader with the safetensors package, in the order of the shards."""
    from safetensors.torch import load
    from webdataset.compat import WebDataset

    tars = [str(tar) for tar in sorted(root.glob("*.tar"))]
    for sample in WebDataset(tars, shardshuffle=False):
        touch(load(sample["safetensors"])["video_latents"])


def read_in_turn(shards: ShardSet, reader: BatchReader, num_samples: int) -> None:
    """Every sample in the shuffled order of training, as arrays."""
    for step in range(num_samples // BATCH_SIZE):
        for ref in reader.order.batch(step):
            touch(torch.from_numpy(shards.read(ref.shard, ref.index).video_latents))


def read_batches(reader: BatchReader, num_samples: int) -> None:
    """Stacked float32 batches through the loader's prefetch thread."""
    for batch in TrainLoader(reader, steps=num_samples // BATCH_SIZE):
        touch(batch.video_latents)


def touch(latents: torch.Tensor | None) -> float:
    """Looks at the first and the last number, so that nothing can stay unread."""
    assert latents is not None
    flat = latents.reshape(-1)
    return float(flat[0]) + float(flat[-1])


def seconds(work: Callable[[], None]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(words: list[str]) -> None:
    """Measures and prints the table."""
    options = {"samples": 1000, "rounds": 5, **{key: int(value) for key, value in (word.split("=") for word in words)}}
    torch.set_num_threads(1)
    num_samples = options["samples"] // BATCH_SIZE * BATCH_SIZE
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_set(root, num_samples)
        settings = ReaderSettings((folder,), (("clips", 1.0),), BATCH_SIZE, Contents(TEXT_TOKENS), seed=0)
        warm = ShardSet.open(root)

        def first_time() -> None:
            fresh = ShardSet.open(root)
            read_in_turn(fresh, BatchReader(settings, fresh), num_samples)

        readers: dict[str, Callable[[], None]] = {
            "raw bytes": lambda: read_raw(root),
            "webdataset + safetensors": lambda: read_webdataset(root),
            "index, first time (index parsed, checksums compared)": first_time,
            "index, again": lambda: read_in_turn(warm, BatchReader(settings, warm), num_samples),
            "index, batches through the loader": lambda: read_batches(BatchReader(settings, warm), num_samples),
        }
        times: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(options["rounds"] + 1):
            for name, work in readers.items():
                spent = seconds(work)
                if turn:  # the first round warms the page cache
                    times[name].append(spent)
        size = sum(tar.stat().st_size for tar in root.glob("*.tar")) / num_samples / 1e3
    print(f"{num_samples} samples of {size:.0f} KB, median of {options['rounds']} interleaved rounds, one thread, warm")
    print(f"{'reader':55s} {'samples/s':>10s} {'x raw':>7s} {'x webdataset':>13s}")
    rates = {name: num_samples / statistics.median(spent) for name, spent in times.items()}
    for name, rate in rates.items():
        raw, peer = rate / rates["raw bytes"], rate / rates["webdataset + safetensors"]
        print(f"{name:55s} {rate:10.0f} {raw:7.2f} {peer:13.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
