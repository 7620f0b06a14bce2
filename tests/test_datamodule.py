"""AVDataModule: the batches of a step are the same however, wherever and after whatever they are read."""

import re
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from avlit.batch import AVBatch
from avlit.codecs.build import build_audio_codec
from data.batches import Contents
from data.clip import RawClip
from data.datamodule import AVDataModule
from data.encode import Encoders, encode_clip
from data.shard_index import index_path, parse_index
from data.shards import Annotation, EncodedSample, ShardError, ShardSet, ShardWriter

IDENTITY = {"fps": 12.0, "rate_hz": 8000, "video_codec": "embedded"}
LARGE, SMALL = "9x16x16", "5x8x8"


def make_sample(subset: str, index: int, shape: str) -> EncodedSample:
    rng = np.random.default_rng(index)
    num_frames, height, width = map(int, shape.split("x"))
    annotation = Annotation(
        caption=f"{subset} {index}",
        transcript="",
        subset=subset,
        fps=12.0,
        rate_hz=8000,
        num_frames=num_frames,
        height=height,
        width=width,
        truth={"index": index},
    )
    tracks = [rng.standard_normal((num_frames, 2, 3), np.float32) for _ in range(4)]
    return EncodedSample(
        f"{subset}-{index:04d}",
        annotation,
        video_latents=rng.standard_normal((4, num_frames // 4 + 1, height // 8, width // 8), np.float32),
        texts={"caption": rng.standard_normal((1 + index % 5, 6), np.float32)},
        **dict(zip(("speech", "effects", "music"), tracks, strict=False)),
        speech_second=tracks[3] if index % 3 == 0 else None,
        waveform=(0.1 * rng.standard_normal(num_frames * 8000 // 12)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("shards"))


def write_set(root: Path) -> Path:
    with ShardWriter(root, IDENTITY, samples_per_shard=10) as writer:
        for subset, count, shape in (("faces", 40, LARGE), ("sounds", 30, LARGE), ("sounds", 20, SMALL)):
            for index in range(count):
                writer.add(subset, "train", make_sample(subset, index + (1000 if shape == SMALL else 0), shape))
        for subset in ("faces", "sounds"):
            for index in range(8):
                writer.add(subset, "heldout", make_sample(subset, 5000 + index, LARGE if index % 4 else SMALL))
    return root


def module(root: Path, **options) -> AVDataModule:
    defaults = {
        "batch_size": 4,
        "contents": Contents(7),
        "seed": 3,
        "subsets": {"faces": 1.0, "sounds": 2.0},
        "steps": 12,
    }
    return AVDataModule(root, **{**defaults, **options})


def keys(data: AVDataModule) -> list[tuple]:
    return [(batch.step, batch.slots, batch.keys) for batch in data.train_dataloader()]


def damage(root: Path, *, shard: str, samples: range) -> None:
    tar = root / f"{shard}.tar"
    entries, data = parse_index(index_path(tar).read_bytes()).samples, bytearray(tar.read_bytes())
    for index in samples:
        data[entries[index].members["safetensors"].offset + 300] ^= 0x10
    tar.write_bytes(data)


def test_a_batch_holds_what_the_shards_hold(root: Path) -> None:
    shapes = set()
    for batch in module(root).train_dataloader():
        tracks = batch.tracks
        assert batch.video_latents is not None and tracks is not None
        shapes.add(tuple(batch.video_latents.shape[2:]))
        for row, key in enumerate(batch.keys):
            subset, index = key.rsplit("-", 1)
            expected = make_sample(subset, int(index), LARGE if int(index) < 1000 else SMALL)
            assert (batch.subsets[row], batch.captions[row]) == (subset, expected.annotation.caption)
            length = batch.text_lengths[row]
            assert (
                batch.text.shape[1] == 7
                and length == len(expected.texts["caption"])
                and not batch.text[row, length:].any()
            )
            torch.testing.assert_close(batch.text[row, :length], half(expected.texts["caption"]))
            torch.testing.assert_close(batch.video_latents[row], half(expected.arrays["video_latents"]), rtol=0, atol=0)
            for name in ("speech", "effects", "music"):
                torch.testing.assert_close(getattr(tracks, name)[row], half(getattr(expected, name)), rtol=0, atol=0)
            assert tracks.has_second[row] == (expected.speech_second is not None)
            if expected.speech_second is None:
                assert not tracks.speech_second[row].any()
            else:
                torch.testing.assert_close(tracks.speech_second[row], half(expected.speech_second), rtol=0, atol=0)
    assert shapes == {(3, 2, 2), (2, 1, 1)}


def half(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float16)).float()


@pytest.mark.parametrize("start_step", [1, 7, 11])
def test_a_resumed_run_reads_what_the_uninterrupted_one_would(root: Path, start_step: int) -> None:
    whole = keys(module(root))
    assert [step for step, _, _ in whole] == list(range(12))
    assert keys(module(root, start_step=start_step)) == whole[start_step:]


def test_the_loader_has_the_length_of_the_whole_run_and_can_be_iterated_again(root: Path) -> None:
    loader = module(root, start_step=7, accumulate=2).train_dataloader()
    assert len(loader) == 24
    assert [b.keys for b in loader] == [b.keys for b in loader]
    assert len(module(root, steps=None).train_dataloader()) == 10**9


def test_worker_processes_read_the_same_batches(root: Path) -> None:
    expected, before = list(module(root, steps=6).train_dataloader()), set(active_children())
    found = list(module(root, steps=6, workers=2).train_dataloader())
    assert [(b.step, b.slots, b.keys) for b in found] == [(b.step, b.slots, b.keys) for b in expected]
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one.video_latents, two.video_latents, rtol=0, atol=0)
    for process in set(active_children()) - before:
        process.join(5)
        assert not process.is_alive()


@pytest.mark.parametrize(
    ("devices", "accumulate", "workers"), [(2, 1, 0), (1, 2, 0), (2, 2, 0), (1, 4, 0), (2, 1, 1), (4, 1, 2), (2, 2, 3)]
)
def test_devices_accumulation_and_workers_divide_the_same_global_batch(
    root: Path, devices: int, accumulate: int, workers: int
) -> None:
    expected: dict[int, dict[int, str]] = {
        batch.step: dict(zip(batch.slots, batch.keys, strict=True)) for batch in module(root).train_dataloader()
    }
    found: dict[int, dict[int, str]] = {step: {} for step in range(12)}
    for rank in range(devices):
        data = module(root, accumulate=accumulate, workers=workers)
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": devices})()  # type: ignore[assignment]
        for batch in data.train_dataloader():
            assert len(batch) == 4 // (devices * accumulate)
            assert not found[batch.step].keys() & set(batch.slots)
            found[batch.step].update(zip(batch.slots, batch.keys, strict=True))
    assert found == expected


def test_a_batch_that_does_not_divide_names_the_settings(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size=6.*train\.devices=2.*train\.accumulate=2.*4 or 8"):
        module(root, batch_size=6, devices=2, accumulate=2).train_dataloader()


def test_damaged_samples_are_replaced_the_same_way_after_a_resume(tmp_path: Path, caplog) -> None:
    whole = keys(module(write_set(tmp_path)))
    damage(tmp_path, shard="faces-train-000001", samples=range(3))
    data = module(tmp_path, max_bad=0.5)
    mended = keys(data)
    bad = {f"faces-00{index}" for index in range(10, 13)}
    assert len(mended) == len(whole)
    hit = [step for step, (before, after) in enumerate(zip(whole, mended, strict=True)) if before != after]
    assert hit and all(bad & set(whole[step][2]) for step in hit)
    assert not any(bad & set(batch_keys) for _, _, batch_keys in mended)
    assert data.damaged_count >= len(hit)
    named = {key for _, key, _ in data.state()["damaged"]}
    assert named <= bad and all(any(key in line for line in caplog.messages) for key in named)
    assert keys(module(tmp_path, max_bad=0.5, start_step=hit[0])) == mended[hit[0] :]
    assert keys(module(tmp_path, max_bad=0.5, workers=1)) == mended


def test_damage_beyond_the_budget_stops_at_the_same_step_and_names_it(tmp_path: Path) -> None:
    write_set(tmp_path)
    for shard in range(3):
        damage(tmp_path, shard=f"faces-train-{shard:06d}", samples=range(10))
    stops = []
    for _ in range(2):
        with pytest.raises(
            ShardError, match=r"(?s)data\.max_bad=0\.001.*faces-train-00000\d\.tar, sample faces-00\d\d"
        ) as caught:
            keys(module(tmp_path, steps=100))
        stops.append(str(caught.value))
    assert stops[0] == stops[1]
    with pytest.raises(ShardError, match=r"samples read were damaged by step 0; data\.max_bad=0 allows fewer"):
        list(module(tmp_path, steps=100, max_bad=0).train_dataloader())


def test_a_source_without_a_whole_sample_stops(tmp_path: Path) -> None:
    write_set(tmp_path)
    for tar in tmp_path.glob("faces-train-*.tar"):
        tar.unlink()
    with pytest.raises(ShardError, match=r"256 samples of faces in a row.*faces-train-00000\d\.tar is missing"):
        list(module(tmp_path, max_bad=0.9).train_dataloader())


def test_several_roots_are_read_as_one_and_must_agree(root: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "more", IDENTITY) as writer:
        for index in range(8):
            writer.add("moods", "train", make_sample("moods", index, LARGE))
    both = AVDataModule([root, tmp_path / "more"], batch_size=4, contents=Contents(7), seed=0, steps=40)
    assert {subset for batch in both.train_dataloader() for subset in batch.subsets} == {"faces", "sounds", "moods"}
    with ShardWriter(tmp_path / "other", {**IDENTITY, "video_codec": "cogvideox"}):
        pass
    with pytest.raises(ShardError, match="video_codec"):
        AVDataModule([root, tmp_path / "other"], batch_size=4, contents=Contents(7), seed=0).setup()


def test_heldout_clips_are_fixed_and_spread_over_the_subsets(root: Path) -> None:
    batches = module(root).heldout_batches(9, 4)
    again = module(root, seed=99, start_step=5).heldout_batches(9, 4)
    assert [b.keys for b in batches] == [b.keys for b in again]
    assert all(len({tuple(row.shape) for row in b.text}) == 1 and len(b) <= 4 for b in batches)
    subsets = [subset for batch in batches for subset in batch.subsets]
    assert (subsets.count("faces"), subsets.count("sounds")) == (3, 6)
    assert sorted(slot for batch in batches for slot in batch.slots) == list(range(9))
    trained = {key for _, _, batch_keys in keys(module(root, steps=100)) for key in batch_keys}
    assert not trained & {key for batch in batches for key in batch.keys}


def test_heldout_samples_come_with_sound_and_truth(root: Path) -> None:
    data = module(root)
    clips = data.heldout_samples(3)
    assert len(clips) == 3
    rows = {
        slot: key for batch in data.heldout_batches(3, 3) for slot, key in zip(batch.slots, batch.keys, strict=True)
    }
    for clip in clips:
        assert isinstance(clip.batch, AVBatch) and rows[clip.batch.slots[0]] == clip.batch.keys[0]
        subset, index = clip.batch.keys[0].rsplit("-", 1)
        expected = make_sample(subset, int(index), clip.annotation.shape)
        assert clip.annotation.truth == {"index": int(index)} and clip.rate_hz == 8000
        np.testing.assert_allclose(clip.waveform, expected.waveform, atol=1 / 32768)  # type: ignore[arg-type]


def test_asking_for_more_heldout_clips_than_there_are_gives_those_and_says_so(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sum(len(batch) for batch in module(root).heldout_batches(16, 16)) == 16
    assert not caplog.messages
    assert sum(len(batch) for batch in module(root).heldout_batches(17, 4)) == 16
    assert "17 held-out clips were asked for; the shards hold 16: these are used" in caplog.messages


def test_a_damaged_heldout_clip_gives_way_to_the_next(tmp_path: Path) -> None:
    first = module(write_set(tmp_path)).heldout_batches(1, 1)[0].keys[0]
    number = {"faces": "faces-heldout-000000", "sounds": "sounds-heldout-000000"}[first.split("-")[0]]
    damage(tmp_path, shard=number, samples=range(1))
    assert first not in [key for batch in module(tmp_path).heldout_batches(8, 8) for key in batch.keys]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": {"face": 1.0}}, r"data\.subsets\.face: the shards hold faces, sounds"),
        ({"batch_size": {LARGE: 4}}, r"add data\.batch_size\.5x8x8"),
        ({"workers": -1}, r"data\.workers=-1"),
        ({"max_bad": 1.5}, r"data\.max_bad=1\.5"),
        ({"expect": {"fps": 24.0}}, r"fps: the shards have 12\.0, this run needs 24\.0"),
    ],
)
def test_wrong_settings_are_named(root: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(root, **options).train_dataloader()


def test_text_longer_than_the_model_takes_is_an_error(root: Path) -> None:
    with pytest.raises(ValueError, match=r"its text is \[\d, 6\], the batch's \[2, 6\]"):
        list(module(root, contents=Contents(2)).train_dataloader())


def test_the_fingerprint_follows_the_contents(root: Path, tmp_path: Path) -> None:
    assert module(root).data_fingerprint == module(root, seed=8).data_fingerprint
    write_set(tmp_path)
    assert module(tmp_path).data_fingerprint == module(root).data_fingerprint
    with ShardWriter(tmp_path, IDENTITY) as writer:
        writer.add("faces", "train", make_sample("faces", 999, LARGE))
    assert module(tmp_path).data_fingerprint != module(root).data_fingerprint


def test_waiting_is_counted(root: Path) -> None:
    data = module(root)
    assert data.wait_s == 0
    list(data.train_dataloader())
    assert data.loader is not None and data.loader.batches == 11 and data.state()["samples"] == 48
    assert data.wait_s > 0 and data.loader.first_wait_s > 0


class _Video:
    identity, channels, temporal_factor, spatial_factor = "halves", 3, 4, 8

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return video[:, :, ::4, ::8, ::8]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class _Tracks:
    identity, layers, dim, rate_hz = "peaks", 1, 2, 4000

    def encode(self, waveform: torch.Tensor, *, num_frames: int) -> torch.Tensor:
        frames = waveform[: len(waveform) // num_frames * num_frames].reshape(num_frames, -1)
        return torch.stack([frames.amax(1), torch.full((num_frames,), float(len(waveform)))], 1)[:, None]


class _Text:
    identity, dim, max_tokens = "letters", 1, 8

    def encode(self, text: str) -> torch.Tensor:
        return torch.tensor([[float(ord(letter))] for letter in text[:8]])


def make_clip() -> RawClip:
    rng = np.random.default_rng(0)
    speech, effects, music = (0.2 * rng.standard_normal((3, 6000))).astype(np.float32)
    frames = rng.integers(0, 256, (9, 16, 16, 3), np.uint8)
    boxes = [[(1.0, 2.0, 3.0, 4.0)]] * 9
    return RawClip("clip-1", "faces", 12.0, 8000, frames, speech, effects, music, None, "Hello", "hi", boxes, {"a": 1})


def test_a_clip_is_encoded_through_the_codecs_interfaces(tmp_path: Path) -> None:
    clip, encoders = make_clip(), Encoders(_Text(), video=_Video(), tracks=_Tracks())
    assert clip.frames is not None
    sample = encode_clip(clip, encoders, source="here")
    assert sample.video_latents is not None and sample.speech is not None
    expected = clip.frames.transpose(3, 0, 1, 2)[:, ::4, ::8, ::8] / 127.5 - 1
    np.testing.assert_allclose(sample.video_latents, expected, atol=1e-6)
    assert sample.speech.shape == (9, 1, 2) and sample.speech[0, 0, 1] == 3000  # resampled to the encoder's rate
    assert sample.texts["caption"][:, 0].tolist() == [ord(letter) for letter in "Hello"]
    assert sample.waveform is not None
    np.testing.assert_array_equal(sample.waveform, clip.mix)
    with ShardWriter(tmp_path, encoders.identity(fps=12, rate_hz=8000)) as writer:
        writer.add("faces", "train", sample)
    read = ShardSet.open(tmp_path, {"video_codec": "halves", "track_encoder": "peaks"}).read(0, 0)
    assert read.annotation.source == "here" and read.annotation.mouth_boxes[0][0] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("made", "needed"), [(0.7, None), (None, 0.7), (0.7, 0.5)])
def test_sound_of_another_peak_is_refused_also_where_either_has_none(
    tmp_path: Path, made: float | None, needed: float | None
) -> None:
    shards, run = (
        Encoders(_Text(), audio=build_audio_codec("embedded"), peak=peak).identity(fps=12, rate_hz=8000)
        for peak in (made, needed)
    )
    with ShardWriter(tmp_path, shards):
        pass
    assert ShardSet.open(tmp_path, shards).identity["peak"] == (made or 0.0)
    with pytest.raises(ShardError, match=f"peak .*data.peak.*: the shards have {made or 0.0}, .* {needed or 0.0}"):
        ShardSet.open(tmp_path, run)


def test_a_run_needs_references_of_its_own_length_or_longer(tmp_path: Path) -> None:
    def identity(tokens: int) -> dict:
        return Encoders(_Text(), audio=build_audio_codec("embedded"), reference_tokens=tokens).identity(
            fps=12, rate_hz=8000
        )

    with ShardWriter(tmp_path, identity(96)):
        pass
    for tokens in (0, 64, 96):
        module(tmp_path, expect=identity(tokens)).setup()
    with pytest.raises(ShardError, match="reference_tokens: the shards have 96, this run needs at least 257"):
        module(tmp_path, expect=identity(257)).setup()


def test_a_track_of_the_wrong_length_is_named() -> None:
    clip = replace(make_clip(), effects=np.zeros(100, np.float32))
    with pytest.raises(ValueError, match=re.escape("clip clip-1: effects has [100] samples")):
        encode_clip(clip, Encoders(_Text(), video=_Video(), tracks=_Tracks()))


class _Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.read: list[tuple] = []

    def training_step(self, batch: AVBatch, _: int) -> torch.Tensor:
        self.read.append((batch.step, batch.slots, batch.keys))
        return (self.scale - batch.text.mean()).square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: AVDataModule, folder: Path, *, steps: int, resume: Path | None = None) -> tuple[Trainer, list[tuple]]:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    recorder = _Recorder()
    trainer.fit(recorder, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer, recorder.read


def test_lightning_reads_every_batch_once_also_across_a_resume(root: Path, tmp_path: Path) -> None:
    expected = keys(module(root, accumulate=2, steps=9))
    _, whole = fit(module(root, accumulate=2, steps=9), tmp_path, steps=9)
    assert whole == expected
    trainer, before = fit(module(root, accumulate=2, steps=9), tmp_path, steps=4)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    _, after = fit(module(root, accumulate=2, steps=9, start_step=4), tmp_path, steps=9, resume=tmp_path / "at4.ckpt")
    assert before + after == expected
