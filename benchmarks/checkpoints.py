"""How long a checkpoint holds up training and when it is durable: ours, Lightning's, torch.save and a raw write.

`python -m benchmarks.checkpoints [megabytes=1000] [rounds=7] [folder=runs]`. All save one state of float32 weights,
their moving average and AdamW's two moments, in turn, on the file system of `folder`. "Blocks" is how long the call
lasts; "durable" is when the bytes have been synced, which torch.save and Lightning leave undone and which is done for
them. The best round tells more than the median where others use the disk.
"""

import ctypes
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avlit.checkpoint_writer import CheckpointWriter
from avlit.checkpoints import CheckpointState, load_checkpoint
from avlit.commands.session import quieten_lightning
from avlit.durable import sync_folder
from avlit.inherit import flatten_optimizer

WIDTH = 1024
BYTES_PER_WEIGHT = 16  # itself, its average and two moments


class Trained(pl.LightningModule):
    """As many linear layers as the megabytes ask for, each with its average, after one step of AdamW."""

    def __init__(self, *, megabytes: int) -> None:
        super().__init__()
        depth = max(1, round(megabytes * 1e6 / (BYTES_PER_WEIGHT * (WIDTH + 1) * WIDTH)))
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth)))
        self.average = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth))).requires_grad_(False)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), fused=True)


@dataclass(frozen=True)
class Parts:
    """What a checkpoint of the module holds, as the tensors that training goes on with."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.weights.values(), *self.optimizer.values(), *self.ema.values()]

    @property
    def gigabytes(self) -> float:
        return sum(tensor.nbytes for tensor in self.tensors) / 1e9


@dataclass(frozen=True)
class Timing:
    """Seconds that the call lasted and until all was durable, and bytes of memory taken besides what was there."""

    blocks_s: float
    durable_s: float
    extra_bytes: int


def train_one_step(module: Trained) -> tuple[pl.Trainer, Parts]:
    """The trainer after its step, for Lightning's own way to save, and the same state as tensors."""
    quieten_lightning()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(8, WIDTH), batch_size=8))  # pyright: ignore[reportArgumentType]
    moments, _ = flatten_optimizer(trainer.optimizers[0], dict(module.model.named_parameters()))
    return trainer, Parts(module.model.state_dict(), moments, module.average.state_dict())


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status: VmRSS is the memory in use, VmHWM the most since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{field}: no such field in /proc/self/status; this benchmark needs Linux")


def sync_file(path: Path) -> None:
    """Wait until a file that somebody wrote, and its name, are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def measure(save: Callable[[], Callable[[], float]]) -> Timing:
    """save: what blocks; it returns what waits for the rest and gives the moment when all was durable."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier round gave back would spare this one the first touch
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = resident_bytes("VmRSS")
    began = time.perf_counter()
    finish = save()
    blocks_s = time.perf_counter() - began
    durable_s = finish() - began
    return Timing(blocks_s, durable_s, max(0, resident_bytes("VmHWM") - before))


class TimedWriter(CheckpointWriter):
    """Takes the time between the commit and the removal of what is older."""

    durable_at = 0.0

    def _save_or_make_room(self, copies: dict[str, dict[str, Tensor]], state: CheckpointState) -> Path:
        path = super()._save_or_make_room(copies, state)
        self.durable_at = time.perf_counter()
        return path


class OurWriter:
    """A CheckpointWriter of a run that goes on: the first save takes its memory, later ones have it."""

    def __init__(self, folder: Path, parts: Parts, *, reserves: bool = False) -> None:
        self.parts, self.step = parts, 0
        self.writer = TimedWriter(folder, keep=1)
        if reserves:
            self.writer.reserve(weights=parts.weights, optimizer=parts.optimizer, ema=parts.ema)

    def save(self) -> Callable[[], float]:
        self.step += 1
        state = CheckpointState(step=self.step, seed=0, recipe="bench")
        self.writer.save(weights=self.parts.weights, optimizer=self.parts.optimizer, ema=self.parts.ema, state=state)
        return self._finish

    def _finish(self) -> float:
        self.writer.wait()
        return self.writer.durable_at


