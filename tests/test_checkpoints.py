"""Checkpoints: whole or absent, never silently wrong, never unpickled; optimizers restored bit for bit."""

import errno
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

import avlit.checkpoints
import avlit.commit
from avlit.checkpoint_writer import CheckpointWriter
from avlit.checkpoints import (
    CheckpointState,
    NonFiniteError,
    Spread,
    load_checkpoint,
    newest_valid,
    prune,
    save_checkpoint,
    save_share,
)
from avlit.commands.train import train
from avlit.commit import CheckpointError, begin, check_writable, step_dir, sweep
from avlit.config import load_config
from avlit.inherit import flatten_optimizer, load_weights_into, resolve_weights, restore_optimizer
from avlit.module import AVModule
from avlit.runs import create_run
from avlit.spread_tensors import SpreadTensors, part_name, save_part
from avlit.tracking import Tracker
from callbacks.checkpointing import Checkpointing
from callbacks.ema import EMA
from callbacks.heldout import HeldoutLoss
from tests import kill_fuzz
from tests.test_module import Poisoned, fit
from tests.test_resume import only_run, resumed, words

ROOT = Path(__file__).parents[1]


def state_at(step: int, **changes: object) -> CheckpointState:
    return CheckpointState(step=step, seed=0, recipe="mtv_stage1", **changes)  # pyright: ignore


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "a.weight": torch.randn(8, 4, generator=generator),
        "a.bias": torch.randn(8, generator=generator).bfloat16(),
    }


def save(folder: Path, *steps: int) -> list[Path]:
    return [
        save_checkpoint(
            folder,
            weights=tensors_of(step),
            ema=tensors_of(step + 1000),
            optimizer={"a.weight/exp_avg": tensors_of(step)["a.weight"]},
            state=state_at(step),
        )
        for step in steps
    ]


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = state_at(
        5,
        lineage=(("r1", 40000), ("r2", 5)),
        counters={"skipped": 1.0},
        extra={"log": {"sums": [0.1 + 0.2]}},
    )
    path = save_checkpoint(tmp_path, weights=tensors_of(5), ema=tensors_of(6), state=state)
    checkpoint = load_checkpoint(path)

    assert same(checkpoint.weights(), tensors_of(5))
    assert same(checkpoint.ema(), tensors_of(6))
    assert checkpoint.optimizer() == {}
    assert checkpoint.state.extra == state.extra and checkpoint.state.lineage == state.lineage
    assert checkpoint.state.versions["torch"] in torch.__version__
    assert sorted(p.name for p in path.iterdir()) == [
        "COMMIT.json",
        "ema.safetensors",
        "state.json",
        "weights.safetensors",
    ]


