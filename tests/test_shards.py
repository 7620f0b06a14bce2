"""Shard sets: what is written comes back, what is damaged is named, what is foreign never runs."""

import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.live_writer import WriterLock, is_written
from data.manifest import Manifest, read_manifest
from data.sample import _is_finite
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
        texts={"caption": rng.standard_normal((1 + index % 5, 6), np.float32)},
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
    with pytest.raises(ShardError, match="track_encoder: the shards have nothing, this run needs 'wav2vec2'"):
        ShardSet.open(tmp_path, {"track_encoder": "wav2vec2"})


@pytest.mark.parametrize("swapped", [False, True])
def test_sets_that_are_read_as_one_differ_in_no_key_of_either(tmp_path: Path, swapped: bool) -> None:
    roots = [tmp_path / "plain", tmp_path / "loud"]
    for root, more in zip(roots, ({}, {"peak": 0.7}), strict=True):
        with ShardWriter(root, {**IDENTITY, **more}):
            pass
    has = ("nothing", "0.7") if swapped else ("0.7", "nothing")
    roots = roots[::-1] if swapped else roots
    message = f"data.root={roots[1]} was made.*: the shards have {has[0]}, those in {roots[0]} have {has[1]}"
    with pytest.raises(ShardError, match=f"(?s){message}"):
        ShardSet.open(roots)


def test_references_may_be_longer_than_a_run_reads_and_not_shorter(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, {**IDENTITY, "reference_tokens": 96}):
        pass
    for least in (64, 96):
        assert ShardSet.open(tmp_path, {"reference_tokens": least}).identity["reference_tokens"] == 96
    with pytest.raises(ShardError, match="reference_tokens: the shards have 96, this run needs at least 257"):
        ShardSet.open(tmp_path, {"reference_tokens": 257})
    with (
        pytest.raises(ShardError, match="reference_tokens: the shards have 96, this run has 64"),
        ShardWriter(tmp_path, {**IDENTITY, "reference_tokens": 64}),
    ):
        pass


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
        ({"speech": np.zeros((0, 2, 3))}, "speech is empty"),
        ({"references": (np.zeros((0, 4)),)}, r"reference\.0 is empty"),
        ({"texts": {"caption": np.zeros((0, 6))}}, r"text\.caption is empty"),
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


def test_every_number_that_is_not_finite_is_found_and_no_other() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert all(_is_finite(number) == np.isfinite(number[0]) for number in halves[:, None])
    for bits in (0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0xFF7FFFFF, 0xFF800000, 0xFF800001, 0xFFFFFFFF):
        number = np.array([bits], np.uint32).view(np.float32)
        assert _is_finite(number) == np.isfinite(number[0])
    assert _is_finite(halves[:0])


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
        index_tar(tar, required=["video_latents"])


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
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def npy(value: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([value], object), allow_pickle=True)
    return file.getvalue()


def pth(value: object) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


PICKLED = {"pyd": pickle.dumps, "pkl": pickle.dumps, "pickle": pickle.dumps, "npy": npy, "pth": pth, "pt": pth}


def plant(root: Path, extension: str, data: bytes) -> None:
    """Gives sample 2 of the first shard a member of an attacker's, with checksum, index and digest that fit."""
    tar = first_tar(root)
    index, end = json.loads(index_path(tar).read_bytes()), tar.stat().st_size
    with tar.open("ab") as file:
        file.write(data)
    index["samples"][2]["members"][extension] = [end, end, len(data), checksum(data)]
    write_index(root, {**index, "size": end + len(data)})


def write_index(root: Path, index: object) -> None:
    index_path(first_tar(root)).write_text(json.dumps(index))
    manifest = read_manifest(root)
    shards = [replace(shard, digest="") for shard in manifest.shards]
    replace(manifest, shards=tuple(shards)).write(root)