def save_file_then_sync(path: Path, write: Callable[[Path], object]) -> Callable[[], float]:
    """A way to save that ends without a sync, as a `save` for `measure`."""
    write(path)

    def finish() -> float:
        sync_file(path)
        return time.perf_counter()

    return finish


def write_raw(path: Path, parts: Parts) -> None:
    """Every byte of the tensors, one after the other."""
    with open(path, "wb", buffering=0) as file:
        for tensor in parts.tensors:
            tensor.numpy().tofile(file)


def main(words: list[str]) -> None:
    """Measures in turn and prints the table."""
    options = {"megabytes": "1000", "rounds": "7", "folder": "runs"} | dict(word.split("=", 1) for word in words)
    warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec).*")
    Path(options["folder"]).mkdir(exist_ok=True)
    trainer, parts = train_one_step(Trained(megabytes=int(options["megabytes"])))
    with tempfile.TemporaryDirectory(dir=options["folder"]) as name:
        folder = Path(name)
        later = OurWriter(folder / "later", parts, reserves=True)

        ways: dict[str, Callable[[], Callable[[], float]]] = {
            "raw write": lambda: save_file_then_sync(folder / "raw", lambda path: write_raw(path, parts)),
            "CheckpointWriter": later.save,
            "CheckpointWriter, memory not reserved": lambda: OurWriter(folder / "first", parts).save(),
            "torch.save": lambda: save_file_then_sync(folder / "torch.pt", lambda path: torch.save(vars(parts), path)),
            "Lightning's save_checkpoint": lambda: save_file_then_sync(folder / "last.ckpt", trainer.save_checkpoint),
        }
        timings: dict[str, list[Timing]] = {way: [] for way in ways}
        for turn in range(int(options["rounds"]) + 1):
            for way, save in ways.items():
                timing = measure(save)
                if turn:  # the first round warms up
                    timings[way].append(timing)
                shutil.rmtree(folder / "first", ignore_errors=True)
                for path in (folder / "raw", folder / "torch.pt", folder / "last.ckpt"):
                    path.unlink(missing_ok=True)
        load_s = read_back(folder / "later" / f"step-{later.step:08d}", parts)

    print(f"State of {parts.gigabytes:.2f} GB in {len(parts.tensors)} tensors, {options['rounds']} rounds in turn")
    print(f"{'':38}{'blocks, s per GB':>18} {'durable, s per GB':>18} {'durable, x raw':>16} {'memory,':>8}")
    print(f"{'':38}{'median':>10}{'best':>8} {'median':>10}{'best':>8} {'median':>8}{'best':>8} {'x state':>8}")
    for way, found in timings.items():
        print(f"{way:38}{line(found, timings['raw write'], parts.gigabytes)}")
    print(f"Verified and read back: {load_s / parts.gigabytes:.2f} s per GB, from memory. Goals: 0.25 and 1.5 x raw")


def read_back(path: Path, parts: Parts) -> float:
    """Seconds to verify a checkpoint and read all of it; it must be what was saved."""
    began = time.perf_counter()
    checkpoint = load_checkpoint(path)
    loaded = [checkpoint.weights(), checkpoint.optimizer(), checkpoint.ema()]
    seconds = time.perf_counter() - began
    for found, saved in zip(loaded, (parts.weights, parts.optimizer, parts.ema), strict=True):
        if found.keys() != saved.keys() or not all(torch.equal(found[key], saved[key]) for key in saved):
            raise AssertionError(f"{path} does not hold what was saved")
    return seconds


def line(found: list[Timing], raw: list[Timing], gigabytes: float) -> str:
    """The columns of one way to save."""
    blocks, durable, floor = ([getattr(t, key) for t in times] for key, times in
                              (("blocks_s", found), ("durable_s", found), ("durable_s", raw)))  # fmt: skip
    ratio = statistics.median(own / other for own, other in zip(durable, floor, strict=True))
    extra = statistics.median(timing.extra_bytes for timing in found) / 1e9 / gigabytes
    return (
        f"{statistics.median(blocks) / gigabytes:10.3f}{min(blocks) / gigabytes:8.3f} "
        f"{statistics.median(durable) / gigabytes:10.3f}{min(durable) / gigabytes:8.3f} "
        f"{ratio:8.2f}{min(durable) / min(floor):8.2f} {extra:8.2f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
