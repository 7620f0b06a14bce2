"""Faults under training: damaged shards, workers that die or hang, storage that does not answer."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from avlit.batch import AVBatch
from data.account import ALWAYS_ALLOWED, merged
from data.batches import Contents
from data.datamodule import AVDataModule
from data.manifest import read_manifest, seal
from data.shard_index import Member, checksum, index_path, parse_index
from data.shards import Annotation, EncodedSample, ShardError, ShardWriter

IDENTITY = {"fps": 12.0, "rate_hz": 8000, "video_codec": "noise", "track_encoder": "noise"}
TAR = "faces-train-000001.tar"
STEPS = 20  # a pass of 48 clips and much of the next


def make_sample(subset: str, index: int) -> EncodedSample:
    rng = np.random.default_rng(index)
    annotation = Annotation(f"{subset} {index}", "", subset, fps=12.0, rate_hz=8000, num_frames=5, height=16, width=16)
    speech, effects, music = (rng.standard_normal((5, 2, 3), np.float32) for _ in range(3))
    latents, text = rng.standard_normal((4, 2, 2, 2), np.float32), rng.standard_normal((3, 6), np.float32)
    return EncodedSample(
        f"{subset}-{index:04d}",
        annotation,
        {"caption": text},
        latents,
        None,
        speech,
        effects,
        music,
        waveform=np.zeros(3333),
    )


def write_set(root: Path) -> Path:
    with ShardWriter(root, IDENTITY, samples_per_shard=8) as writer:
        for subset in ("faces", "sounds"):
            for index in range(24):
                writer.add(subset, "train", make_sample(subset, index))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


@pytest.fixture
def whole(tmp_path: Path) -> list[AVBatch]:
    """The batches of a run without faults."""
    return list(module(write_set(tmp_path / "whole")).train_dataloader())


def module(root: Path, **options) -> AVDataModule:
    return AVDataModule(root, **{"batch_size": 4, "contents": Contents(3), "seed": 3, "steps": STEPS, **options})


def keys(batches: list[AVBatch]) -> list[tuple]:
    return [(batch.step, batch.slots, batch.keys) for batch in batches]


def assert_same(found: list[AVBatch], expected: list[AVBatch]) -> None:
    assert keys(found) == keys(expected)
    for one, two in zip(found, expected, strict=True):
        for name in ("video_latents", "text"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        for name in ("speech", "effects", "music"):
            assert torch.equal(getattr(one.tracks, name), getattr(two.tracks, name))


# Damaged shards


def cut(tar: Path, at: int) -> None:
    os.truncate(tar, at)


def flip(tar: Path, at: int) -> None:
    data = bytearray(tar.read_bytes())
    data[at] ^= 0x10
    tar.write_bytes(data)


def reseal(tar: Path, change: Callable[[dict], None]) -> None:
    """Changes the index as a writer would that knows no better: all checksums and digests fit."""
    index, data = json.loads(index_path(tar).read_bytes()), tar.read_bytes()
    change(index)
    for sample in index["samples"]:
        for place in sample["members"].values():
            place[3] = checksum(data[place[0] : place[1] + place[2]])
    index_path(tar).write_bytes(json.dumps(index).encode())
    manifest = read_manifest(tar.parent)
    shards = [
        seal(s, size=s.size, index=index_path(tar).read_bytes()) if s.name == tar.stem else s for s in manifest.shards
    ]
    replace(manifest, shards=tuple(shards)).write(tar.parent)


def put_nan(tar: Path, place: Member) -> None:
    data = bytearray(tar.read_bytes())
    data[place.end - 2 : place.end] = np.float16("nan").tobytes()
    tar.write_bytes(data)
    reseal(tar, lambda index: None)


def drop_field(tar: Path, place: Member) -> None:
    data = tar.read_bytes()
    member = data[place.offset : place.end]
    tar.write_bytes(data.replace(member, member.replace(b'"music"', b'"musik"')))
    reseal(tar, lambda index: None)


def drop_member(tar: Path) -> None:
    reseal(tar, lambda index: index["samples"][3]["members"].pop("safetensors"))


# kind -> (what is done to the shard, given the place of sample 3's tensors; which samples it takes; the reason named)
KINDS: dict[str, tuple[Callable[[Path, Member], object], range, str]] = {
    "cut in the middle": (lambda tar, p: cut(tar, p.offset + 9), range(3, 8), "the shard ends before the sample"),
    "cut at a member's end": (lambda tar, p: cut(tar, p.start), range(3, 8), "the shard ends before the sample"),
    "payload flipped": (lambda tar, p: flip(tar, p.offset + 300), range(3, 4), "the bytes differ from their checksum"),
    "header flipped": (lambda tar, p: flip(tar, p.start + 10), range(3, 4), "the bytes differ from their checksum"),
    "empty file": (lambda tar, p: tar.write_bytes(b""), range(8), "the shard ends before the sample"),
    "HTML": (lambda tar, p: tar.write_text("<html>404 not found</html>"), range(8), "the shard ends before the sample"),
    "field missing": (drop_field, range(3, 4), "field 'musik' is unknown"),
    "member missing": (lambda tar, p: drop_member(tar), range(3, 4), "member faces-0011.safetensors is missing"),
    "NaN": (put_nan, range(3, 4), "video_latents holds values that are not finite"),
    "shard missing": (lambda tar, p: tar.unlink(), range(8), f"{TAR} is missing"),
    "index missing": (lambda tar, p: index_path(tar).unlink(), range(8), f"{TAR}.index.json is missing"),
    "index changed": (lambda tar, p: flip(index_path(tar), 99), range(8), "the index is not the one in the manifest"),
}


def damage(root: Path, kind: str, tar: str = TAR) -> set[str]:
    """Damages a shard and gives the keys of the samples that are lost."""
    path, (work, lost, _) = root / tar, KINDS[kind]
    samples = parse_index(index_path(path).read_bytes()).samples
    work(path, samples[3].members["safetensors"])
    return {samples[index].key for index in lost}


def substitutes(data: AVDataModule, lost: set[str]) -> list[tuple[str, ...]]:
    """What every batch must hold: the order's samples, each lost one replaced by the next position's."""
    reader, expected = data.reader(), []
    names = {
        (number, index): f"{shard.subset}-{8 * int(shard.name[-6:]) + index:04d}"
        for number, shard in data.shards.select("train")
        for index in range(shard.samples)
    }
    for step in range(STEPS):
        refs = reader.order.batch(step)
        for slot, ref in enumerate(refs):
            while names[ref.shard, ref.index] in lost:
                ref = refs[slot] = reader.order.after(ref)
        expected.append(tuple(names[ref.shard, ref.index] for ref in refs))
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_replaced_by_the_next_position_also_after_a_resume(
    root: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    lost = damage(root, kind)
    data = module(root, max_bad=0.9)
    found = list(data.train_dataloader())
    assert [batch.keys for batch in found] == substitutes(data, lost)
    account = data.state()
    assert account["damaged"] and data.damaged_count == account["replaced"] >= len(account["damaged"])
    for shard, key, why in account["damaged"]:
        assert shard == TAR and KINDS[kind][2] in why and (key in lost or key == "(all)")
        assert any(shard in line and key in line and why in line for line in caplog.messages)
    for batch in found:
        assert batch.video_latents is not None and batch.tracks is not None
        assert torch.isfinite(batch.video_latents).all() and torch.isfinite(batch.tracks.music).all()

    before, after = module(root, max_bad=0.9), None
    for batch in before.train_dataloader():
        if batch.step == 5:
            after = module(root, max_bad=0.9, start_step=6, counted=[json.loads(json.dumps(before.state()))])
            break
    assert after is not None
    assert_same(list(after.train_dataloader()), found[6:])
    assert after.state() == account
    with pytest.raises(ShardError, match=rf"(?s)data\.max_bad=0 allows fewer.*{TAR}"):
        list(module(root, max_bad=0).train_dataloader())


def test_worker_processes_replace_and_count_as_a_thread_does(root: Path) -> None:
    kinds = ("cut in the middle", "header flipped", "NaN", "shard missing")
    tars = (TAR, "faces-train-000002.tar", "sounds-train-000000.tar", "sounds-train-000002.tar")
    for kind, tar in zip(kinds, tars, strict=True):
        damage(root, kind, tar)
    thread, processes = module(root, max_bad=0.9), module(root, max_bad=0.9, workers=2)
    assert_same(list(processes.train_dataloader()), list(thread.train_dataloader()))
    assert processes.state() == thread.state() and {place[0] for place in thread.state()["damaged"]} == set(tars)


def stop_of(data: AVDataModule) -> tuple[str, list[AVBatch]]:
    seen = []
    with pytest.raises(ShardError) as caught:
        for batch in data.train_dataloader():
            seen.append(batch)
    return str(caught.value), seen


def test_a_resumed_run_stops_for_damage_where_the_uninterrupted_one_does(root: Path) -> None:
    damage(root, "empty file")
    message, seen = stop_of(module(root, steps=100))
    assert len(seen) > 4 and f"by step {len(seen)}" in message
    for start in (1, 4, len(seen)):
        before, states = module(root, steps=100), []
        for batch in before.train_dataloader():
            states.append(before.state())
            if batch.step == start - 1:
                break
        resumed = module(root, steps=100, start_step=start, counted=[states[-1]])
        assert stop_of(resumed)[0] == message
        assert resumed.damaged_count <= ALWAYS_ALLOWED  # the batch that was not handed out is not in the account
    forgetful, _ = stop_of(module(root, steps=100, start_step=len(seen)))
    assert forgetful != message


def test_the_account_is_of_what_was_handed_out_and_not_of_what_was_read_ahead(root: Path) -> None:
    damage(root, "empty file")
    data = module(root, max_bad=0.9, prefetch=8)
    batches = iter(data.train_dataloader())
    for number in range(1, 4):
        next(batches)
        time.sleep(0.1)  # enough to read ahead, and nothing fails if it is not
        assert data.state()["samples"] == 4 * number


def test_accounts_of_several_processes_are_merged_to_one(root: Path) -> None:
    damage(root, "empty file")
    states = []
    for rank in range(2):
        data = module(root, max_bad=0.9)
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": 2})()  # type: ignore[assignment]
        list(data.train_dataloader())
        states.append(data.state())
    one = module(root, max_bad=0.9)
    list(one.train_dataloader())
    both = merged(states)
    assert (both["samples"], both["replaced"]) == (one.state()["samples"], one.damaged_count)
    assert sorted(both["damaged"]) == sorted(one.state()["damaged"])
    with pytest.raises(ValueError, match="an account of damage lacks or mistypes 'replaced'"):
        module(root, counted=[{"samples": 3}])


# Workers and storage that fail


class _OnRestart(logging.Handler):
    """Calls back, with the message, when the reading processes are about to be started again."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__()
        self.call, self.messages = call, []

    def emit(self, record: logging.LogRecord) -> None:
        if "are started again" in record.getMessage():
            self.messages.append(record.getMessage())
            self.call()


