"""Shard sets: what is written comes back, what is damaged is named, what is foreign never runs."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.live_writer import WriterLock, is_written
from data.manifest import Manifest, Shard
from data.shard_index import checksum, index_path, index_tar
from data.shards import Annotation, DamagedSample, EncodedSample, ShardError, ShardSet, ShardWriter

IDENTITY = {"fps": 12.0, "rate_hz": 8000, "video_codec": "embedded", "text_encoder": "words"}


def make_sample(index: int, *, subset: str = "basic_face", second: bool = False, num_frames: int = 9) -> EncodedSample:
    rng = np.random.default_rng(index)
    annotation = Annotation(
        caption=f"Person1 is speaking. {index}",
        transcript="ba bi",
        subset=subset,
        fps=12.0,
        rate_hz=8000,
        num_frames=num_frames,
        height=16,
        width=16,
        mouth_boxes=[[(1.0, 2.0, 3.0, 4.5)]] * num_frames,
        truth={"index": index},
        source=f"test {index}",
    )
    track = (num_frames, 2, 3)
    return EncodedSample(
        key=f"{subset}-{index:04d}",
        annotation=annotation,
        video_latents=rng.standard_normal((4, 3, 2, 2), np.float32),
        text=rng.standard_normal((1 + index % 5, 6), np.float32),
        speech=rng.standard_normal(track, np.float32),
        effects=rng.standard_normal(track, np.float32),
        music=rng.standard_normal(track, np.float32),
        speech_second=rng.standard_normal(track, np.float32) if second else None,
        waveform=(0.1 * rng.standard_normal(6000)).astype(np.float32),
    )


def write_set(root: Path, *, num_samples: int = 12, samples_per_shard: int = 6) -> Path:
    with ShardWriter(root, IDENTITY, samples_per_shard=samples_per_shard) as writer:
        for index in range(num_samples):
            writer.add("basic_face", "train", make_sample(index, second=index % 2 == 1))
    return root


def damages(root: Path, *, sound: bool = False) -> dict[str, str]:
    shards, found = ShardSet.open(root), {}
    for number, shard in enumerate(shards.shards):
        for index in range(shard.samples):
            try:
                shards.read(number, index, sound=sound)
            except DamagedSample as damage:
                assert damage.shard == f"{shard.name}.tar"
                found[f"{damage.key}/{number}.{index}"] = damage.reason
    return found


def first_tar(root: Path) -> Path:
    return root / "basic_face-train-000000.tar"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    shards = ShardSet.open(write_set(tmp_path), {"video_codec": "embedded"})
    assert [(s.name, s.samples, s.shape) for s in shards.shards] == [
        ("basic_face-train-000000", 6, "9x16x16"),
        ("basic_face-train-000001", 6, "9x16x16"),
    ]
    for number, index, expected in ((0, 0, make_sample(0)), (1, 5, make_sample(11, second=True))):
        read = shards.read(number, index, sound=True)
        assert (read.key, read.annotation.caption) == (expected.key, expected.annotation.caption)
        assert read.annotation.truth == expected.annotation.truth
        assert read.arrays.keys() == expected.arrays.keys()
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(read.arrays[name], array.astype(np.float16))
        assert read.waveform is not None and expected.waveform is not None
        np.testing.assert_allclose(read.waveform, expected.waveform, atol=1 / 32768)
        assert shards.read(number, index).waveform is None


def test_shards_have_the_webdataset_layout(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    write_set(tmp_path)
    dataset = WebDataset(str(first_tar(tmp_path)), shardshuffle=False)
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == [f"basic_face-{index:04d}" for index in range(6)]
    assert {"json", "safetensors", "flac"} <= samples[0].keys()


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "one"), write_set(tmp_path / "two")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    assert ShardSet.open(one).manifest_hash == ShardSet.open(two).manifest_hash


def test_a_set_of_other_settings_is_refused_with_both_values(tmp_path: Path) -> None:
    write_set(tmp_path)
    with pytest.raises(ShardError, match=r"(?s)fps.*12\.0.*24.*video_codec.*'embedded'.*'cogvideox'") as caught:
        ShardSet.open(tmp_path, {"video_codec": "cogvideox", "fps": 24.0, "rate_hz": 8000})
    assert "rate_hz" not in str(caught.value)
    with pytest.raises(ShardError, match="track_encoder"):
        ShardSet.open(tmp_path, {"track_encoder": "wav2vec2"})


def test_appending_continues_a_set_and_refuses_another_identity(tmp_path: Path) -> None:
    write_set(tmp_path, num_samples=4)
    before = first_tar(tmp_path).read_bytes()
    with pytest.raises(ShardError, match="video_codec"), ShardWriter(tmp_path, {**IDENTITY, "video_codec": "other"}):
        pass
    with ShardWriter(tmp_path, IDENTITY) as writer:
        assert "basic_face-0003" in writer.keys
        with pytest.raises(ValueError, match="basic_face-0003"):
            writer.add("basic_face", "train", make_sample(3))
        writer.add("basic_face", "heldout", make_sample(4))
        writer.add("basic_face", "train", make_sample(5))
        with pytest.raises(ShardError, match="another process"):
            ShardWriter(tmp_path, IDENTITY)
    shards = ShardSet.open(tmp_path)
    assert first_tar(tmp_path).read_bytes() == before
    assert {s.name: s.samples for s in shards.shards} == {
        "basic_face-train-000000": 4,
        "basic_face-heldout-000000": 1,
        "basic_face-train-000001": 1,
    }
    assert not damages(tmp_path, sound=True)


def test_samples_added_before_an_error_are_kept(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, IDENTITY) as writer:
        writer.add("basic_face", "train", make_sample(0))
        raise RuntimeError
    assert ShardSet.open(tmp_path).read(0, 0).key == "basic_face-0000"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_latents": np.full((4, 3, 2, 2), np.nan)}, "video_latents holds values that are not finite"),
        ({"video_latents": np.full((4, 3, 2, 2), 1e6)}, "video_latents exceeds float16"),
        ({"speech": np.zeros((9, 2))}, "speech has shape"),
        ({"waveform": None}, "waveform"),
        ({"key": "../up"}, "sample key"),
    ],
)
def test_a_sample_that_must_not_get_in_is_named(tmp_path: Path, change: dict, message: str) -> None:
    with ShardWriter(tmp_path, IDENTITY) as writer, pytest.raises(ValueError, match=message):
        writer.add("basic_face", "train", replace(make_sample(0), **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"caption": " "}, "caption is empty"), ({"fps": 24.0}, "fps is 24.0"), ({"rate_hz": 0}, "rate_hz")],
)
def test_a_wrong_annotation_is_named(tmp_path: Path, change: dict, message: str) -> None:
    sample = make_sample(7)
    sample = replace(sample, annotation=replace(sample.annotation, **change))
    with ShardWriter(tmp_path, IDENTITY) as writer, pytest.raises(ValueError, match=f"basic_face-0007.*{message}"):
        writer.add("basic_face", "train", sample)


def test_a_truncated_shard_loses_only_what_was_cut(tmp_path: Path) -> None:
    tar = first_tar(write_set(tmp_path))
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    found = damages(tmp_path)
    assert 2 <= len(found) <= 4 and all("ends before the sample" in reason for reason in found.values())


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>"])
def test_an_empty_or_foreign_file_damages_every_sample(tmp_path: Path, content: bytes) -> None:
    first_tar(write_set(tmp_path)).write_bytes(content)
    assert len(damages(tmp_path)) == 6


def test_a_missing_shard_or_index_is_named(tmp_path: Path) -> None:
    tar = first_tar(write_set(tmp_path))
    tar.unlink()
    assert set(damages(tmp_path).values()) == {f"{tar.name} is missing"}
    index_path(tar).unlink()
    assert set(damages(tmp_path).values()) == {f"{index_path(tar).name} is missing"}


@pytest.mark.parametrize("place", ["header", "payload"])
@pytest.mark.parametrize("member", ["json", "safetensors", "flac"])
def test_one_flipped_bit_is_found(tmp_path: Path, member: str, place: str) -> None:
    tar = first_tar(write_set(tmp_path))
    entry = index_tar(tar).samples[3].members[member]
    flip(tar, entry.start + 10 if place == "header" else entry.offset + entry.size // 2)
    found = damages(tmp_path, sound=True)
    assert {key.split("/")[0]: reason for key, reason in found.items()} == {
        "basic_face-0003": "the bytes differ from their checksum"
    }


def test_a_changed_index_is_found(tmp_path: Path) -> None:
    path = index_path(first_tar(write_set(tmp_path)))
    path.write_bytes(path.read_bytes().replace(b"basic_face-0003", b"basic_face-9993"))
    assert len(damages(tmp_path)) == 6


def rewrite(tar: Path, change: dict[str, bytes | None]) -> None:
    with tarfile.open(tar) as archive:
        members = {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in {**members, **change}.items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basic_face-0002.safetensors": None}, r"basic_face-0002.*member basic_face-0002\.safetensors is missing"),
        ({"basic_face-0002.json": b"{}"}, r"basic_face-0002.*field caption"),
        ({"basic_face-0002.json": b"[1"}, r"basic_face-0002.*not JSON"),
        ({"basic_face-0002.safetensors": b"\x02\0\0\0\0\0\0\0{}"}, r"basic_face-0002.*field video_latents is missing"),
        ({"basic_face-0002.safetensors": b"\xff" * 16}, r"basic_face-0002.*header is longer"),
        ({"basic_face-0002.pyd": b"x"}, r"member 'basic_face-0002\.pyd' is none of"),
        ({"basic_face-0002.pth": b"x"}, r"member 'basic_face-0002\.pth' is none of"),
    ],
)
def test_indexing_a_foreign_shard_names_shard_member_and_field(
    tmp_path: Path, change: dict[str, bytes | None], message: str
) -> None:
    tar = first_tar(write_set(tmp_path))
    rewrite(tar, change)
    with pytest.raises(ShardError, match=rf"basic_face-train-000000\.tar.*{message}"):
        index_tar(tar)


def test_indexing_notices_a_cut_at_a_members_end_and_a_damaged_header(tmp_path: Path) -> None:
    tar = first_tar(write_set(tmp_path))
    data, entry = tar.read_bytes(), index_tar(tar).samples[3].members["flac"]
    tar.write_bytes(data[: entry.start])
    with pytest.raises(ShardError, match="no end of archive"):
        index_tar(tar)
    tar.write_bytes(data)
    flip(tar, entry.start + 150)
    with pytest.raises(ShardError, match="no end of archive"):
        index_tar(tar)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_hostile_shard_or_root_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    tar = first_tar(write_set(tmp_path / "set"))
    rewrite(tar, {"basic_face-0002.safetensors": pickle.dumps(_Canary(canary))})
    with pytest.raises(ShardError, match=r"basic_face-0002"):
        index_tar(tar)
    index, data = json.loads(index_path(tar).read_bytes()), tar.read_bytes()
    with tarfile.open(tar) as archive:
        for extension in ("json", "safetensors"):  # an attacker can write right checksums too
            info = archive.getmember(f"basic_face-0002.{extension}")
            end = info.offset_data + info.size
            place = [info.offset, info.offset_data, info.size, checksum(data[info.offset : end])]
            index["samples"][2]["members"][extension] = place
    index_path(tar).write_bytes(json.dumps(index).encode())
    shards = ShardSet.open(tmp_path / "set").shards
    Manifest(IDENTITY, tuple(replace(shard, digest="") for shard in shards)).write(tmp_path / "set")
    assert "header is longer than the member" in damages(tmp_path / "set")["basic_face-0002/0.2"]
    for root in (f"pipe:touch {canary}", "https://host/set", "s3://bucket/set", "file:/etc"):
        with pytest.raises(ShardError, match="by path only"):
            ShardSet.open(root)
    assert not canary.exists()


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    Manifest(IDENTITY, (Shard("../../etc/passwd", "train", "x", 1, "9x16x16"),)).write(tmp_path)
    with pytest.raises(ShardError, match="no SUBSET-SPLIT"):
        ShardSet.open(tmp_path)


def test_an_absent_folder_and_a_folder_without_a_manifest_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such folder"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"no shards\.json"):
        ShardSet.open(tmp_path)


def test_a_killed_writer_leaves_a_readable_set_that_can_be_continued(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, 'tests'); import test_shards as t\n"
        f"w = t.ShardWriter({str(tmp_path)!r}, t.IDENTITY, samples_per_shard=3)\n"
        "for i in range(5): w.add('basic_face', 'train', t.make_sample(i))\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == -9 and not is_written(tmp_path)
    assert not damages(tmp_path) and len(ShardSet.open(tmp_path).shards) == 1
    with ShardWriter(tmp_path, IDENTITY) as writer:
        assert len(writer.keys) == 3
        writer.add("basic_face", "train", make_sample(3))
    assert not damages(tmp_path) and len(ShardSet.open(tmp_path).shards) == 2
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_a_reader_waits_for_a_live_writer_and_is_told_of_a_dead_one(tmp_path: Path) -> None:
    write_set(tmp_path)
    manifest = ShardSet.open(tmp_path).manifests[0]
    Manifest(IDENTITY, tuple(replace(s, size=0, digest="") for s in manifest.shards), growing=True).write(tmp_path)
    tar = first_tar(tmp_path)
    tar.rename(tar.with_suffix(".later"))
    (tmp_path / "writer.log").write_text("ValueError: the disk is full of cats\n")
    with pytest.raises(ShardError, match=r"(?s)basic_face-train-000000\.tar.*full of cats"):
        ShardSet.open(tmp_path).read(0, 0)
    lock = WriterLock.acquire(tmp_path)
    assert lock is not None and is_written(tmp_path)
    mover = subprocess.Popen(["sh", "-c", f"sleep 0.3; mv {tar.with_suffix('.later')} {tar}"])
    try:
        assert ShardSet.open(tmp_path).read(0, 0).key == "basic_face-0000"
    finally:
        mover.wait()
        lock.release()