@pytest.mark.parametrize("extension", PICKLED)
def test_what_can_hold_a_pickle_is_refused_by_name_and_never_run_under_another(tmp_path: Path, extension: str) -> None:
    canary = tmp_path / "canary"
    payload = PICKLED[extension](_Canary(canary))
    for root, planted in ((tmp_path / "named", extension), (tmp_path / "hidden", "safetensors")):
        tar = first_tar(write_set(root))
        rewrite(tar, {f"basic_face-0002.{planted}": payload})
        with pytest.raises(ShardError, match=r"basic_face-0002"):
            index_tar(tar)
    for planted in (extension, "safetensors", "json", "flac"):
        plant(write_set(tmp_path / planted), planted, payload)
        found = damages(tmp_path / planted, sound=True)  # a member that is none of a sample's is not looked at
        assert list(found) == ([] if planted == extension else ["basic_face-0002/0.2"])
    assert not canary.exists()
    pickle.loads(pickle.dumps(_Canary(canary)))
    assert canary.exists()  # the canary sings


@pytest.mark.parametrize("word", ["pipe:touch {}", "https://host/set", "s3://bucket/set", "file:/etc"])
def test_a_root_is_a_path_and_no_command_or_address(tmp_path: Path, word: str) -> None:
    with pytest.raises(ShardError, match="by path only"):
        ShardSet.open(word.format(tmp_path / "canary"))
    assert not (tmp_path / "canary").exists()


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(shape: list, end: object = 8) -> dict[str, object]:
    return {"dtype": "F16", "shape": shape, "data_offsets": [0, end]}


def endless_flac() -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros(6000), 8000, format="FLAC")
    data = bytearray(file.getvalue())
    data[21] |= 0x0F  # the 36 bits of STREAMINFO's number of samples
    data[22:26] = b"\xff" * 4
    return bytes(data)


DEEP = b"[" * 200_000 + b"]" * 200_000
ANNOTATION = json.dumps(vars(make_sample(2).annotation))
NO_PICTURE = dict.fromkeys(("num_frames", "height", "width"), 0)


def annotated(**change: object) -> bytes:
    return json.dumps({**json.loads(ANNOTATION), **change}).encode()