@pytest.fixture
def on_restart() -> Iterator[Callable[[Callable[[], None]], _OnRestart]]:
    log, handlers = logging.getLogger("data.worker_pool"), []

    def register(call: Callable[[], None]) -> _OnRestart:
        handlers.append(_OnRestart(call))
        log.addHandler(handlers[-1])
        return handlers[-1]

    yield register
    for handler in handlers:
        log.removeHandler(handler)


def is_gone(pid: int) -> bool:
    """Waits for a process to end; one that nobody has asked for its exit code yet has ended."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def hang(tar: Path) -> Path:
    """Puts a pipe that nobody writes in the place of a shard: to open it takes for ever, as on a dead network disk."""
    kept = tar.rename(tar.with_suffix(".kept"))
    os.mkfifo(tar)
    return kept


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops_is_replaced_and_the_batches_stay_the_same(
    root: Path, whole: list[AVBatch], sent: signal.Signals, on_restart
) -> None:
    before = set(active_children())
    batches = iter(module(root, workers=2, timeout_s=2.0).train_dataloader())
    found, restarts = [next(batches)], on_restart(lambda: None)
    workers = [process.pid or 0 for process in set(active_children()) - before]
    for pid in workers:
        os.kill(pid, sent)
    found += list(batches)
    assert_same(found, whole)
    what = "a reading process died" if sent == signal.SIGKILL else "not read within 2 s"
    assert restarts.messages[0].startswith("micro-batch 0 of step ") and what in restarts.messages[0]
    assert "(1 of data.max_restarts=3)" in restarts.messages[0]
    assert len(workers) == 2 and all(is_gone(pid) for pid in workers)


def test_a_worker_that_hangs_on_the_storage_goes_on_when_it_answers_again(
    root: Path, whole: list[AVBatch], on_restart
) -> None:
    kept = hang(root / TAR)
    restarts = on_restart(lambda: kept.rename(root / TAR))
    assert_same(list(module(root, workers=1, timeout_s=1.0).train_dataloader()), whole)
    assert len(restarts.messages) == 1 and TAR in restarts.messages[0] and "not read within 1 s" in restarts.messages[0]


def test_workers_that_keep_dying_at_one_place_end_in_an_error_there(root: Path, whole: list[AVBatch]) -> None:
    hang(root / TAR)  # every worker that comes to this shard is killed for it
    lost = {f"faces-{index:04d}" for index in range(8, 16)}
    first = next(step for step, batch in enumerate(whole) if lost & set(batch.keys))
    before, found = set(active_children()), []
    with pytest.raises(
        ShardError,
        match=rf"step {first} from .*{TAR}.*not read within 0\.5 s.*started again 1 times before "
        rf"\(data\.max_restarts=1\).*data\.workers=1.*data\.timeout_s=0\.5.*can then be resumed",
    ):
        for batch in module(root, workers=1, timeout_s=0.5, max_restarts=1).train_dataloader():
            found.append(batch)
    assert_same(found, whole[:first])
    assert all(is_gone(process.pid or 0) for process in set(active_children()) - before)


def test_an_error_in_a_worker_keeps_its_kind_and_message(root: Path) -> None:
    with pytest.raises(ValueError, match=r"its text is \[3, 6\], the batch's \[2, 6\]"):
        list(module(root, workers=1, contents=Contents(2)).train_dataloader())


_RUN = """
import os, sys
from multiprocessing import active_children
from data.batches import BatchReader, Contents, ReaderSettings
from data.loader import TrainLoader
from data.shards import ShardError, ShardSet
root, workers, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
reader = BatchReader(ReaderSettings((root,), (("faces", 1.0),), 4, Contents(3), seed=0), ShardSet.open(root))
limit_s = 1.0 if what == "hang" else 60.0
try:
    for batch in TrainLoader(reader, steps=12, workers=workers, timeout_s=limit_s, max_restarts=0):
        print(batch.step, *[process.pid for process in active_children()], flush=True)
        if what == "kill":
            os.kill(os.getpid(), 9)
