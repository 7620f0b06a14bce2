"""Reference image, depth and pose from the corpus to the batch: the codec's own latents, asked for or absent."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avlit.codecs.build import build_audio_codec, build_text_encoder, build_video_codec
from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
from avlit.config import CodecConfig, Config, DataConfig, Reads, TrainConfig
from avlit.errors import UserError
from data.batches import Contents, collate
from data.captions import split_visual_speech
from data.corpus import CorpusSettings, depth_frames, make_clip, pose_frames, reference_audio, reference_image
from data.datamodule import AVDataModule
from data.embedded import EmbeddedSet, embedded_encoders, ensure_embedded, write_missing
from data.encode import Encoders, encode_clip
from data.live_writer import WriterLock
from data.sample import CONTROLS, EncodedSample
from data.shards import ShardError, ShardSet, ShardWriter

SETTINGS = CorpusSettings(fps=8.0, num_frames=9, height=32, width=32, rate_hz=8000)
SET = EmbeddedSet(SETTINGS, num_clips=2, heldout_clips=1)
VIDEO = build_video_codec("embedded")
ENCODERS = Encoders(
    build_text_encoder("embedded"), video=VIDEO, audio=build_audio_codec("embedded"), reference_tokens=96
)


def encoded(subset: str, index: int, controls: tuple[str, ...] = CONTROLS) -> EncodedSample:
    clip = make_clip(subset, index, SETTINGS, controls=controls)
    return encode_clip(clip, replace(ENCODERS, controls=controls))


def latents(frames: np.ndarray) -> np.ndarray:
    """[F, H, W, 3] -> [C, T, h, w], as this test and no code of the data's has it."""
    video = torch.from_numpy(frames.astype(np.float32) / 127.5 - 1).movedim(-1, 0)
    return VIDEO.encode(video[None])[0].numpy()


def written(root: Path, embedded: EmbeddedSet) -> ShardSet:
    root.mkdir()
    (root / "wanted-single_character").touch()
    lock = WriterLock.acquire(root)
    assert lock is not None
    write_missing(root, embedded, embedded_encoders(), lock)
    return ShardSet.open(root)


def test_a_shard_holds_the_codecs_latents_of_the_corpus_controls(tmp_path: Path) -> None:
    shards = written(tmp_path / "set", replace(SET, controls=CONTROLS))
    assert shards.identity["controls"] == "reference_image,depth,pose"
    (number, _), *_ = [pair for pair in shards.select("train") if pair[1].subset == "single_character"]
    sample = shards.read(number, 1)
    depth = np.rint(255 * depth_frames("single_character", 1, SETTINGS)).astype(np.uint8)
    expected = {
        "reference_image": reference_image("single_character", 1, SETTINGS)[None],
        "depth": np.stack([depth] * 3, axis=-1),
        "pose": pose_frames("single_character", 1, SETTINGS),
    }
    for name, frames in expected.items():
        np.testing.assert_array_equal(sample.arrays[name], latents(frames).astype(np.float16), err_msg=name)
    assert sample.arrays["depth"].shape == sample.arrays["video_latents"].shape == sample.arrays["pose"].shape
    assert sample.arrays["reference_image"].shape[1] == 1


def test_a_set_without_controls_holds_the_same_samples_without_them(tmp_path: Path) -> None:
    plain, controlled = written(tmp_path / "plain", SET), written(tmp_path / "all", replace(SET, controls=CONTROLS))
    assert "controls" not in plain.identity and SET.name != replace(SET, controls=CONTROLS).name
    for number, shard in enumerate(plain.shards):
        for index in range(shard.samples if shard.subset == "single_character" else 0):
            without, sample = plain.read(number, index), controlled.read(number, index)
            assert sample.arrays.keys() - without.arrays.keys() == set(CONTROLS)
            assert without.annotation == sample.annotation
            for name, array in without.arrays.items():
                np.testing.assert_array_equal(sample.arrays[name], array)


def test_the_background_writer_makes_the_controls_that_were_asked_for(tmp_path: Path) -> None:
    root = ensure_embedded(
        tmp_path, settings=SETTINGS, subsets=["basic_face"], num_clips=2, heldout_clips=1, controls=["pose", "depth"]
    )
    shards = ShardSet.open(root, {"controls": "depth,pose"})
    (number, _), *_ = [pair for pair in shards.select("heldout") if pair[1].subset == "basic_face"]
    sample = shards.read(number, 0)
    assert sample.depth is not None and sample.pose is not None and sample.reference_image is None


def test_a_clip_that_shows_nobody_has_a_depth_and_nothing_else() -> None:
    empty = next(i for i in range(20) if not make_clip("sound_event", i, SETTINGS, has_frames=False).truth["identity"])
    sample = encoded("sound_event", empty)
    assert (sample.reference_image, sample.pose) == (None, None) and sample.depth is not None
    person = encoded("single_character", 0)
    batch = collate([sample, person], step=0, slots=(0, 1), contents=Contents(48, tracks=False, controls=CONTROLS))
    assert batch.has_reference_image == batch.has_pose == (False, True) and batch.has_depth == (True, True)
    assert batch.reference_image is not None and batch.depth is not None and batch.pose is not None
    assert not batch.reference_image[0].any() and not batch.pose[0].any()
    for name in CONTROLS:
        torch.testing.assert_close(getattr(batch, name)[1], torch.from_numpy(person.arrays[name]))
    assert batch.reference_image.shape[2] == 1 and batch.pose.shape == batch.depth.shape
    assert batch.to("cpu").pose is not None


