"""`just prepare` for sound without picture: names, lengths, references of the same voice, splits that do not leak."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from avlit.__main__ import main
from avlit.codecs.build import build_audio_codec, build_text_encoder
from avlit.codecs.mmaudio import LATENT_STATS
from avlit.errors import ConfigError, UserError
from avlit.media import read_audio, write_mp4
from avlit.timing import Timing
from data.encode import Encoders
from data.prepare.config import load_prepare_config
from data.prepare.names import NamePattern
from data.prepare.preparation import NothingKeptError, Preparation, prepare
from data.prepare.report import REPORT, Report
from data.prepare.sources import find_clips
from data.prepare.splits import Splitter
from data.sample import EncodedSample
from data.shards import ShardSet

DIGITS = Path(__file__).parents[2] / "shared" / "media" / "digits"
WORDS = ("zero", "one", "two", "three")
PATTERN = "{digit}_{speaker}_{take}"
TINY = Timing(fps=12, num_frames=25, height=64, width=64, rate_hz=16000)
HOW = Preparation(
    timing=TINY, stride_frames=25, heldout=0.0, default_subset="single_character", shard_samples=64,
    pattern=NamePattern(PATTERN), length_step_s=0.64,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_noise(path: Path, seconds: float, *, seed: int = 0, rate_hz: int = 8000, level: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = level * np.random.default_rng(seed).standard_normal(round(seconds * rate_hz))
    soundfile.write(path, sound.astype(np.float32), rate_hz)
    return path


def write_digits(folder: Path, *, speakers: tuple[str, ...] = ("ann", "ben"), takes: int = 3) -> Path:
    """Noise of its own for each of `DIGIT_SPEAKER_TAKE.wav`, 0.3 to 0.4 s."""
    names = [f"{d}_{who}_{take}" for d in range(len(WORDS)) for who in speakers for take in range(takes)]
    for seed, name in enumerate(names):
        write_noise(folder / f"{name}.wav", 0.3 + 0.1 * seed / len(names), seed=seed)
    return folder


def speaking() -> Encoders:
    return Encoders(
        text=build_text_encoder("embedded"), audio=build_audio_codec("embedded"), captions=("speech",),
        reference_tokens=64,
    )  # fmt: skip


def prepared(source: Path, out: Path, how: Preparation = HOW, **given) -> Report:
    return prepare(
        source, out, how=how,
        **{"captions": None, "encoders": speaking(), "separator": None, "settings": {}, "progress": False, **given},
    )  # fmt: skip


def samples(root: Path, *, split: str | None = None) -> dict[str, Any]:  # of EncodedSample
    """File name without suffix, and window number if not 0 -> sample."""
    shards = ShardSet.open(root)
    found = {}
    for number, shard in enumerate(shards.shards):
        for index in range(shard.samples if split in (None, shard.split) else 0):
            sample = shards.read(number, index, sound=True)
            name, window = sample.key.removeprefix("single_character-").rsplit("-", 1)
            found[name if int(window) == 0 else f"{name}-{int(window)}"] = sample
    return found


def sounds_heard(sample: EncodedSample, there: dict[str, Any]) -> list[str]:
    """Names of the sounds that a sample's references are."""
    heard = []
    for reference in sample.references:
        (name,) = [
            name for name, each in there.items() if np.array_equal(each.audio_latents[: len(reference)], reference)
        ]
        heard.append(name)
    return heard


# --- names and texts ---


def test_a_names_fields_are_digit_and_speaker_and_others_are_only_parsed():
    assert NamePattern(PATTERN).read("7_george_31") == {"speaker": "george", "transcript": "seven"}
    assert NamePattern("{speaker}-{transcript}").read("ann-how_are you") == {
        "speaker": "ann", "transcript": "how are you",
    }  # fmt: skip


@pytest.mark.parametrize("stem", ["7_george", "7_mary_ann_3", "_george_3", "7-george-3", "x7_george_3_"])
def test_a_name_that_does_not_fit_is_refused(stem: str):
    with pytest.raises(ValueError, match=r"its name does not fit pattern=\{digit\}_\{speaker\}_\{take\}"):
        NamePattern(PATTERN).read(stem)