@pytest.mark.parametrize("name", ["weights", "ema", "optimizer", "state", "COMMIT"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    _, newest = save(tmp_path, 1, 2)
    path = newest / (name + (".json" if name in ("state", "COMMIT") else ".safetensors"))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[content.index(b"digest") + 12 if name == "COMMIT" else len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1] if name != "COMMIT" else content[:-2])
    else:
        path.unlink()

    checkpoint, skipped = newest_valid(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    assert same(checkpoint.weights(), tensors_of(1))
    assert [entry.path for entry in skipped] == [newest]
    assert name in skipped[0].reason
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(newest)


def test_every_single_bit_of_every_file_counts(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(path.glob("*.safetensors")):
        original = file.read_bytes()
        for bit in torch.randint(len(original) * 8, (40,), generator=generator).tolist():
            changed = bytearray(original)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=file.name):
                load_checkpoint(path)
        file.write_bytes(original)
    load_checkpoint(path)


def test_a_mixed_checkpoint_is_refused(tmp_path: Path) -> None:
    old, new = save(tmp_path, 1, 2)
    shutil.copy(new / "weights.safetensors", old / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged"):
        load_checkpoint(old)
    old.rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match="is of step 1"):
        load_checkpoint(tmp_path / "step-00000009")


def share(rank: int, temporary: Path) -> dict[str, Any]:
    """What rank 0 or 1 saves of step 3: rows 0 to 4 or 5 to 7 of what is spread, and what the first alone has."""
    rows = slice(0, 5) if rank == 0 else slice(5, 8)
    spread = {"weights": tensors_of(3), "ema": tensors_of(1003)}
    parts = {kind: {name: tensor[rows].clone() for name, tensor in all_.items()} for kind, all_ in spread.items()}
    parts["optimizer"] = {"a.weight/step": torch.tensor(3.0)} if rank == 0 else {}
    places: dict[str, dict[str, tuple[int, ...]]] = {
        f"{kind}.safetensors": {name: (rows.start,) + (0,) * (tensor.ndim - 1) for name, tensor in tensors.items()}
        for kind, tensors in parts.items()
    }
    if rank == 0:
        places["optimizer.safetensors"] = {"a.weight/step": ()}
    return {**parts, "state": state_at(3), "spread": Spread(rank, 2, temporary, places, lambda: 0.1)}


KILLED_SAVERS = """
import itertools, os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import avlit.checkpoints, avlit.commit, avlit.spread_tensors
from tests.test_checkpoints import save, share
top = Path(sys.argv[1])

def run(saver, kill_at):
    calls = itertools.count(1)  # files are synced by threads
    def counted(function):
        def call(*arguments, **keywords):
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return call
    # what a process wrote outlives it without a sync
    os.fsync, os.rename = counted(lambda descriptor: None), counted(os.rename)
    for module in (avlit.checkpoints, avlit.spread_tensors):
        module.save_file = counted(module.save_file)
    try:
        saver()
    except avlit.commit.CheckpointError:
        os._exit(1)
    os._exit(0)

def saved(folder, kind):  # by one process, or by each of two
    if kind in ("new", "again"):
        return [lambda: save(folder, 3)]
    temporary = avlit.commit.begin(folder, 3)
    return [lambda rank=rank: avlit.checkpoints.save_share(folder, **share(rank, temporary)) for rank in (0, 1)]

for kind in ("new", "again", "rank 0", "rank 1"):
    save(top / "before" / kind, *((1, 2, 3) if kind == "again" else (1, 2)))
    for kill_at in range(1, 100):
        folder = top / kind / str(kill_at)
        shutil.copytree(top / "before" / kind, folder)
        killed, children = int(kind == "rank 1"), []
        for number, saver in enumerate(saved(folder, kind)):
            if not (child := os.fork()):
                run(saver, kill_at if number == killed else 0)
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if statuses[killed] == 0:
            break
    print(kill_at)
"""


def test_a_kill_of_any_rank_at_any_moment_of_a_save_leaves_the_last_good_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SAVERS, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    new, again, first, second = map(int, done.stdout.split())
    # three tensor files, four syncs of files, the manifest, folders and renames; the second rank seals nothing
    assert min(new, again, first) > 9 and second > 6
    for kind, moments in (("new", new), ("again", again), ("rank 0", first), ("rank 1", second)):
        for moment in range(1, moments + 1):
            folder = tmp_path / kind / str(moment)
            sweep(folder)
            assert not [path.name for path in folder.iterdir() if "." in path.name]
            checkpoint, skipped = newest_valid(folder)
            assert checkpoint is not None and not skipped
            is_undisturbed = moment == moments
            assert checkpoint.step == 3 or (kind != "again" and checkpoint.step == 2 and not is_undisturbed)
            assert checkpoint.step == 2 or kind != "rank 1" or is_undisturbed  # without its part there is no whole
            assert same(checkpoint.weights(), tensors_of(checkpoint.step))
            assert same(checkpoint.ema(), tensors_of(checkpoint.step + 1000))


def saved_by_two(folder: Path) -> Path:
    """Step 3, saved by two ranks one after the other."""
    temporary = begin(folder, 3)
    assert save_share(folder, **share(1, temporary)) is None
    path = save_share(folder, **share(0, temporary))
    assert path is not None
    return path


def test_what_ranks_saved_together_is_whole_for_us_and_for_torch(tmp_path: Path) -> None:
    path = saved_by_two(tmp_path)
    checkpoint = load_checkpoint(path)
    assert same(checkpoint.weights(), tensors_of(3)) and same(checkpoint.ema(), tensors_of(1003))
    assert checkpoint.has_ema and checkpoint.optimizer() == {"a.weight/step": torch.tensor(3.0)}
    assert same(checkpoint.averaged(), tensors_of(1003))
    (tmp_path / "weights").mkdir()
    for part in path.glob("weights.part-*"):
        shutil.copy(part, tmp_path / "weights")
    read: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(3).items()}
    load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path / "weights")), no_dist=True)
    assert same(read, tensors_of(3))