def test_the_reference_image_shows_who_the_reference_voice_is_of() -> None:
    seen = set()
    for index in range(8):
        clip = make_clip("multiple_characters", index, SETTINGS, controls=["reference_image"])
        (person,) = {
            person
            for person in (0, 1)
            if len(spoken := reference_audio("multiple_characters", index, SETTINGS, person=person))
            == len(clip.references[0])
            and np.allclose(spoken, clip.references[0], atol=1e-4)
        }
        seen.add(person)
        expected = reference_image("multiple_characters", index, SETTINGS, person=person)
        np.testing.assert_array_equal(clip.reference_image, expected)
    assert seen == {0, 1}


def test_what_is_not_read_is_none() -> None:
    samples = [encoded("basic_face", 0)]
    batch = collate(samples, step=0, slots=(0,), contents=Contents(48, tracks=False, controls=("depth",)))
    assert batch.depth is not None and batch.has_depth == (True,)
    assert (batch.pose, batch.reference_image, batch.has_pose, batch.has_reference_image) == (None, None, (), ())


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_of_another_shape_than_its_clip_is_named(name: str) -> None:
    good, bad = encoded("basic_face", 0), encoded("basic_face", 1)
    bad = replace(bad, **{name: bad.arrays[name][:, :, :-1]})
    for samples in ([good, bad], [bad, good]):
        with pytest.raises(UserError, match=f"sample {bad.key}: {name} is .*, its video latents ask for"):
            collate(samples, step=0, slots=(0, 1), contents=Contents(48, tracks=False, controls=CONTROLS))


@pytest.mark.parametrize(
    ("name", "cut"), [("depth", np.s_[:-1]), ("pose", np.s_[:, :-8]), ("reference_image", np.s_[8:])]
)
def test_control_pictures_of_another_length_or_size_are_not_encoded(name: str, cut: tuple) -> None:
    clip = make_clip("basic_face", 0, SETTINGS, controls=CONTROLS)
    clip = replace(clip, **{name: getattr(clip, name)[cut]})
    with pytest.raises(ValueError, match=f"clip {clip.key}: {name} is uint8 .*beside its frames"):
        encode_clip(clip, replace(ENCODERS, controls=CONTROLS))


def test_a_run_refuses_shards_made_without_a_control_that_it_reads(tmp_path: Path) -> None:
    def identity(*controls: str) -> dict:
        return replace(ENCODERS, controls=controls).identity(fps=8, rate_hz=8000)

    for name, controls in (("plain", ()), ("some", ("pose", "reference_image"))):
        with ShardWriter(tmp_path / name, identity(*controls)):
            pass
    for fitting in ((), ("pose",), ("reference_image", "pose")):
        ShardSet.open(tmp_path / "some", identity(*fitting))
    with pytest.raises(
        ShardError, match=r"controls: the shards have nothing, .* at least 'depth'; prepare .*NAME\.depth"
    ):
        ShardSet.open(tmp_path / "plain", identity("depth"))
    with pytest.raises(
        ShardError, match="the shards have 'reference_image,pose', this run needs at least 'depth,pose'"
    ):
        AVDataModule(
            tmp_path / "some", batch_size=1, contents=Contents(48), seed=0, expect=identity("pose", "depth")
        ).setup()


def test_what_is_no_control_is_refused() -> None:
    with pytest.raises(ValueError, match="'edges' is none of reference_image, depth, pose"):
        replace(ENCODERS, controls=("depth", "edges"))
    with pytest.raises(ValueError, match="by the video codec, and there is none"):
        replace(ENCODERS, video=None, controls=("depth",))
    assert replace(ENCODERS, controls=CONTROLS).without_picture().controls == ()
    assert Reads().controls == ()


def test_controls_are_bounded_as_other_latents_are(tmp_path: Path) -> None:
    sample = encoded("basic_face", 0)
    with ShardWriter(tmp_path, replace(ENCODERS, controls=CONTROLS).identity(fps=8, rate_hz=8000)) as writer:
        for change, message in (
            ({"depth": np.zeros((4, 3, 2))}, "depth has shape [4, 3, 2]; expected 4 axes"),
            ({"pose": np.zeros((4, 0, 2, 2))}, "pose is empty"),
            ({"reference_image": np.full((4, 1, 2, 2), np.nan)}, "reference_image holds values that are not finite"),
            ({"depth": np.full((4, 1, 2, 2), 1e6)}, "depth exceeds float16's range"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                writer.add("basic_face", "train", replace(sample, **change))


def test_what_a_recipe_reads_decides_what_is_made_and_what_is_batched(tmp_path: Path) -> None:
    class Controlled(Config):
        @property
        def reads(self) -> Reads:
            return Reads(captions=("visual_speech",), reference_tokens=8, controls=("pose", "reference_image"))

    config = Controlled(
        data=DataConfig(
            fps=8.0, num_frames=9, height=32, width=32, rate_hz=8000, num_clips=2, subsets={"basic_face": 1.0},
            batch_size=2, cache_dir=str(tmp_path),
        ),
        codecs=CodecConfig(video="embedded", audio="embedded"),
        train=TrainConfig(steps=1, accelerator="cpu"),
    )  # fmt: skip
    encoders = build_encoders(config)
    data = build_datamodule(config, shard_roots(config), encoders)
    assert data.shards.identity["controls"] == "reference_image,pose"
    (batch,) = list(data.train_dataloader())
    assert batch.has_pose == batch.has_reference_image == batch.has_reference == (True, True)
    assert batch.depth is None and batch.pose is not None and batch.video_latents is not None
    assert batch.pose.shape == batch.video_latents.shape
    for prompt in batch.captions:
        split_visual_speech(prompt)
