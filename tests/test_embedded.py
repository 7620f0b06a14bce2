"""The embedded shard set: deterministic, written once however many ask, waited for, taken over after a crash."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batches import Contents
from data.corpus import CorpusSettings, make_clip
from data.datamodule import AVDataModule
from data.embedded import EmbeddedSet, ensure_embedded, missing, write_missing
from data.encode import Encoders
from data.live_writer import WriterLock, is_written
from data.manifest import read_manifest
from data.shards import ShardError, ShardSet

SETTINGS = CorpusSettings(fps=8.0, num_frames=9, height=32, width=32, rate_hz=8000)
SET = EmbeddedSet(SETTINGS, num_clips=40, heldout_clips=3)


class _Video:
    identity, channels, temporal_factor, spatial_factor = "averages", 3, 4, 8

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return video[:, :, ::4, ::8, ::8]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class _Tracks:
    identity, layers, dim, rate_hz = "peaks", 1, 1, 8000

    def encode(self, waveform: torch.Tensor, *, num_frames: int) -> torch.Tensor:
        return waveform[: len(waveform) // num_frames * num_frames].reshape(num_frames, 1, -1).amax(-1, keepdim=True)


class _Text:
    identity, dim, max_tokens = "letters", 1, 400

    def encode(self, text: str) -> torch.Tensor:
        return torch.tensor([[float(ord(letter))] for letter in text])


ENCODERS = Encoders(_Text(), video=_Video(), tracks=_Tracks())


def write(root: Path, *subsets: str) -> Path:
    root.mkdir(exist_ok=True)
    for subset in subsets:
        (root / f"wanted-{subset}").touch()
    lock = WriterLock.acquire(root)
    assert lock is not None
    write_missing(root, SET, ENCODERS, lock)
    return root


def test_the_set_holds_the_corpus_with_heldout_clips_of_its_own(tmp_path: Path) -> None:
    shards = ShardSet.open(write(tmp_path, "basic_face"), ENCODERS.identity(fps=8, rate_hz=8000))
    read = {}
    for number, shard in enumerate(shards.shards):
        for index in range(shard.samples if shard.subset == "basic_face" else 0):
            sample = shards.read(number, index, sound=True)
            read.setdefault(shard.split, []).append(sample)
    assert {split: len(samples) for split, samples in read.items()} == {"train": 40, "heldout": 3}
    keys = [sample.key for samples in read.values() for sample in samples]
    assert len(set(keys)) == 43
    clip = make_clip("basic_face", 39, SETTINGS, 0)
    sample = read["train"][39]
    assert (sample.key, sample.annotation.caption) == (clip.key, clip.caption)
    np.testing.assert_allclose(sample.waveform, clip.mix, atol=1 / 32768)
    assert sample.annotation.truth["prompt"] == clip.truth["prompt"]


def test_the_set_is_the_same_whoever_wrote_it_in_whatever_order(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "visual_mood", "basic_face")
    two = write(write(tmp_path / "two", "basic_face"), "visual_mood")
    tars = {path.name: path.read_bytes() for path in one.glob("*-*")}
    assert tars == {path.name: path.read_bytes() for path in two.glob("*-*")} and len(tars) == 2 + 2 * 6
    faces_only = write(tmp_path / "three", "basic_face")
    assert len({ShardSet.open(root).manifest_hash for root in (one, two, faces_only)}) == 1


def test_other_settings_or_clips_are_another_set() -> None:
    names = {SET.name, EmbeddedSet(SETTINGS, 41, 3).name, EmbeddedSet(SETTINGS, 40, 3, seed=1).name}
    assert len(names | {EmbeddedSet(CorpusSettings(fps=12.0), 40, 3).name}) == 4
    assert EmbeddedSet(SETTINGS, 40, 3).name == SET.name


def test_what_a_run_reads_first_is_written_first(tmp_path: Path) -> None:
    for subset in ("sound_event", "basic_face"):
        (tmp_path / f"wanted-{subset}").touch()
    names = [shard.name for shard in missing(tmp_path, SET.plan(ENCODERS))]
    assert names == [
        "basic_face-heldout-000000",
        "sound_event-heldout-000000",
        "basic_face-train-000000",
        "sound_event-train-000000",
        "basic_face-train-000001",
        "sound_event-train-000001",
    ]


def test_a_crashed_writers_leftovers_are_taken_over(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", "basic_face")
    torn = write(tmp_path / "torn", "basic_face")
    (torn / "basic_face-train-000000.tar").unlink()  # its index is there already
    (torn / ".basic_face-train-000001.4711.tmp").write_bytes(b"half a shard")
    write(torn, "basic_face")
    assert not list(torn.glob(".*.tmp"))
    assert {p.name: p.read_bytes() for p in torn.glob("*.tar")} == {p.name: p.read_bytes() for p in whole.glob("*.tar")}


def test_a_subset_asked_for_while_the_writer_ends_is_not_forgotten(tmp_path: Path) -> None:
    class LateText(_Text):
        def encode(self, text: str) -> torch.Tensor:
            (tmp_path / "wanted-sound_event").touch()
            return super().encode(text)

    (tmp_path / "wanted-basic_face").touch()
    lock = WriterLock.acquire(tmp_path)
    assert lock is not None
    write_missing(tmp_path, SET, Encoders(LateText(), video=_Video(), tracks=_Tracks()), lock)
    assert not missing(tmp_path, read_manifest(tmp_path)) and len(list(tmp_path.glob("sound_event-*.tar"))) == 3


def test_unknown_subsets_and_impossible_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.subsets\.faces: the embedded corpus has basic_face"):
        ensure_embedded(tmp_path, settings=SETTINGS, subsets=["faces"], num_clips=4)
    with pytest.raises(ValueError, match=r"data\.num_clips=0"):
        ensure_embedded(tmp_path, settings=SETTINGS, subsets=["basic_face"], num_clips=0)


def test_starting_the_writer_imports_no_torch() -> None:
    code = "import sys, data.embedded; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def ensure(cache: Path) -> Path:
    return ensure_embedded(cache, settings=SETTINGS, subsets=["single_character"], num_clips=70, heldout_clips=2)


def test_training_reads_while_one_background_process_writes(tmp_path: Path) -> None:
    root = ensure(tmp_path)
    assert is_written(root)
    log = root / "writer.log"
    started = log.stat().st_ino, log.stat().st_mtime_ns
    assert ensure(tmp_path) == root  # a second run at the same time
    data = AVDataModule(root, batch_size=8, contents=Contents(512), seed=0, subsets={"single_character": 1.0}, steps=9)
    assert len(data.heldout_samples(2)) == 2
    keys = [key for batch in data.train_dataloader() for key in batch.keys]
    assert (log.stat().st_ino, log.stat().st_mtime_ns) == started, log.read_text()
    assert set(keys) == {f"single_character-0000-{index:07d}" for index in range(70)}
    assert set(keys[:32]) == {f"single_character-0000-{index:07d}" for index in range(32)}
    deadline = time.monotonic() + 10
    while is_written(root) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_written(root)
    assert ensure(tmp_path) == root and not is_written(root)


def test_a_writer_that_fails_is_reported_with_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data.embedded

    (tmp_path / "data").mkdir()  # found before the real package, which an editable install makes importable anywhere
    (tmp_path / "data" / "__init__.py").write_text("import no_such_module")
    monkeypatch.setattr(data.embedded, "_REPOSITORY", tmp_path)
    root = ensure(tmp_path / "cache")
    with pytest.raises(ShardError, match=r"(?s)nothing is writing.*No module named.*Start the command again"):
        ShardSet.open(root)