@pytest.mark.parametrize("digit", ["12", "x", "²"])
def test_a_digit_is_one_of_ten(digit: str):
    with pytest.raises(ValueError, match=f"is {digit!r}: must be 0 to 9"):
        NamePattern(PATTERN).read(f"{digit}_ann_3")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{take}_{room}", r"has none of \{speaker\}, \{transcript\}, \{digit\}"),
        ("speaker", "has none of"),
        ("{speaker}{digit}", "two fields touch"),
        ("{speaker}_{speaker}", r"\{speaker\} is there twice"),
        ("{digit}_{transcript}", "keep one"),
        ("{digit_{speaker}", "write fields as"),
        ("{digit}_{}", r"\{\} is no field"),
        ("{digit:d}_{speaker}", r"\{digit:d\} is no field"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(tmp_path: Path, pattern: str, message: str):
    words = [f"source={tmp_path}", f"out={tmp_path / 'out'}", "recipe=unitalking_stage1", f"pattern={pattern}"]
    with pytest.raises(ConfigError, match=message) as caught:
        load_prepare_config(words)
    assert str(caught.value).startswith(f"pattern={pattern}: ")


def test_a_transcript_becomes_the_speech_caption(tmp_path: Path):
    prepared(write_digits(tmp_path / "digits"), tmp_path / "shards")
    for name, sample in samples(tmp_path / "shards").items():
        word = WORDS[int(name[0])]
        note = sample.annotation
        assert (note.caption, note.captions) == (f"Speech: {word}.", {"speech": f"Speech: {word}."})
        assert note.transcript == word
        assert note.source.endswith(f" s; speaker: {name[2:5]}")
        np.testing.assert_array_equal(sample.texts["speech"], sample.texts["caption"])


def test_texts_come_from_the_list_then_json_then_text_then_the_name(tmp_path: Path):
    source = tmp_path / "sounds"
    for seed, name in enumerate(("0_ann_0", "1_ann_0", "2_ann_0", "3_ann_0")):
        write_noise(source / f"{name}.wav", 0.3, seed=seed)
    for name in ("0_ann_0", "1_ann_0"):
        (source / f"{name}.json").write_text('{"caption": "Somebody speaks.", "transcript": "json", "speaker": "cat"}')
    (source / "2_ann_0.txt").write_text("said\n in text ")
    (source / "list.jsonl").write_text('{"file": "0_ann_0.wav", "transcript": "listed"}')
    report = prepared(source, tmp_path / "shards", captions=source / "list.jsonl")
    notes = {name: sample.annotation for name, sample in samples(tmp_path / "shards").items()}
    assert {name: (note.caption, note.captions["speech"]) for name, note in notes.items()} == {
        "0_ann_0": ("Speech: listed.", "Speech: listed."),
        "1_ann_0": ("Somebody speaks.", "Speech: json."),
        "2_ann_0": ("Speech: said in text.", "Speech: said in text."),
        "3_ann_0": ("Speech: three.", "Speech: three."),
    }
    assert {file.file[:7]: file.speaker for file in report.files} == {
        "0_ann_0": "ann", "1_ann_0": "cat", "2_ann_0": "ann", "3_ann_0": "ann",
    }  # fmt: skip


def test_without_a_text_a_sound_is_rejected_with_the_remedy(tmp_path: Path):
    write_noise(tmp_path / "sounds" / "0_ann_0.wav", 0.3)
    with pytest.raises(NothingKeptError) as caught:
        prepared(tmp_path / "sounds", tmp_path / "shards", replace(HOW, pattern=None))
    assert caught.value.report.files[0].rejected == (
        "no caption: no 0_ann_0.json or 0_ann_0.txt beside it; where file names say what is spoken, give pattern=…"
    )


# --- which files, and how long ---


def test_sounds_of_every_kind_and_clips_are_found_and_stems_of_others_are_not(tmp_path: Path):
    write_noise(tmp_path / "0_ann_0.flac", 0.3, seed=1)
    write_noise(tmp_path / "0_ann_1.ogg", 0.3, seed=2)
    write_noise(tmp_path / "0_ann_2.mp3", 0.3, seed=3, rate_hz=16000)
    sound = read_audio(write_noise(tmp_path / "x.wav", 1.0, seed=4), 16000)
    (tmp_path / "x.wav").rename(tmp_path / "0_ann_3.speech.wav")  # a stem
    write_mp4(tmp_path / "0_ann_3.mp4", np.zeros((12, 16, 16, 3), np.uint8), fps=12, waveform=sound, rate_hz=16000)
    write_noise(tmp_path / "1_ann_4.speech.wav", 0.3, seed=5)  # of nothing that is there
    (tmp_path / "notes.txt").write_text("no sound")
    names = [path.name for path in find_clips(tmp_path, suffixes=HOW.suffixes)]
    assert names == ["0_ann_0.flac", "0_ann_1.ogg", "0_ann_2.mp3", "0_ann_3.mp4", "1_ann_4.speech.wav"]
    report = prepared(tmp_path, tmp_path / "shards")
    kept = {file.file for file in report.files if file.kept}
    assert kept == set(names)
    assert all(sample.video_latents is None for sample in samples(tmp_path / "shards").values())


@pytest.mark.parametrize(
    ("seconds", "shape"), [(0.1, "640ms"), (0.64, "640ms"), (0.6401, "1280ms"), (1.3, "1920ms"), (2.0, "2083ms")]
)
def test_sounds_are_followed_by_silence_to_a_step_or_the_recipes_length(tmp_path: Path, seconds: float, shape: str):
    path = write_noise(tmp_path / "sounds" / "0_ann_0.wav", seconds, rate_hz=16000)
    prepared(path.parent, tmp_path / "shards")
    (sample,) = samples(tmp_path / "shards").values()
    heard = read_audio(path, 16000)
    assert sample.annotation.shape == shape and sample.annotation.num_frames == 0
    assert len(sample.waveform) == round(sample.annotation.duration_s * 16000)
    np.testing.assert_allclose(sample.waveform[: len(heard)], heard, atol=1e-4)
    assert not sample.waveform[len(heard) :].any()
    assert len(sample.audio_latents) == -(-len(sample.waveform) // 256)


def test_a_longer_sound_is_cut_and_loses_its_transcript(tmp_path: Path):
    path = write_noise(tmp_path / "sounds" / "a.wav", 5.0)
    record = {"caption": "Somebody reads.", "captions": {"speech": "Speech: so much."}, "transcript": "so much"}
    path.with_suffix(".json").write_text(json.dumps(record))
    report = prepared(path.parent, tmp_path / "shards", replace(HOW, pattern=None))
    found = samples(tmp_path / "shards")
    assert {sample.annotation.shape for sample in found.values()} == {"2083ms"} and len(found) == 2
    whole = read_audio(path, 16000)
    for number, sample in enumerate(found.values()):
        assert (sample.annotation.transcript, sample.annotation.captions) == ("", {})
        start = round(number * TINY.duration_s * 16000)
        np.testing.assert_allclose(sample.waveform, whole[start : start + 33333], atol=1e-4)
    assert report.files[0].notes == [
        "its transcript is the whole clip's and is left out of the windows",
        "its last 0.83 s are less than a window of 2.08 s and are left out",
    ]


def test_sounds_that_cannot_be_used_are_rejected_with_the_reason(tmp_path: Path):
    source = tmp_path / "sounds"
    write_noise(source / "0_ann_0.wav", 0.3)
    write_noise(source / "0_ann_1.wav", 0.05)
    write_noise(source / "0_ann_2.wav", 0.3, level=1e-5)
    write_noise(source / "0_ann_3.wav", 2.2)
    (source / "0_ann_4.wav").write_bytes(b"RIFF no sound")
    (source / "0_ann_5.wav").write_bytes((source / "0_ann_0.wav").read_bytes())
    write_noise(source / "ann.wav", 0.3, seed=3)
    write_mp4(source / "0_ann_6.mp4", np.zeros((12, 16, 16, 3), np.uint8), fps=12)
    report = prepared(source, tmp_path / "shards")
    rejected = {file.file: file.rejected for file in report.files}
    expected = {
        "0_ann_1.wav": "too short: 0.050 s; a sound needs 0.1 s",
        "0_ann_2.wav": "silent, below -60 dB (1 of its windows)",
        "0_ann_3.wav": "2.20 s, longer than the recipe's 2.08 s, and its caption is its transcript",
        "0_ann_4.wav": "cannot be read as a media file",
        "0_ann_5.wav": "the same file as 0_ann_0.wav",
        "0_ann_6.mp4": "has no audio stream",
        "ann.wav": "its name does not fit pattern=",
    }
    assert rejected.pop("0_ann_0.wav") is None
    assert rejected.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in str(rejected[name]), name


@pytest.mark.parametrize(
    ("suffix", "reason"), [("flac", "cannot be decoded"), ("mp3", "is cut off; it declares 0.60 s"), ("ogg", "cannot")]
)
def test_a_recording_that_breaks_off_is_rejected_as_words_are_lost(tmp_path: Path, suffix: str, reason: str):
    path = write_noise(tmp_path / "sounds" / f"0_ann_0.{suffix}", 0.6, rate_hz=44100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(NothingKeptError) as caught:
        prepared(path.parent, tmp_path / "shards")
    assert reason in str(caught.value.report.files[0].rejected)


def test_include_chooses_takes_and_the_report_counts_the_others(tmp_path: Path):
    source = write_digits(tmp_path / "digits", takes=12)
    report = prepared(source, tmp_path / "shards", replace(HOW, include="*_[0-9]"), settings={"include": "*_[0-9]"})
    assert {name.rsplit("_", 1)[1] for name in samples(tmp_path / "shards")} == set("0123456789")
    assert report.num_kept == 80 and report.passed_over == 16
    assert "Passed over 16 files that include=*_[0-9] does not name" in report.lines()
    with pytest.raises(UserError, match=r"include=7_\*: names none of the 96 media files"):
        prepared(source, tmp_path / "more", replace(HOW, include="7_*"))


# --- references and splits ---


def test_references_are_three_other_sounds_of_the_speaker_with_other_words_and_on_the_same_side(tmp_path: Path):
    source = write_digits(tmp_path / "digits", takes=6)
    report = prepared(source, tmp_path / "shards", replace(HOW, heldout=0.25))
    chosen = {}
    for side in ("train", "heldout"):
        there = samples(tmp_path / "shards", split=side)
        for name, sample in there.items():
            heard = sounds_heard(sample, there)
            chosen[name] = tuple(heard)
            assert len(set(heard)) == 3 and name not in heard
            assert {other[2:5] for other in heard} == {name[2:5]}
            if side == "train":
                assert all(other[0] != name[0] for other in heard)
            for reference, other in zip(sample.references, heard, strict=True):  # without the silence that was added
                assert len(reference) == math.ceil(soundfile.info(source / f"{other}.wav").duration * 62.5)
    assert len(chosen) == 48 and len(set(chosen.values())) > 40
    again = prepared(source, tmp_path / "again", replace(HOW, heldout=0.25))
    assert again.counts() == report.counts()
    for side in ("train", "heldout"):
        there = samples(tmp_path / "again", split=side)
        for name, sample in there.items():
            assert tuple(sounds_heard(sample, there)) == chosen[name]


def test_the_held_out_share_is_spread_over_speakers(tmp_path: Path):
    speakers = {f"{who}{number}.wav": who for who in ("ann", "ben") for number in range(40)}
    speakers |= {f"rare{number}.wav": f"rare{number}" for number in range(20)}
    splitter = Splitter(
        dict.fromkeys(speakers, ("single_character",)), 0.1, speakers=speakers, are_utterances=True
    )  # fmt: skip
    held: dict[str, int] = {}
    for name in splitter.order:
        mode = splitter.mode(name)
        assert mode in ("train", "heldout")
        splitter.note(name, held_windows=int(mode == "heldout"))
        who = speakers[name][:4].rstrip("0123456789")
        held[who] = held.get(who, 0) + (mode == "heldout")
    assert held == {"ann": 4, "ben": 4, "rare": 2}
    followed = [speakers[name] for name in splitter.order]
    assert sum(one != other for one, other in itertools.pairwise(followed)) == len(set(followed)) - 1


def test_few_sounds_still_hold_out_one_and_a_single_one_is_for_training(tmp_path: Path):
    source = tmp_path / "sounds"
    write_noise(source / "0_ann_0.wav", 0.3)
    assert prepared(source, tmp_path / "one", replace(HOW, heldout=0.1)).files[0].kept == {"train": 1}
    write_noise(source / "0_ann_1.wav", 0.3, seed=1)
    report = prepared(source, tmp_path / "two", replace(HOW, heldout=0.1))
    assert report.counts()["single_character"] == {"train": 1, "heldout": 1}
    assert all(not sample.references for sample in samples(tmp_path / "two").values())


# --- the command ---


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("separator=simple", "separator=simple: has no effect while codecs.tracks=none"),
        ("stride=1", "stride=1: has no effect while codecs.video=none"),
        ("data.height=32", "data.height=32: has no effect while codecs.video=none"),
        ("length_step_s=0", "length_step_s=0 .*at least 0.02"),
        ("measure_latents=true", "measure_latents=true: has no effect while codecs.audio=embedded"),
    ],
)
def test_words_without_effect_on_sound_alone_are_refused(tmp_path: Path, word: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_prepare_config([f"source={tmp_path}", f"out={tmp_path / 'out'}", "recipe=unitalking_stage1", word])


def test_what_was_prepared_from_sounds_trains_the_audio_branch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = write_digits(tmp_path / "digits"), tmp_path / "shards"
    words = [f"source={source}", f"out={out}", "recipe=unitalking_stage1", f"pattern={PATTERN}"]
    assert main(["prepare", *words]) == 0
    printed = capsys.readouterr().out
    assert "Files by speaker: ann 12, ben 12" in printed
    assert "Windows by length: 640ms 24" in printed
    assert "Windows by number of references: " in printed
    report = json.loads((out / REPORT).read_text())
    assert report["kept"] == {"single_character": {"train": 20, "heldout": 4}}
    (train,) = [line.partition("just train ")[2].rstrip("`") for line in printed.splitlines() if "just train" in line]
    settings = [
        "train.steps=2", "data.batch_size=2", "validation.clips=0", "sample.count=0",
        f"runs_dir={tmp_path / 'runs'}", "model.num_layers=1",
    ]  # fmt: skip
    assert main(["train", *train.split(), *settings]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert list((run / "checkpoints").glob("*2"))


def test_latents_that_were_measured_are_normalised_by_channel_and_of_an_identity_of_their_own(
    tmp_path: Path, mmaudio_folder: Path, capsys: pytest.CaptureFixture[str]
):
    source, folder = write_digits(tmp_path / "digits", takes=1), tmp_path / "MMAudio"
    write_noise(source / "0_cat_0.wav", 7.0, rate_hz=44100, seed=99)  # several windows
    (source / "0_cat_0.json").write_text('{"caption": "A noise."}')
    write_noise(source / "nobody.wav", 7.0, rate_hz=44100, seed=98)  # not described, so not prepared
    write_noise(source / "0_ann_8.wav", 0.3, level=1e-5)
    (source / "0_ann_9.wav").write_bytes(b"RIFF no sound")
    shutil.copytree(mmaudio_folder, folder)
    words = [f"source={source}", "recipe=unitalking_stage1", f"pattern={PATTERN}", "data.peak=0.5"]
    words += ["codecs.audio=mmaudio", f"codecs.audio_weights={folder}"]

    assert main(["prepare", *words, f"out={tmp_path / 'scaled'}"]) == 0
    assert "latents are only multiplied by the codec's own factor; measure_latents=true" in capsys.readouterr().out
    assert main(["prepare", *words, f"out={tmp_path / 'measured'}", "measure_latents=true"]) == 0
    assert "only multiplied" not in capsys.readouterr().out
    scaled, measured = ShardSet.open(tmp_path / "scaled"), ShardSet.open(tmp_path / "measured")
    assert scaled.identity["audio_codec"] != measured.identity["audio_codec"]
    before, after = (
        np.concatenate([each.audio_latents for each in samples(tmp_path / name).values()]).astype(np.float64)
        for name in ("scaled", "measured")
    )
    assert before.shape == after.shape and after.shape[1] == 40
    np.testing.assert_allclose(after.mean(0), 0, atol=5e-3)
    np.testing.assert_allclose(after.std(0), 1, atol=5e-3)
    assert np.abs(before.std(0) - 1).max() > 0.1

    stats = (folder / LATENT_STATS).read_bytes()
    assert main(["prepare", *words, f"out={tmp_path / 'again'}", "measure_latents=true"]) != 0
    assert f"{LATENT_STATS} is there already" in capsys.readouterr().err
    assert (folder / LATENT_STATS).read_bytes() == stats and not (tmp_path / "again").exists()
    (folder / LATENT_STATS).unlink()
    assert main(["prepare", *words, f"out={tmp_path / 'none'}", "measure_latents=true", "include=nobody"]) != 0
    assert "has no sound that can be used" in capsys.readouterr().err and not (folder / LATENT_STATS).exists()
    assert main(["prepare", *words, f"out={tmp_path / 'again'}", "measure_latents=true"]) == 0
    assert (folder / LATENT_STATS).read_bytes() == stats


@pytest.mark.skipif(not DIGITS.is_dir(), reason=f"the shared digits are not there: {DIGITS}")
def test_real_digits_are_prepared_with_a_reference_of_another_take(tmp_path: Path):
    how = replace(HOW, include="*_[0-2]", heldout=0.1)
    report = prepared(DIGITS, tmp_path / "shards", how)
    assert report.num_kept == 180 and not any(file.rejected for file in report.files)
    assert report.counts()["single_character"] == {"train": 162, "heldout": 18}
    there = samples(tmp_path / "shards", split="train")
    for name, sample in list(there.items())[:20]:
        digit, speaker, _ = name.split("_")
        heard = [other.split("_") for other in sounds_heard(sample, there)]
        assert len(heard) == 3
        assert all(who == speaker and other != digit for other, who, _ in heard)