@pytest.mark.parametrize(
    ("extension", "data", "message"),
    [
        ("json", DEEP, "annotations: not JSON that anyone meant: nested too deeply"),
        ("json", b'{"fps": ' + b"9" * 5000 + b"}", "annotations: not JSON: Exceeds the limit"),
        ("json", ANNOTATION.replace("12.0", "1e999").encode(), "field fps is missing or not a positive number"),
        ("json", ANNOTATION.replace("12.0", "NaN").encode(), "NaN is no number"),
        ("json", ANNOTATION.replace("12.0", '"12"').encode(), "field fps is missing or not a positive number"),
        ("json", annotated(duration_s=1e308, **NO_PICTURE), "field duration_s is not a number from 0 to 3600"),
        ("json", annotated(duration_s=3600.5, **NO_PICTURE), "field duration_s is not a number from 0 to 3600"),
        ("json", annotated(duration_s=0.75, **NO_PICTURE), "shape 750ms in a shard of 9x16x16"),
        ("json", annotated(num_frames=1_000_001), "height, width is missing or not a whole number from 0 to 1000000"),
        ("json", annotated(height=16.0), "height, width is missing or not a whole number from 0 to 1000000"),
        ("json", annotated(width=True), "height, width is missing or not a whole number from 0 to 1000000"),
        ("json", annotated(fps=5e-324), "num_frames 9 at 5e-324 fps last longer than 3600 s"),
        ("json", annotated(rate_hz=10**400), "field rate_hz is missing or not a positive number up to 1000000"),
        ("json", annotated(fps=24.0), "fps is 24.0, the shard set's is 12.0"),
        ("json", b"\xff\xfe", "annotations: not JSON: 'utf-8' codec"),
        ("safetensors", len(DEEP).to_bytes(8, "little") + DEEP, "the header: not JSON that anyone meant"),
        ("safetensors", (1 << 62).to_bytes(8, "little") + b"{}", "the header is longer than the member"),
        ("safetensors", (2).to_bytes(8, "little") + b"[]", "the header: not a JSON object"),
        (
            "safetensors",
            header(**{"text.caption": tensor([1 << 40, 1], 1 << 41)}),
            "text.caption lies outside the member",
        ),
        (
            "safetensors",
            header(**{"text.caption": tensor(["x", 1 << 50])}),
            "the header's entry for text.caption is malformed",
        ),
        (
            "safetensors",
            header(**{"text.caption": tensor([-1, -4])}),
            "the header's entry for text.caption is malformed",
        ),
        (
            "safetensors",
            header(**{"text.caption": tensor([2.0, 2.0])}),
            "the header's entry for text.caption is malformed",
        ),
        ("safetensors", header(**{"text.caption": tensor([], 0)}), "the header's entry for text.caption is malformed"),
        (
            "safetensors",
            header(**{"text.caption": {**tensor([2, 2]), "dtype": "F64"}}),
            "text.caption is 'F64'; shards hold F16 or F32",
        ),
        ("safetensors", header(**{"text.caption": [1, 2]}), "the header's entry for text.caption is malformed"),
        *(
            ("safetensors", header(**{name: tensor(shape, 0)}), f"{name} is empty, shape {shape}")
            for name, shape in (
                ("text.caption", [0, 10**12]),
                ("text.caption", [0, 10**40]),
                ("audio_latents", [0, 10**12]),
                ("speech", [0, 2, 3]),
                ("video_latents", [0, 3, 2, 2]),
                ("depth", [0, 10**12, 2, 2]),
                ("reference.0", [0, 4]),
            )
        ),
        (
            "safetensors",
            header(**{"text.caption": tensor([1, 65_537], 131_074)}) + bytes(131_074),
            "text.caption has shape [1, 65537]; rows have up to 65536 values",
        ),
        ("safetensors", header(pose=tensor([4, 2, 2], 32)) + bytes(32), "pose has shape [4, 2, 2]; expected 4 axes"),
        ("safetensors", header(reference_image=tensor([1 << 20] * 3 + [1], 1 << 61)), "lies outside the member"),
        (
            "safetensors",
            header(**{"reference.2": tensor([2, 2])}) + bytes(8),
            "reference.2 without reference.0: references are numbered from 0 without gaps",
        ),
        (
            "safetensors",
            header(**{"reference.2": tensor([2, 2]), "reference.0": tensor([2, 2])}) + bytes(8),
            "reference.2 without reference.1: references are numbered from 0 without gaps",
        ),
        ("flac", endless_flac(), "the sound claims 68719476735 samples"),
        ("flac", b"fLaC" + bytes(40), "the sound cannot be decoded"),
    ],
)
def test_what_a_member_claims_is_not_believed(tmp_path: Path, extension: str, data: bytes, message: str) -> None:
    plant(write_set(tmp_path), extension, data)
    tracemalloc.start()
    found = damages(tmp_path, sound=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(found) == ["basic_face-0002/0.2"] and message in found["basic_face-0002/0.2"]
    assert peak < 64e6


def test_a_sound_is_not_decoded_to_a_length_that_its_shard_is_not_of(tmp_path: Path) -> None:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000 * 300, np.int16), 8000, format="FLAC")
    plant(write_set(tmp_path), "json", annotated(num_frames=12 * 300))
    plant(tmp_path, "flac", file.getvalue())
    tracemalloc.start()
    found = damages(tmp_path, sound=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == {"basic_face-0002/0.2": "shape 3600x16x16 in a shard of 9x16x16"}
    assert peak < 4e6  # the sound is of 9.6 MB


TERABYTES = 1 << 43


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: index["samples"][2]["members"].update(json=[0, 512, TERABYTES, "0"]),
            "a place outside the shard",
        ),
        (lambda index: index["samples"][2]["members"].update(json=[0, -512, 9, "0"]), "gives no place in the shard"),
        (lambda index: index["samples"][2]["members"].update(json=[0, 1e300, 9, "0"]), "gives no place in the shard"),
        (lambda index: index["samples"][2].update(members=[1]), "lacks or mistypes"),
        (lambda index: index["samples"][2].update(key="../../etc/passwd"), r"sample key '\.\./\.\./etc/passwd'"),
        (lambda index: index.update(size="9"), "lacks or mistypes"),
        (lambda index: index.update(samples=[]), "the index has 0 samples, the manifest 6"),
    ],
)
def test_an_index_is_not_believed(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    index = json.loads(index_path(first_tar(write_set(tmp_path))).read_bytes())
    change(index)
    write_index(tmp_path, index)
    found = damages(tmp_path)
    assert len(found) == 6 and all(re.search(message, reason) for reason in found.values())


def test_an_index_of_a_shard_of_terabytes_allocates_nothing(tmp_path: Path) -> None:
    index = json.loads(index_path(first_tar(write_set(tmp_path))).read_bytes())
    index["samples"][2]["members"]["safetensors"] = [1024, 1536, TERABYTES, "0"]
    write_index(tmp_path, {**index, "size": 2 * TERABYTES})
    assert list(damages(tmp_path)) == ["basic_face-0002/0.2"]
    assert "the shard ends before the sample" in damages(tmp_path)["basic_face-0002/0.2"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../basic_face-0002.json", tarfile.REGTYPE),
        ("/etc/basic_face-0002.json", tarfile.REGTYPE),
        ("up/../basic_face-0002.json", tarfile.REGTYPE),
        ("pipe:touch canary.json", tarfile.REGTYPE),
        ("basic_face-0099.json", tarfile.SYMTYPE),
        ("basic_face-0099.json", tarfile.LNKTYPE),
        ("basic_face-0099.json", tarfile.CHRTYPE),
    ],
)
def test_a_member_that_is_a_path_a_command_or_a_link_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    tar = first_tar(write_set(tmp_path))
    with tarfile.open(tar, "a", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ShardError, match=rf"basic_face-train-000000\.tar: member '{re.escape(name)}'"):
        index_tar(tar)