except ShardError as error:
    print(error)
"""


def run(root: Path, *, workers: int, what: str) -> tuple[int, list[str]]:
    """A training process that reads `root`, started and ended by itself: its exit code and lines."""
    command = [sys.executable, "-c", _RUN, str(root), str(workers), what]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_read_that_hangs_is_named_and_does_not_keep_the_process_from_ending(root: Path, workers: int) -> None:
    hang(root / TAR)
    code, (*steps, message) = run(root, workers=workers, what="hang")
    assert code == 0 and f"step {len(steps)} from " in message and TAR in message
    assert "not read within 1 s" in message and "data.timeout_s=1" in message
    assert "can then be resumed" in message


def test_workers_end_with_a_training_process_that_is_killed(root: Path) -> None:
    code, (line,) = run(root, workers=2, what="kill")
    _, *workers = map(int, line.split())
    assert code == -9 and workers and all(is_gone(pid) for pid in workers)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_to_all_processes_of_a_run_is_left_to_the_training_process(
    root: Path, whole: list[AVBatch], name: str, on_restart
) -> None:
    before = set(active_children())
    batches = iter(module(root, workers=1).train_dataloader())
    found, restarts = [next(batches)], on_restart(lambda: None)
    for process in set(active_children()) - before:
        os.kill(process.pid or 0, getattr(signal, name))
    found += list(batches)
    assert_same(found, whole)
    assert not restarts.messages


def test_impossible_limits_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.timeout_s=0"):
        module(root, timeout_s=0)
    with pytest.raises(ValueError, match=r"data\.max_restarts=-1"):
        module(root, max_restarts=-1)
