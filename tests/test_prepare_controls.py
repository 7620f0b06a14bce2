"""`just prepare` for controlled generation: files beside a clip, its own voice apart from the window, prompts."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from avlit.codecs.build import build_audio_codec, build_text_encoder, build_video_codec
from avlit.commands.prepare import readiness
from avlit.errors import ConfigError
from avlit.media import read_audio, read_clip, write_mp4
from avlit.timing import Timing
from data.encode import Encoders, picture_latents, sound_latents
from data.prepare import own_reference
from data.prepare.config import load_prepare_config
from data.prepare.controls import GREY, build_annotators
from data.prepare.descriptions import Description, Rejected, describe
from data.prepare.own_reference import OwnReferences
from data.prepare.preparation import NothingKeptError, Preparation, prepare
from data.prepare.report import Report
from data.sample import CONTROLS
from data.shards import ShardSet

TIMING = Timing(fps=8, num_frames=9, height=16, width=16, rate_hz=16000)
WINDOW_S = 9 / 8
HOW = Preparation(
    timing=TIMING, stride_frames=9, heldout=0.0, default_subset="single_character", shard_samples=8, own_reference=True
)
VIDEO, AUDIO = build_video_codec("embedded"), build_audio_codec("embedded")
REFERENCE_S = 0.5
ENCODERS = Encoders(
    build_text_encoder("embedded"), video=VIDEO, audio=AUDIO, captions=("visual_speech",), controls=CONTROLS,
    reference_tokens=AUDIO.num_latents(REFERENCE_S),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_video(
    path: Path, seconds: float = 2.5, *, seed: int = 0, sound: np.ndarray | None = None, size: tuple = (16, 16),
    fps: float = 8,
) -> Path:  # fmt: skip
    """Frames each of its own grey, left half darker; without sound unless one is given."""
    levels = np.random.default_rng(seed).integers(60, 216, round(seconds * fps)).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (len(levels), *size, 3)).copy()
    frames[:, :, : size[1] // 2] -= 40
    path.parent.mkdir(parents=True, exist_ok=True)
    if sound is None:
        write_mp4(path, frames, fps=fps, scale=1)
    else:
        write_mp4(path, frames, fps=fps, waveform=sound, rate_hz=16000, scale=1)
    return path


def write_clip(folder: Path, name: str = "a", seconds: float = 2.5, *, seed: int = 0, record: Any = None) -> Path:
    """A clip whose sound is noise, and the record that describes it."""
    noise = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * 16000))
    clip = write_video(folder / f"{name}.mp4", seconds, seed=seed, sound=noise.astype(np.float32))
    record = {"caption": "A grey wall.", "transcript": ""} if record is None else record
    clip.with_suffix(".json").write_text(json.dumps(record))
    return clip


def prepared(source: Path, out: Path, how: Preparation = HOW, **given) -> Report:
    return prepare(
        source, out, how=how,
        **{"captions": None, "encoders": ENCODERS, "separator": None, "settings": {}, "progress": False, **given},
    )  # fmt: skip


def samples(root: Path, split: str = "train") -> list[Any]:  # of EncodedSample, of which a test knows what they have
    shards = ShardSet.open(root)
    found = [shards.read(number, index) for number, shard in shards.select(split) for index in range(shard.samples)]
    return sorted(found, key=lambda sample: sample.key)


def rejection(source: Path, out: Path, **given) -> str:
    with pytest.raises(NothingKeptError) as caught:
        prepared(source, out, **given)
    (file,) = caught.value.report.files
    assert not out.exists()
    return str(file.rejected)


# --- files beside a clip ---


def test_depth_and_pose_are_cut_by_the_windows_of_their_clip(tmp_path: Path):
    clip = write_clip(tmp_path / "clips", seconds=2.5)
    depth = write_video(tmp_path / "clips" / "a.depth.mp4", 2.5, seed=1, size=(32, 32))
    pose = write_video(tmp_path / "clips" / "a.pose.mp4", 2.5, seed=2)
    report = prepared(tmp_path / "clips", tmp_path / "shards")
    found = samples(tmp_path / "shards")
    assert len(found) == 2 and [file.file for file in report.files] == [clip.name]
    for number, sample in enumerate(found):
        for name, path in (("video_latents", clip), ("depth", depth), ("pose", pose)):
            whole = read_clip(path, fps=8, size=(16, 16), rate_hz=None).frames
            expected = picture_latents(whole[number * 9 :][:9], codec=VIDEO)
            np.testing.assert_array_equal(sample.arrays[name], expected.astype(np.float16), err_msg=name)
        assert sample.reference_image is None
        assert "depth: a.depth.mp4; pose: a.pose.mp4" in sample.annotation.source
    assert report.files[0].controls == {"depth": 2, "pose": 2}
    lines = report.lines()
    assert "Windows by control: depth 2, pose 2" in lines
    assert any(line.startswith("No clip has a reference_image (NAME.mask.png or NAME.refer") for line in lines)
    assert ShardSet.open(tmp_path / "shards").identity["controls"] == "depth,pose"


def test_the_reference_image_is_what_the_mask_keeps_of_the_first_frame_or_a_given_picture(tmp_path: Path):
    clip = write_clip(tmp_path / "clips")
    kept = np.zeros((32, 32), np.uint8)
    kept[8:24, 16:] = 1  # as label pictures have it
    Image.fromarray(kept).save(tmp_path / "clips" / "a.mask.png")
    prepared(tmp_path / "clips", tmp_path / "one")
    first = read_clip(clip, size=(16, 16), rate_hz=None).frames[0]
    given = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(given).save(tmp_path / "clips" / "a.reference.png")
    prepared(tmp_path / "clips", tmp_path / "two")
    (tmp_path / "clips" / "a.mask.png").unlink()
    prepared(tmp_path / "clips", tmp_path / "three")
    is_kept = kept[::2, ::2, None] > 0
    for out, picture in (
        ("one", np.where(is_kept, first, GREY)), ("two", np.where(is_kept, given, GREY)), ("three", given)
    ):  # fmt: skip
        for sample in samples(tmp_path / out):
            expected = picture_latents(picture[None].astype(np.uint8), codec=VIDEO)
            np.testing.assert_array_equal(sample.reference_image, expected.astype(np.float16), err_msg=out)


def test_a_clip_without_files_has_no_controls_beside_one_that_has(tmp_path: Path):
    write_clip(tmp_path / "clips", "a", 2.5)
    write_clip(tmp_path / "clips", "b", 2.5, seed=1)
    write_video(tmp_path / "clips" / "b.depth.mp4", 2.5)
    prepared(tmp_path / "clips", tmp_path / "shards")
    found = {sample.key.split("-")[1]: sample for sample in samples(tmp_path / "shards")}
    assert found["a"].depth is None and found["b"].depth is not None


def test_files_of_a_recipe_without_controls_are_not_looked_at(tmp_path: Path):
    write_clip(tmp_path / "clips")
    (tmp_path / "clips" / "a.depth.mp4").write_bytes(b"no film")
    prepared(tmp_path / "clips", tmp_path / "shards", encoders=replace(ENCODERS, controls=()))
    assert "controls" not in ShardSet.open(tmp_path / "shards").identity
    assert len(samples(tmp_path / "shards")) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: write_video(at / "a.depth.mp4", 2.0), r"a.depth.mp4: 2.00 s long, the clip 2.50 s; .*\(0.126 s\)"),
        (lambda at: write_video(at / "a.pose.mp4", 3.0), "a.pose.mp4: 3.00 s long, the clip 2.50 s"),
        (lambda at: write_video(at / "a.pose.mp4", size=(16, 24)), "a.pose.mp4: 24x16 pixels, the clip has 16x16"),
        (lambda at: (at / "a.depth.mp4").write_bytes(b"no film"), "a.depth.mp4: cannot be read as a media file"),
        (
            lambda at: soundfile.write(at / "a.depth.mp4", np.ones(16000), 16000, format="WAV"),
            "a.depth.mp4: has no video stream",
        ),
        (lambda at: (at / "a.mask.png").write_bytes(b"no picture"), "a.mask.png: cannot be read as a picture"),
        (
            lambda at: Image.new("L", (16, 16)).save(at / "a.mask.png"),
            "a.mask.png: is 0 everywhere, so nothing of the clip's first frame",
        ),
        (lambda at: Image.new("L", (16, 32), 9).save(at / "a.mask.png"), "a.mask.png: 16x32 pixels, the clip's first"),
        (
            lambda at: Image.new("RGB", (40, 16), (9, 9, 9)).save(at / "a.reference.png"),
            "a.reference.png: 40x16 pixels, the clip has 16x16",
        ),
    ],
)
def test_a_file_that_does_not_fit_its_clip_rejects_it_by_name(tmp_path: Path, make: Any, message: str):
    write_clip(tmp_path / "clips")
    make(tmp_path / "clips")
    why = rejection(tmp_path / "clips", tmp_path / "shards")
    assert re.match(message, why), why


@pytest.mark.parametrize("seconds", [2.5 - 1 / 8, 2.5, 2.5 + 1 / 8])
def test_a_control_may_differ_from_its_clip_by_a_frame(tmp_path: Path, seconds: float):
    write_clip(tmp_path / "clips", seconds=2.5)
    write_video(tmp_path / "clips" / "a.depth.mp4", seconds)
    how = replace(HOW, timing=replace(TIMING, num_frames=17))  # ends 3 frames before the clip
    prepared(tmp_path / "clips", tmp_path / "shards", how=replace(how, stride_frames=17))
    assert samples(tmp_path / "shards")[0].depth.shape[1] == 5


def test_a_clip_whose_sound_outlasts_it_takes_controls_as_long_as_its_picture(tmp_path: Path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(3 * 16000)
    clip = write_video(tmp_path / "clips" / "a.mp4", 2.25, sound=noise.astype(np.float32))
    clip.with_suffix(".json").write_text('{"caption": "A wall.", "transcript": ""}')
    write_video(tmp_path / "clips" / "a.depth.mp4", 2.25)
    prepared(tmp_path / "clips", tmp_path / "shards")
    assert len(samples(tmp_path / "shards")) == 2


# --- annotators ---


class Inverted:
    """Takes the dark for near, as an estimator of depth might."""

    control, name = "depth", "the inverse"

    def annotate(self, frames: np.ndarray, *, fps: float) -> np.ndarray | None:
        assert fps == 8
        return None if frames[0, 0, 0, 0] == 0 else 255 - frames


def test_an_annotator_makes_what_a_clip_has_no_file_for(tmp_path: Path):
    for seed, name in enumerate("ab"):
        write_clip(tmp_path / "clips", name, seed=seed)
    write_video(tmp_path / "clips" / "b.depth.mp4", seed=7)
    prepared(tmp_path / "clips", tmp_path / "shards", annotators=[Inverted()])
    for sample in samples(tmp_path / "shards"):
        name, number = sample.key.split("-")[1:]
        path = tmp_path / "clips" / ("a.mp4" if name == "a" else "b.depth.mp4")
        frames = read_clip(path, fps=8, size=(16, 16), rate_hz=None).frames[int(number) * 9 :][:9]
        expected = picture_latents(255 - frames if name == "a" else frames, codec=VIDEO)
        np.testing.assert_array_equal(sample.depth, expected.astype(np.float16))
        assert ("depth: the inverse" if name == "a" else "depth: b.depth.mp4") in sample.annotation.source
    assert ShardSet.open(tmp_path / "shards").identity["controls"] == "depth"


def test_annotators_are_found_among_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "estimators.py").write_text(
        "class Annotator:\n    def __init__(self, control):\n        self.control, self.name = control, 'mine'\n"
        "def depth():\n    return Annotator('depth')\ndef edges():\n    return Annotator('edges')\n"
    )
    package = tmp_path / "estimators-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: estimators\nVersion: 1.0\n")
    points = "[avlit.annotators]\nmine = estimators:depth\nother = estimators:depth\nwrong = estimators:edges\n"
    (package / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    assert build_annotators("") == ()
    assert [annotator.control for annotator in build_annotators("mine")] == ["depth"]
    for names, message in (
        ("theirs", "annotators=theirs: not installed; there are mine, other, wrong"),
        ("mine, other", "annotators=mine, other: two of them make depth"),
        ("wrong", "annotators=wrong: makes 'edges', none of reference_image"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_annotators(names)


# --- a voice of the clip's own ---


def test_references_are_cut_from_the_clip_where_its_window_is_not(tmp_path: Path):
    clip = write_clip(tmp_path / "clips", seconds=2 * WINDOW_S + 0.25)
    report = prepared(tmp_path / "clips", tmp_path / "shards")
    one, two = samples(tmp_path / "shards")
    sound = read_audio(clip, 16000, after_picture=True)

    def latents(start_s: float, end_s: float) -> np.ndarray:
        part = sound[round(start_s * 16000) : round(end_s * 16000)]
        return sound_latents(part, rate_hz=16000, codec=AUDIO).astype(np.float16)[: ENCODERS.reference_tokens]

    length_s = ENCODERS.reference_tokens / (AUDIO.num_latents(1000.0) / 1000)
    for sample, ends in (
        (one, [WINDOW_S + length_s, WINDOW_S + 2 * length_s]), (two, [WINDOW_S, WINDOW_S - length_s])
    ):  # fmt: skip
        assert len(sample.references) == len(ends)
        for reference, end_s in zip(sample.references, ends, strict=True):
            np.testing.assert_allclose(reference, latents(end_s - length_s, end_s), atol=2e-2)
    assert report.files[0].references == {"2": 2}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("start_s", "end_s"), [(0.0, 1.0), (0.3, 1.3), (1.5, 2.5), (2.0, 3.0), (0.2, 2.9)])
def test_no_reference_has_a_moment_of_its_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_s: float, end_s: float, before: bool
):
    moments = np.linspace(0.001, 3, 3 * 16000)  # each sample says when it is

    def read(path: Path, rate_hz: int, *, start_s: float, duration_s: float, after_picture: bool) -> np.ndarray:
        assert after_picture
        return moments[round(start_s * rate_hz) : round((start_s + duration_s) * rate_hz)]

    monkeypatch.setattr(own_reference, "read_audio", read)
    own = OwnReferences(tmp_path / "a.mp4", rate_hz=16000, duration_s=3.0, reference_s=0.4, only_before=before)
    sounds, last_s = own.of_window(start_s, end_s)
    heard = np.concatenate(sounds)
    assert not ((heard > start_s + 1e-3) & (heard < end_s - 1e-3)).any()
    assert last_s == pytest.approx(heard.max(), abs=2e-3) and len({sound[0] for sound in sounds}) == len(sounds)
    if before and start_s:
        assert heard.max() <= start_s + 1e-3
    assert all(len(sound) >= 0.1 * 16000 for sound in sounds)


@pytest.mark.parametrize(("seconds", "is_kept"), [(1.875, False), (2.0, True)])
def test_clips_under_two_seconds_are_rejected_with_the_reason(tmp_path: Path, seconds: float, is_kept: bool):
    write_clip(tmp_path / "clips", seconds=seconds)
    if is_kept:
        assert prepared(tmp_path / "clips", tmp_path / "shards").num_kept == 1
        return
    why = rejection(tmp_path / "clips", tmp_path / "shards")
    assert why.startswith("1.8") and "less than 2 s: too short for a reference voice apart from the window" in why
    prepared(tmp_path / "clips", tmp_path / "free", how=replace(HOW, own_reference=False))


def test_a_window_that_leaves_nothing_or_silence_has_no_voice_and_is_left_out(tmp_path: Path):
    how = replace(HOW, timing=replace(TIMING, num_frames=17), stride_frames=17)
    write_clip(tmp_path / "whole", seconds=17 / 8)
    assert "nothing is left of the clip" in rejection(tmp_path / "whole", tmp_path / "shards", how=how)
    sound = np.zeros(3 * 16000, np.float32)
    sound[: 17 * 2000] = 0.1
    clip = write_video(tmp_path / "mute" / "a.mp4", 3.0, sound=sound)
    clip.with_suffix(".json").write_text('{"caption": "A wall.", "transcript": ""}')
    assert "what is left of the clip is silent" in rejection(tmp_path / "mute", tmp_path / "shards", how=how)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_voice_beside_the_clip_is_mixed_and_resampled(tmp_path: Path, channels: int):
    write_clip(tmp_path / "clips", seconds=1.25)  # too short for one of its own
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(REFERENCE_S * 44100)) / 44100)
    both = np.stack([tone + 0.1, tone - 0.1], axis=1)  # whose mean is the tone
    soundfile.write(tmp_path / "clips" / "a.reference.wav", both if channels == 2 else tone, 44100, subtype="FLOAT")
    prepared(tmp_path / "clips", tmp_path / "shards")
    (sample,) = samples(tmp_path / "shards")
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(REFERENCE_S * 16000)) / 16000)
    wanted = sound_latents(expected, rate_hz=16000, codec=AUDIO)
    (reference,) = sample.references
    inner = slice(2, min(len(wanted), len(reference)) - 2)  # a resampler rings at the ends
    np.testing.assert_allclose(reference[inner], wanted[inner], atol=0.1)


def test_a_voice_beside_the_clip_that_cannot_be_used_is_named(tmp_path: Path):
    write_clip(tmp_path / "clips")
    for data, message in (
        (np.zeros(16000), "a.reference.wav: silent"),
        (np.ones(100), "a.reference.wav: 0.006 s long"),
    ):
        soundfile.write(tmp_path / "clips" / "a.reference.wav", data, 16000)
        assert rejection(tmp_path / "clips", tmp_path / "shards").startswith(message)
    (tmp_path / "clips" / "a.reference.wav").write_bytes(b"no sound")
    assert "a.reference.wav: cannot be read" in rejection(tmp_path / "clips", tmp_path / "shards")


def test_clips_of_several_voices_have_no_reference_and_are_kept(tmp_path: Path):
    record = {"caption": "Two talk.", "subset": "multiple_characters", "transcript": "hello you"}
    write_clip(tmp_path / "clips", seconds=1.25, record=record)
    prepared(tmp_path / "clips", tmp_path / "shards")
    (sample,) = samples(tmp_path / "shards")
    assert sample.references == ()


def test_training_never_hears_what_is_held_out(tmp_path: Path):
    clip = write_clip(tmp_path / "clips", seconds=6 * WINDOW_S)
    report = prepared(tmp_path / "clips", tmp_path / "shards", how=replace(HOW, heldout=0.3))
    train, heldout = samples(tmp_path / "shards"), samples(tmp_path / "shards", "heldout")
    assert len(train) == 4 and len(heldout) == 2 and not report.files[0].left_out
    held_s = 4 * WINDOW_S
    sound = read_audio(clip, 16000, after_picture=True)
    spoken = {
        round(start_s, 3): sound_latents(sound[round(start_s * 16000) :][:8000], rate_hz=16000, codec=AUDIO)
        for start_s in np.arange(0, 6 * WINDOW_S - 0.5, 1 / 16)
    }
    for sample in train:
        for reference in sample.references:
            errors = {at: float(np.abs(each[: len(reference)] - reference).mean()) for at, each in spoken.items()}
            at = min(errors, key=lambda each: errors[each])
            assert at + REFERENCE_S <= held_s + 0.1, at


def test_a_window_whose_only_voice_is_held_out_is_left_out(tmp_path: Path):
    write_clip(tmp_path / "clips", seconds=2 * WINDOW_S)
    report = prepared(tmp_path / "clips", tmp_path / "shards", how=replace(HOW, heldout=0.3))
    assert report.files[0].left_out == {"its only reference voice is in the held-out windows": 1}
    assert report.files[0].kept == {"heldout": 1}


# --- prompts ---


def prompt(record: dict) -> str:
    description = describe(record, default_subset="single_character").with_prompt(free=False)
    return description.captions["visual_speech"]


def test_prompts_are_made_of_what_is_seen_and_said():
    person = {"persons": [{"id": "A", "appearance": "a tall man"}]}
    assert prompt({"caption": "A man.", "transcript": "hello\n you"}) == "[VISUAL]: A man. [SPEECH]: hello you"
    assert prompt({**person, "scene": "He waits", "transcript": "hi"}) == "[VISUAL]: a tall man. He waits. [SPEECH]: hi"
    assert prompt({"caption": "Rain.", "transcript": ""}) == "[VISUAL]: Rain. [SPEECH]: No speech."
    assert prompt({"caption": "Rain.", "num_speakers": 0}) == "[VISUAL]: Rain. [SPEECH]: No speech."


def test_prompts_that_are_given_stay_as_they_are():
    given = "[VISUAL]: A man waves. [SPEECH]: good morning"
    assert prompt({"caption": given}) == given
    assert prompt({"caption": "Else.", "transcript": "more", "captions": {"visual_speech": given}}) == given


def test_other_prompts_are_refused_unless_asked_for():
    record = {"caption": "A man.", "captions": {"visual_speech": "A man says hi"}}
    for wrong, message in ((record, "'A man says hi': must be of the form"), ({"caption": "A man."}, "is not known")):
        described = describe(wrong, default_subset="single_character")
        with pytest.raises(Rejected, match=f"{message}.*free_prompts=true"):
            described.with_prompt(free=False)
        assert described.with_prompt(free=True) == described


def test_a_clip_of_unknown_words_is_rejected_with_the_remedy_or_taken_as_it_is(tmp_path: Path):
    write_clip(tmp_path / "clips", record={"caption": "A grey wall."})
    assert "say it in its `transcript`" in rejection(tmp_path / "clips", tmp_path / "shards")
    prepared(tmp_path / "clips", tmp_path / "free", how=replace(HOW, free_prompts=True))
    assert {sample.annotation.caption for sample in samples(tmp_path / "free")} == {"A grey wall."}


WORDS = [
    {"word": "good", "start_s": 0.2, "end_s": 0.5}, {"word": "morning", "start_s": 0.9, "end_s": 1.3},
    {"word": "sea", "start_s": 1.6, "end_s": 1.9},
]  # fmt: skip


def test_words_with_times_are_prompted_in_the_window_that_holds_their_middle(tmp_path: Path):
    record = {
        "caption": "A wall.",
        "words": WORDS,
        "captions": {"video": "A white wall.", "short": "Good morning sea!"},
    }
    write_clip(tmp_path / "clips", seconds=2 * WINDOW_S, record=record)
    prepared(tmp_path / "clips", tmp_path / "shards")
    one, two = samples(tmp_path / "shards")
    assert one.annotation.captions == {"visual_speech": "[VISUAL]: A white wall. [SPEECH]: good morning"}
    assert two.annotation.captions == {"visual_speech": "[VISUAL]: A white wall. [SPEECH]: sea"}
    assert (one.annotation.transcript, two.annotation.transcript) == ("good morning", "sea")


def test_the_words_of_a_given_prompt_are_those_of_the_window():
    record = {"caption": "[VISUAL]: A wall. [SPEECH]: good morning sea", "words": WORDS}
    whole = describe(record, default_subset="single_character")
    assert whole.transcript == "good morning sea"
    late = whole.in_window(1.5, 9).with_prompt(free=False)
    assert late.captions["visual_speech"] == "[VISUAL]: A wall. [SPEECH]: sea"
    assert whole.in_window(3, 9).with_prompt(free=False).captions["visual_speech"].endswith("[SPEECH]: No speech.")


def test_a_long_clips_words_without_times_are_no_windows_prompt(tmp_path: Path):
    for record in ({"caption": "A wall.", "transcript": "good morning sea"}, {"caption": "[VISUAL]: A. [SPEECH]: sea"}):
        write_clip(tmp_path / "clips", seconds=2 * WINDOW_S, record=record)
        assert "with times in its `words`" in rejection(tmp_path / "clips", tmp_path / "shards")


@pytest.mark.parametrize(
    "words", ["hello", [1], [{"word": "a"}], [{"word": "a", "start_s": 2, "end_s": 1}],
              [{"word": " ", "start_s": 0, "end_s": 1}], [{"word": "a", "start_s": True, "end_s": 1}],
              [{"word": "a", "start_s": float("nan"), "end_s": 1}]],
)  # fmt: skip
def test_words_that_make_no_sense_are_refused(words: object):
    with pytest.raises(ValueError, match="words: "):
        describe({"caption": "A wall.", "words": words}, default_subset="single_character")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("free_prompts=true", "free_prompts=true: recipe=unitalking_stage2 reads captions of any form"),
        ("annotators=mine", "annotators=mine: recipe=unitalking_stage2 reads no controls"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, word: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_prepare_config([f"source={tmp_path}", f"out={tmp_path / 'out'}", "recipe=unitalking_stage2", word])


def test_training_leaves_out_tasks_that_no_clip_has_a_control_for_but_needs_a_reference_image(tmp_path: Path):
    config = load_prepare_config([f"source={tmp_path}", f"out={tmp_path / 'out'}", "recipe=mmcontrol"])
    left_out = readiness(config, Report({}, no_controls=("depth", "pose")))
    assert left_out.startswith("ready for `just train recipe=mmcontrol ")
    assert left_out.endswith(" tasks.depth=0 tasks.pose=0`")
    assert "tasks." not in readiness(config, Report({}))
    lacking = readiness(config, Report({}, no_controls=("reference_image", "pose")))
    assert lacking == "written, but recipe=mmcontrol does not train without reference_image, which no clip has"


def test_a_description_without_words_stays_what_it_was():
    assert Description("A wall.", ("basic_face",)).without_words() == Description("A wall.", ("basic_face",))