@pytest.mark.parametrize("damage", ["delete", "flip", "unlist"])
def test_a_checkpoint_with_a_part_amiss_is_refused(tmp_path: Path, damage: str) -> None:
    path = saved_by_two(tmp_path)
    part = path / "weights.part-00002-of-00002.safetensors"
    if damage == "delete":
        part.unlink()
    elif damage == "flip":
        part.write_bytes(part.read_bytes()[:-1] + b"\x7f")
    else:
        manifest = json.loads((path / "COMMIT.json").read_text())
        del manifest["files"][part.name]
        (path / "COMMIT.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"is missing|is damaged|does not list all parts of weights\."):
        load_checkpoint(path)


def test_parts_that_make_no_whole_are_refused(tmp_path: Path) -> None:
    names = [part_name("weights.safetensors", number, of=2) for number in (1, 2)]
    for name, place in zip(names, ((0, 0), (5, 0)), strict=True):  # rows 0 to 3 and 5 to 8
        save_part(tmp_path / name, {"w": torch.zeros(4, 2)}, {"w": place})
    with pytest.raises(ValueError, match=r"the parts of w make no whole: one begins at \[5, 0\], after 4 rows"):
        SpreadTensors([tmp_path / name for name in names])
    save_file({"w": torch.zeros(4, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not say where its parts begin"):
        SpreadTensors([tmp_path / "other.safetensors"])


def test_what_one_rank_cannot_write_is_told_to_the_first_and_nothing_is_committed(tmp_path: Path) -> None:
    temporary = begin(tmp_path, 3)
    broken = share(1, temporary)
    broken["weights"]["a.bias"][0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 3, weights\.part-00002-of-00002\.safetensors"):
        save_share(tmp_path, **broken)
    with pytest.raises(CheckpointError, match=r"rank 1 could not write its part: step 3, weights\.part-00002"):
        save_share(tmp_path, **share(0, temporary))
    assert list(tmp_path.iterdir()) == []


def test_retention_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5)
    removed = prune(tmp_path, keep=2, protect=lambda steps: [1, 7])

    assert sorted(path.name for path in removed) == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004", "step-00000005"]
    with pytest.raises(ValueError, match=r"checkpoint\.keep=0"):
        prune(tmp_path, keep=0)


def test_retention_asks_what_to_protect_among_whole_checkpoints_only(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3, 4, 5)
    (paths[1] / "state.json").unlink()  # the second
    weights = bytearray((paths[4] / "weights.safetensors").read_bytes())  # the newest
    weights[-1] ^= 1
    (paths[4] / "weights.safetensors").write_bytes(weights)
    asked: list[int] = []

    def protect(steps: list[int]) -> list[int]:
        asked.extend(steps)
        return [min(steps)]

    removed = prune(tmp_path, keep=1, protect=protect)
    assert asked == [4, 3, 1] and [path.name for path in removed] == ["step-00000003"]


def test_a_loss_that_is_not_finite_or_was_not_measured_is_never_the_best_and_hinders_no_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "_start_sender", Tracker._start_sender)  # put back after the test
    kill_fuzz.keep_in_spool()
    losses = {0: 9.0, 2: math.nan, 3: 5.0, 4: 7.0, 5: math.nan, 6: 6.0, 7: -math.inf}

    def measure(self: HeldoutLoss, trainer: pl.Trainer, module: AVModule) -> dict[str, float]:
        step = module.steps_done(trainer)
        return {"val/loss/video": losses[step]} if step in losses else {}

    monkeypatch.setattr(HeldoutLoss, "measure", measure)
    given = ("recipe=mtv_stage1", "sample.count=0", "sample.every=0", "validation.every=1", "checkpoint.keep=1")
    train(load_config(words(tmp_path, tmp_path / "cache", *given, "train.steps=2")))
    more = ("train.steps=7", "allow_change=true")
    assert resumed(tmp_path, "checkpoint.best=val/loss/video", *more) == 0

    checkpoint, skipped = newest_valid(only_run(tmp_path).checkpoints_dir)
    assert checkpoint is not None and not skipped
    assert {path.name for path in checkpoint.path.parent.iterdir()} == {"step-00000003", "step-00000007"}
    kept: Any = checkpoint.state.extra["heldout"]
    assert math.isnan(kept["2"]["val/loss/video"]) and kept["6"] == {"val/loss/video": 6.0}


def test_retention_never_removes_the_last_good_one(tmp_path: Path) -> None:
    _, middle, newest = save(tmp_path, 1, 2, 3)
    for path in (middle, newest):
        weights = bytearray((path / "weights.safetensors").read_bytes())
        weights[-1] ^= 1
        (path / "weights.safetensors").write_bytes(weights)
    prune(tmp_path, keep=1)

    checkpoint, skipped = newest_valid(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1 and len(skipped) == 2


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("part", ["save_file", "commit"])
def test_a_full_disk_is_named_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    save(tmp_path, 1)
    if part == "commit":
        monkeypatch.setattr(os, "fsync", no_space)
    else:
        monkeypatch.setattr(avlit.checkpoints, part, no_space)
    with pytest.raises(CheckpointError, match=r"step 2 .* the disk is full"):
        save(tmp_path, 2)
    monkeypatch.undo()

    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    load_checkpoint(step_dir(tmp_path, 1))


def test_a_full_disk_is_met_by_making_the_room_retention_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)
    real = avlit.checkpoints.save_file

    def only_two_fit(*arguments: object) -> None:
        if step_dir(tmp_path, 1).exists():
            no_space()
        real(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(avlit.checkpoints, "save_file", only_two_fit)
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(weights=tensors_of(3), state=state_at(3))
    writer.wait()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_folder_that_cannot_be_written_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "new", 1000)
    with pytest.raises(CheckpointError, match=r"GB free, checkpoints need 1000000000\.00 GB.*checkpoint\.keep"):
        check_writable(tmp_path, 10**18)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written there \(.*runs_dir="):
        check_writable(tmp_path / "file" / "checkpoints", 0)

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", read_only)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        check_writable(tmp_path, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["weights", "ema", "optimizer"])
def test_non_finite_values_are_never_committed(tmp_path: Path, part: str, value: float) -> None:
    save(tmp_path, 1)
    parts = {"weights": tensors_of(2), "ema": tensors_of(2), "optimizer": tensors_of(2)}
    parts[part]["a.bias"][3] = value
    with pytest.raises(NonFiniteError, match=rf"step 2, {part}\.safetensors: 1 tensors are not finite, e\.g\. a\.bias"):
        save_checkpoint(tmp_path, **parts, state=state_at(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_writer_saves_what_the_tensors_were_when_it_was_called(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    weights = tensors_of(0)
    writer.reserve(weights=weights)
    expected = {}
    for step in (1, 2, 3):
        weights["a.weight"] += 1
        expected[step] = {name: tensor.clone() for name, tensor in weights.items()}
        counters = {"skipped": float(step)}
        writer.save(weights=weights, state=state_at(step, counters=counters))
        weights["a.weight"].fill_(float(step))  # training goes on during the write
        counters["skipped"] = -1.0
    assert writer.wait() == step_dir(tmp_path, 3)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    for step in (2, 3):
        checkpoint = load_checkpoint(step_dir(tmp_path, step))
        assert same(checkpoint.weights(), expected[step])
        assert checkpoint.state.counters == {"skipped": float(step)}


def test_files_are_synced_while_the_next_are_written_and_all_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    first_is_syncing, second_is_written = threading.Event(), threading.Event()
    real = os.fsync

    def sync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if name == "first":
            first_is_syncing.set()
            assert second_is_written.wait(20)
        real(descriptor)
        order.append(name)

    def write_second(path: Path) -> None:
        assert first_is_syncing.wait(20)
        path.write_bytes(b"2")
        second_is_written.set()

    monkeypatch.setattr(os, "fsync", sync)
    avlit.commit.commit(tmp_path, 1, {"first": lambda path: path.write_bytes(b"1"), "second": write_second})
    assert sorted(order[:2]) == ["first", "second"] and order[2] == "COMMIT.json"


class WatchedRoom(pl.Callback):
    """Where a writer's copies lie at the start of training and after the first save."""

    def __init__(self, writer: CheckpointWriter):
        self.writer = writer
        self.at_start: dict[str, int] = {}

    def places(self) -> dict[str, int]:
        return {f"{part}: {name}": id(t) for part, room in self.writer._copies.items() for name, t in room.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_start = self.places()


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_first_save_of_a_run_takes_no_memory_of_its_own(tmp_path: Path, is_resumed: bool) -> None:
    module, ema, writer = Poisoned(steps=2), EMA(decay=0.9), CheckpointWriter(tmp_path / "checkpoints", keep=1)
    if is_resumed:  # what a resume restores is there before the first step
        parameters = module.trained_parameters
        restored = {f"{name}/exp_avg": torch.zeros_like(p) for name, p in parameters.items()}
        restored |= {f"{name}/exp_avg_sq": torch.zeros_like(p) for name, p in parameters.items()}
        restored |= {f"{name}/step": torch.ones(()) for name in parameters}
        configure = module.configure_optimizers

        def resumed() -> dict[str, Any]:
            found = configure()
            restore_optimizer(found["optimizer"], parameters, restored, {"groups": [list(parameters)]})
            return found

        module.configure_optimizers = resumed
    watch = WatchedRoom(writer)
    fit(module, tmp_path, ema, Checkpointing(writer, every=1, ema=ema, state=state_at, num_kept=1), watch)
    assert watch.at_start == watch.places() and len(watch.at_start) == 5 * len(module.trained_parameters)
    assert any(name.startswith("optimizer.safetensors") for name in watch.at_start)


def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(weights={"w": torch.tensor([float("nan")])}, state=state_at(1))
    with pytest.raises(NonFiniteError, match="step 1"):
        writer.save(weights=tensors_of(2), state=state_at(2))
    writer.save(weights=tensors_of(2), state=state_at(2))
    assert writer.wait() == step_dir(tmp_path, 2)


def test_an_error_of_any_kind_in_the_background_is_raised(tmp_path: Path) -> None:
    def protect(steps: list[int]) -> list[int]:
        raise KeyError("val/loss/video")

    writer = CheckpointWriter(tmp_path, keep=2, protect=protect)
    writer.save(weights=tensors_of(1), state=state_at(1))
    with pytest.raises(KeyError, match="val/loss/video"):
        writer.wait()


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> list[Tensor]:
    for step in steps:
        model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))


def adamw(model: nn.Module, *, fused: bool) -> torch.optim.AdamW:
    groups = [
        {"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(model.children(), (1e-2, 3e-3), strict=True)
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.97), fused=fused)


@pytest.mark.parametrize("fused", [True, False])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    model = network()
    optimizer = adamw(model, fused=fused)
    trained(optimizer, model, range(3))
    tensors, meta = flatten_optimizer(optimizer, dict(model.named_parameters()))
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    path = save_checkpoint(tmp_path, weights=weights, optimizer=tensors, state=state_at(3, optimizer=meta))
    expected = trained(optimizer, model, range(3, 8))

    checkpoint, fresh = load_checkpoint(path), network()
    resumed = adamw(fresh, fused=fused)
    load_weights_into(fresh, checkpoint)
    restore_optimizer(resumed, dict(fresh.named_parameters()), checkpoint.optimizer(), checkpoint.state.optimizer)

    assert all(torch.equal(a, b) for a, b in zip(trained(resumed, fresh, range(3, 8)), expected, strict=True))
    assert resumed.param_groups[0]["betas"] == (0.9, 0.97)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    model = network()
    optimizer = adamw(model, fused=True)
    trained(optimizer, model, range(1))
    names = dict(model.named_parameters())
    tensors, meta = flatten_optimizer(optimizer, names)
    with pytest.raises(
        CheckpointError, match=r"2 groups of 4 there, 1 of 2 here, first that differ: 1\.bias, 1\.weight"
    ):
        restore_optimizer(torch.optim.AdamW(model[0].parameters()), names, tensors, meta)
    tensors["0.weight/exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"0\.weight/exp_avg of \[2, 2\], its parameter is \[5, 6\]"):
        restore_optimizer(optimizer, names, tensors, meta)


def test_weights_of_a_run_are_inherited_and_what_is_new_is_reported(tmp_path: Path) -> None:
    run, model = create_run(tmp_path, "mtv_stage1"), network()
    weights = {"0.weight": torch.ones(5, 6), "0.bias": torch.zeros(5), "1.bias": torch.ones(6)}
    save(run.checkpoints_dir, 1)
    path = save_checkpoint(
        run.checkpoints_dir, weights=weights, ema={"0.bias": torch.full((5,), 7.0)}, state=state_at(2)
    )
    for init in ("last", run.id, run.path, run.checkpoints_dir, path):
        assert resolve_weights(init, runs_dir=tmp_path).path == path

    report = load_weights_into(model, resolve_weights("last", runs_dir=tmp_path), ema=True)
    assert (report.inherited, report.new, report.unused) == (("0.weight", "0.bias", "1.bias"), ("1.weight",), ())
    assert model.get_parameter("0.bias").tolist() == [7.0] * 5
    assert "3 inherited, 1 new (e.g. 1.weight)" in str(report)


def test_weights_of_another_model_shape_or_base_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (other,) = save(tmp_path / "other", 1)
    with pytest.raises(
        CheckpointError, match=rf"init={other}: it is of another model: 2 of its 2 .* a\.bias, a\.weight"
    ):
        load_weights_into(model, load_checkpoint(other))
    wide = {"0.weight": torch.zeros(5, 6), "0.bias": torch.zeros(9)}
    path = save_checkpoint(tmp_path / "wide", weights=wide, state=state_at(1, base_model="f00d"))
    with pytest.raises(CheckpointError, match=r"another shape: 0\.bias \[9\] there, \[5\] here"):
        load_weights_into(model, load_checkpoint(path))
    with pytest.raises(CheckpointError, match="base weights f00d, this run has beef"):
        load_weights_into(model, load_checkpoint(path), base_model="beef")
    assert same(dict(model.state_dict()), before)


def test_a_run_without_a_usable_checkpoint_says_why(tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    with pytest.raises(CheckpointError, match="it has saved none yet"):
        resolve_weights("last", runs_dir=tmp_path)
    (path,) = save(run.checkpoints_dir, 1)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000001: state\.json is missing"):
        resolve_weights("last", runs_dir=tmp_path)


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_sums_for_the_log_may_hold_the_loss_of_an_update_that_was_left_out(tmp_path: Path) -> None:
    state = state_at(1, extra={"log": {"sums": {"video": {"": [float("nan"), 4.0]}}}})
    kept: Any = load_checkpoint(save_checkpoint(tmp_path, weights=tensors_of(1), state=state)).state.extra
    total, count = kept["log"]["sums"]["video"][""]
    assert math.isnan(total) and count == 4.0


def reseal(path: Path) -> None:
    """Make a manifest that agrees with the folder, as an attacker would."""
    (path / "COMMIT.json").unlink()
    avlit.commit._seal(path, 1, {file.name: avlit.commit._entry(file) for file in sorted(path.iterdir())})


def test_a_pickle_in_place_of_tensors_or_state_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Canary(canary))
    pickle.loads(payload)
    assert canary.exists()  # it does bite
    canary.unlink()
    for name in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
        (path,) = save(tmp_path / name, 1)
        (path / name).write_bytes(payload)
        reseal(path)
        with pytest.raises(CheckpointError, match=name):
            checkpoint = load_checkpoint(path)
            for read in (checkpoint.weights, checkpoint.ema, checkpoint.optimizer):
                read()
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "model.ckpt", "sub/weights.safetensors", ".hidden"])
def test_a_manifest_cannot_name_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    (path,) = save(tmp_path / "checkpoints", 1)
    manifest = json.loads((path / "COMMIT.json").read_text())
    manifest["files"][name] = {"size": 1, "digest": "00"}
    (path / "COMMIT.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"COMMIT\.json lists"):
        load_checkpoint(path)


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1, 2)
    (second / "weights.safetensors").unlink()
    (second / "weights.safetensors").symlink_to(first / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is not a plain file"):
        load_checkpoint(second)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": 3}', "[" * 100_000, '{"algorithm": "sha1", "step": 1, "files": {}}']
)
def test_a_senseless_manifest_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (path,) = save(tmp_path, 1)
    (path / "COMMIT.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step-00000001: COMMIT\.json"):
        load_checkpoint(path)