def test_a_tar_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    tar, info = first_tar(write_set(tmp_path)), tarfile.TarInfo("././@LongLink")
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE):
        info.type, info.size = kind, TERABYTES
        tar.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
        with pytest.raises(ShardError, match=r"basic_face-train-000000\.tar: "):
            index_tar(tar)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../../etc/passwd"}, "no SUBSET-SPLIT"),
        ({"name": "/etc/a-train-000000"}, "no SUBSET-SPLIT"),
        ({"name": 7}, "no SUBSET-SPLIT"),
        ({"name": "basic_face-train-000001"}, "names a shard twice"),
        ({"samples": TERABYTES}, "of 8796093022208 samples; a shard has up to 1000000"),
        ({"samples": -1}, "of -1 samples"),
        ({"samples": "6"}, "of '6' samples"),
        ({"shape": "9x16"}, "shape '9x16', which is no FxHxW"),
        ({"subset": None}, "subset None"),
        ({"runs": "touch canary"}, "lacks or mistypes"),
    ],
)
def test_a_manifest_is_not_believed(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write_set(tmp_path) / "shards.json"
    document = json.loads(path.read_bytes())
    document["shards"][0].update(change)
    path.write_text(json.dumps(document))
    with pytest.raises(ShardError, match=message):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("text", [DEEP, b"[]", b"", b'{"format": 1, "shards": [], "growing": false, "identity": {}}'])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "shards.json").write_bytes(text)
    with pytest.raises(ShardError, match=r"shards\.json: (not|the identity lacks fps)"):
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
