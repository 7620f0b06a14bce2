"""`just sample`: what a clip shows and sounds like follows its request, to the bit; what cannot be made says why."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.checkpoints import CheckpointState, save_checkpoint
from avlit.commands.abilities import Abilities
from avlit.commands.assembly import build_encoders, build_module
from avlit.commands.clips import write_clips
from avlit.commands.generation import Generator
from avlit.commands.plan import window_seed
from avlit.commands.request import Request
from avlit.config import load_config, to_yaml
from avlit.errors import UserError
from avlit.media import probe, read_audio, read_clip, read_image
from avlit.runs import create_run
from avlit.sampling import Latents
from data.batches import Contents, collate
from data.corpus import CorpusSettings, make_clip
from data.datamodule import HeldoutClip
from data.encode import encode_clip

SMALL = (
    "model.num_layers=2", "model.num_heads=2", "model.num_interaction_blocks=1", "model.audio_hidden=32",
    "data.num_frames=9", "sample.steps=2", "train.threads=1",
)  # fmt: skip
FRAMES, ADDED, FPS = 9, 4, 12
"""Frames of a window, and how many each further one adds."""


def make_run(runs_dir: Path, *words: str) -> None:
    """A run with weights that nobody trained, all of which have an effect."""
    config = load_config([*SMALL, f"runs_dir={runs_dir}", *words])
    run = create_run(runs_dir, config.recipe)
    run.write_config(to_yaml(config))
    module, draw = build_module(config), torch.Generator().manual_seed(7)
    weights = {
        name: tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in module.saved_weights().items()
    }
    state = CheckpointState(step=3, seed=0, recipe=config.recipe, run=run.id)
    save_checkpoint(run.checkpoints_dir, weights=weights, state=state)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage with two speakers, `last`, and one with one, `one-speaker`."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "one", "recipe=mtv_stage1")
    make_run(folder, "recipe=mtv_stage3")
    return folder


@pytest.fixture(scope="module")
def generator(runs: Path) -> Generator:
    return Generator.of_run("last", runs_dir=runs)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Sounds of a second each by name, and one of three seconds."""
    folder = tmp_path_factory.mktemp("sounds")
    time = np.arange(16000) / 16000
    tones = {"low": 200, "high": 900, "other": 430}
    found = {name: 0.3 * np.sin(2 * np.pi * hertz * time * (1 + 0.2 * time)) for name, hertz in tones.items()}
    found["long"] = np.concatenate([found["low"], found["high"], found["other"]])
    for name, sound in found.items():
        soundfile.write(folder / f"{name}.wav", sound, 16000)
    return {name: folder / f"{name}.wav" for name in found}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth picture twice as wide as high, upright, with a bright middle."""
    path = tmp_path_factory.mktemp("images") / "wide.png"
    y, x = np.mgrid[0:100, 0:200]
    brightness = 60 + 150 * np.exp(-(((x - 100) / 40) ** 2) - ((y - 50) / 40) ** 2)
    Image.fromarray(brightness.astype(np.uint8)).convert("RGB").save(path)
    return path


def frames_of(generator: Generator, request: Request) -> np.ndarray:
    return generator(request).frames


def test_a_clip_has_the_frames_and_the_sound_of_its_request(runs, sounds, tmp_path, capsys):
    out = tmp_path / "new" / "a.mp4"
    words = ["run=last", f"runs_dir={runs}", "prompt=A face.", f"speech={sounds['low']}", f"out={out}"]
    assert avlit(["sample", *words]) == 0
    clip, source = read_clip(out), read_audio(sounds["low"], 16000)[:12000]
    assert clip.frames.shape[0] == FRAMES and clip.fps == FPS and probe(out).rate_hz == 48000
    assert clip.waveform is not None and clip.waveform.shape == source.shape
    assert np.corrcoef(clip.waveform, source)[0, 1] > 0.99
    assert np.sqrt(np.mean(clip.waveform**2) / np.mean(source**2)) == pytest.approx(1, abs=0.02)
    printed = capsys.readouterr().out
    assert "duration_s=1.00 would use all of it" in printed and str(out) in printed


def test_the_same_words_write_the_same_bytes_and_another_seed_others(runs, sounds, tmp_path):
    words = ["run=last", f"runs_dir={runs}", "prompt=A face.", f"music={sounds['low']}", "duration_s=1"]
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert avlit(["sample", *words, f"seed={seed}", f"out={tmp_path / name}.mp4"]) == 0
    clips = {name: (tmp_path / f"{name}.mp4").read_bytes() for name in "abc"}
    assert clips["a"] == clips["b"]
    assert clips["a"] != clips["c"]


@pytest.mark.parametrize("track", ["speech", "speech_second", "effects", "music"])
def test_every_track_changes_the_picture(generator, sounds, track):
    silent, driven, other = (
        frames_of(generator, Request(prompt="A face.", **tracks))
        for tracks in ({}, {track: sounds["low"]}, {track: sounds["high"]})
    )
    assert (silent != driven).any() and (driven != other).any()


def test_the_model_is_given_what_training_encodes(generator, tmp_path, monkeypatch):
    """Prompt and tracks of a clip of the corpus give the batch that its shard would."""
    settings = CorpusSettings(num_frames=FRAMES)
    clip = make_clip("multiple_characters", 1, settings)
    names = ("speech", "speech_second", "effects", "music")
    for name in names:
        soundfile.write(tmp_path / f"{name}.flac", getattr(clip, name), clip.rate_hz)
    batches = []

    def record(batch, **_):
        batches.append(batch)
        return Latents(video=batch.video_latents)

    monkeypatch.setattr(generator.module, "sample", record)
    generator(Request(prompt=clip.caption, **{name: tmp_path / f"{name}.flac" for name in names}))
    encoded = encode_clip(clip, generator.encoders)
    expected = collate([encoded], step=0, slots=(0,), contents=Contents(text_tokens=generator.encoders.text.max_tokens))
    assert expected.tracks is not None
    for made, shard, fields in (
        (batches[0], expected, ("text",)),
        (batches[0].tracks, expected.tracks, names),
    ):
        for name in fields:
            torch.testing.assert_close(getattr(made, name), getattr(shard, name), rtol=0, atol=1e-5)
    assert batches[0].text_lengths == expected.text_lengths
    assert batches[0].tracks.has_second == (True,)
    assert expected.tracks.speech.abs().max() > 0.5


def test_a_long_clip_goes_on_from_a_short_one(generator, sounds):
    request = Request(prompt="A face.", speech=sounds["long"], seed=4)
    one, two, three = (
        frames_of(generator, replace(request, duration_s=frames / FPS))
        for frames in (FRAMES, FRAMES + ADDED, FRAMES + ADDED + 2)
    )
    assert [len(clip) for clip in (one, two, three)] == [9, 13, 15]
    assert np.array_equal(one, two[:9]) and np.array_equal(two, three[:13])
    assert np.array_equal(frames_of(generator, replace(request, duration_s=0.4)), one[:5])


def test_each_window_is_given_the_last_frames_its_own_seed_and_its_own_sound(generator, sounds, monkeypatch):
    calls = []

    def record(batch, *, seeds, keyframes, **_):
        calls.append((batch, seeds[0], keyframes))
        draw = torch.Generator().manual_seed(seeds[0])
        return Latents(video=torch.randn(batch.video_latents.shape, generator=draw))

    monkeypatch.setattr(generator.module, "sample", record)
    clip = generator(Request(speech=sounds["long"], duration_s=(FRAMES + ADDED) / FPS, seed=9))
    (first, first_seed, nothing), (second, second_seed, given) = calls
    assert nothing is None and given.tolist() == [[True, True, False]]
    assert first_seed == 9 and second_seed == window_seed(9, 1) != 9
    last = torch.from_numpy(clip.frames[4:9]).permute(3, 0, 1, 2).float() / 127.5 - 1
    expected = generator.encoders.video.encode(last[None])
    torch.testing.assert_close(second.video_latents[:, :, :2], expected, rtol=0, atol=0.05)  # frames are rounded
    sound = torch.from_numpy(read_audio(sounds["long"], 16000))
    start = round(ADDED / FPS * 16000)
    encoded = generator.encoders.tracks.encode(sound[start : start + 12000], num_frames=FRAMES)
    torch.testing.assert_close(second.tracks.speech[0], encoded, rtol=0, atol=1e-5)
    assert not torch.allclose(first.tracks.speech, second.tracks.speech, atol=0.1)


def test_a_later_prompt_changes_the_clip_from_its_window_on(generator):
    request = Request(prompt="A face in front of a pink wall.", duration_s=(FRAMES + 2 * ADDED) / FPS)
    later = replace(request, later_prompts={0.8: "A dog in a green field."})
    plain, changed = frames_of(generator, request), frames_of(generator, later)
    begins = FRAMES + ADDED  # the first window that begins after 0.8 s adds its first frame at 13 / 12 s
    assert np.array_equal(plain[:begins], changed[:begins]) and (plain[begins:] != changed[begins:]).any()
    assert generator.plan(later).notes == (f"prompt.0.8 is in force from {begins / FPS:.2f} s on",)
    with pytest.raises(UserError, match=r"prompt\.1\.2: would never be in force.*0\.00, 0\.75, 1\.08 s"):
        generator.plan(replace(request, later_prompts={1.2: "too late"}))


@pytest.mark.parametrize(("frame", "shown"), [(0, [0]), (6, [5, 6, 7, 8]), (11, [9, 10, 11, 12]), (-1, [13, 14])])
def test_an_image_is_shown_at_its_frame(generator, image, frame, shown):
    clip = frames_of(generator, Request(prompt="A face.", images={frame: image}, duration_s=15 / FPS))
    picture = np.asarray(Image.open(image).resize((128, 64)).crop((32, 0, 96, 64))).astype(float)  # centre of 2:1
    difference = np.abs(clip.astype(float) - picture).mean((1, 2, 3))
    assert difference[shown].max() < 4
    assert difference[[i for i in range(15) if i not in shown]].min() > 10


def test_two_images_in_one_latent_frame_are_refused(generator, image):
    with pytest.raises(UserError, match=r"image\.5 and image\.8: both lie in the same latent frame"):
        generator.plan(Request(images={5: image, 8: image}))
    generator.plan(Request(images={4: image, 5: image}))


def test_an_image_beyond_the_clip_names_the_length_that_holds_it(generator, image):
    with pytest.raises(UserError, match=r"image\.24: the clip has the frames 0 to 8; .*duration_s=2\.08"):
        generator.plan(Request(images={24: image}))
    generator.plan(Request(images={24: image}, duration_s=2.09))


def test_only_a_model_with_a_second_speaker_takes_one(runs, sounds):
    single = Generator.of_run("last", runs_dir=runs / "one")
    with pytest.raises(UserError, match=r"speech_second=.*model\.second_speaker=true"):
        single.plan(Request(speech_second=sounds["low"]))


def test_a_short_track_is_followed_by_silence_and_said_so(generator, sounds):
    request = Request(speech=sounds["low"], duration_s=1.5)
    clip = generator(request)
    assert clip.waveform is not None and clip.rate_hz is not None
    assert len(clip.waveform) == 1.5 * clip.rate_hz
    assert np.abs(clip.waveform[: clip.rate_hz]).max() > 0.25 and not clip.waveform[clip.rate_hz + 100 :].any()
    assert generator.plan(request).notes == ("speech: 1.00 s of sound for a clip of 1.50 s; silence follows it",)


def test_the_mix_is_the_sum_of_the_tracks_turned_down_to_full_scale(generator, tmp_path):
    time = np.arange(44100) / 44100
    left, right = 0.7 * np.sin(2 * np.pi * 300 * time), 0.7 * np.cos(2 * np.pi * 700 * time)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, left], axis=1), 44100)
    soundfile.write(tmp_path / "mono.flac", right, 44100)
    request = Request(effects=tmp_path / "stereo.wav", music=tmp_path / "mono.flac", duration_s=1.0)
    clip = generator(request)
    time = np.arange(48000) / 48000
    total = 0.7 * np.sin(2 * np.pi * 300 * time) + 0.7 * np.cos(2 * np.pi * 700 * time)
    assert clip.waveform is not None and np.abs(clip.waveform).max() == pytest.approx(1, abs=1e-3)
    inside = slice(480, -480)  # the resampler rings where a file begins and ends
    np.testing.assert_allclose(clip.waveform[inside], (total / np.abs(total).max())[inside], atol=0.01)
    assert "turned down to 0.7" in generator.plan(request).notes[-1]


def test_a_prompt_that_is_too_long_is_said_to_be_cut_where_it_is(generator):
    words = [f"word{number}" for number in range(60)]
    assert generator.text_notes(Request(prompt=" ".join(words[:48]))) == []
    (note,) = generator.text_notes(Request(prompt=" ".join(words)))
    assert note == f"prompt: longer than the text encoder's 48 tokens; not read: …{' '.join(words[48:])}"


def test_a_clip_that_is_given_up_leaves_no_file(generator, tmp_path):
    steps = []

    def stop_late() -> None:
        steps.append(None)
        if len(steps) == 3:  # in the second window
            raise KeyboardInterrupt

    plan = generator.plan(Request(prompt="A face.", duration_s=1.0))
    with pytest.raises(KeyboardInterrupt):
        generator.write(plan, tmp_path / "a.mp4", on_step=stop_late)
    assert not list(tmp_path.iterdir())
    steps.extend([None] * 10)
    generator.write(plan, tmp_path / "a.mp4", on_step=stop_late)
    assert len(steps) == 13 + generator.num_steps(plan)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("speech=nowhere.wav", "speech=nowhere.wav: there is no such file"),
        ("music={folder}/text.wav", "music={folder}/text.wav: cannot be read as a media file"),
        ("effects={folder}/mute.mp4", "effects={folder}/mute.mp4: has no audio stream"),
        ("speech={folder}/half.flac", "speech={folder}/half.flac: its sound cannot be decoded"),
        ("image.0={folder}/text.wav", "image.0={folder}/text.wav: cannot be read as a picture"),
        ("image.first=a.png", "image.first: must be image.FRAME=FILE"),
        ("image.00=a.png", "image.00: frame 0 has an image already"),
        ("out=/proc/nowhere/a.mp4", "out=/proc/nowhere: cannot be made"),
        ("data.num_frames=13", "data.num_frames=13: has no effect on one clip"),
        ("prompt.soon=x", "prompt.soon: must be prompt.SECONDS=TEXT"),
        ("prompt=", "prompt=: is empty"),
        ("duration_s=0", "duration_s=0: must be a number of seconds above 0"),
        ("duration_s=long", "duration_s=long: must be a number of seconds"),
        ("seed=-1", "seed=-1"),
        ("speach=a.wav", "speach=a.wav: no such word; did you mean speech?"),
        ("optimizer.lr=1", "optimizer.lr=1: has no effect on one clip; leave it out"),
        ("sample.count=2", "sample.count=2: has no effect on one clip"),
        ("sample.scheduler=HeunDiscreteScheduler", "sample.scheduler=HeunDiscreteScheduler: it cannot start"),
        ("out=clip.avi", "out=clip.avi: one clip is written to a file, for example out=clip.avi.mp4"),
        ("out={folder}/there.mp4", "out={folder}/there.mp4: is there already"),
        ("vary=speech", "speech=: vary=speech needs two values or more, for example speech=a.wav,b.wav"),
        ("vary=seed", "vary=seed: must be one of prompt, audio_prompt, speech"),
        ("jobs=a.jsonl", "effects={folder}/low.wav: belongs into the lines of jobs=a.jsonl"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(runs, sounds, tmp_path, capsys, word, message):
    from avlit.media import write_mp4

    (tmp_path / "text.wav").write_text("no sound\n" * 40)
    write_mp4(tmp_path / "mute.mp4", np.zeros((3, 16, 16, 3), np.uint8), fps=12)
    soundfile.write(tmp_path / "half.flac", read_audio(sounds["long"], 16000), 16000)
    whole = (tmp_path / "half.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "there.mp4").write_text("precious")
    shutil.copy(sounds["low"], tmp_path / "low.wav")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    given = {"runs_dir": str(runs), "run": "last", "effects": "{folder}/low.wav", "image.0": "{folder}/a.png"}
    key, _, value = word.partition("=")
    given = {"out": "{folder}/a.mp4"} | given | {key: value}
    words = [f"{key}={value}".replace("{folder}", str(tmp_path)) for key, value in given.items()]
    assert avlit(["sample", *words]) == USER_MISTAKE
    captured = capsys.readouterr()
    assert message.replace("{folder}", str(tmp_path)) in captured.err and "Traceback" not in captured.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("word", ["duration_s=3", "vary=music", "prompt_=x"])
def test_a_word_without_effect_on_heldout_clips_is_refused(runs, capsys, word):
    assert avlit(["sample", "run=last", f"runs_dir={runs}", word]) == USER_MISTAKE
    assert word.partition("=")[0] in capsys.readouterr().err


def write_jobs(path: Path, *jobs: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return path


def run_jobs(runs: Path, path: Path, out: Path, *more: str) -> int:
    return avlit(["sample", "run=last", f"runs_dir={runs}", f"jobs={path}", f"out={out}", *more])


def test_jobs_are_the_clips_that_their_words_make_alone(runs, sounds, tmp_path):
    one = {"prompt": "A face.", "speech": str(sounds["low"]), "seed": 3, "duration_s": 1}
    path = write_jobs(tmp_path / "jobs.jsonl", {"name": "first", **one}, {"prompt": "A dog."})
    assert run_jobs(runs, path, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "first.mp4", "first.json", "0002.mp4", "0002.json"
    }  # fmt: skip
    record = json.loads((tmp_path / "out" / "first.json").read_text())
    assert record["seed"] == 3 and record["step"] == 3 and record["sample"]["steps"] == 2
    words = [f"{key}={value}" for key, value in one.items()]
    assert avlit(["sample", "run=last", f"runs_dir={runs}", *words, f"out={tmp_path / 'alone.mp4'}"]) == 0
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "out" / "first.mp4").read_bytes()


def test_finished_jobs_are_skipped_and_unfinished_ones_made_again(runs, tmp_path, monkeypatch, capsys):
    path = write_jobs(tmp_path / "jobs.jsonl", {"prompt": "A face."}, {"prompt": "A dog."})
    out = tmp_path / "out"
    assert run_jobs(runs, path, out) == 0
    clips = {name: (out / f"{name}.mp4").read_bytes() for name in ("0001", "0002")}
    (out / "0002.json").unlink()  # as a kill between the two files leaves it
    (out / "0002.mp4").write_bytes(b"something else")
    untouched = (out / "0001.mp4").stat().st_mtime_ns
    assert run_jobs(runs, path, out) == 0
    assert (out / "0001.mp4").stat().st_mtime_ns == untouched
    assert {name: (out / f"{name}.mp4").read_bytes() for name in clips} == clips
    monkeypatch.setattr(Generator, "of_checkpoint", lambda *_: pytest.fail("the weights are read for nothing"))
    assert run_jobs(runs, path, out) == 0
    assert "0 clips made, 2 were there already" in capsys.readouterr().out


def test_a_finished_job_of_another_request_or_run_is_refused_with_the_difference(runs, sounds, tmp_path, capsys):
    speech = tmp_path / "speech.wav"
    shutil.copy(sounds["low"], speech)
    path = write_jobs(tmp_path / "jobs.jsonl", {"prompt": "A face.", "speech": str(speech)})
    assert run_jobs(runs, path, tmp_path / "out") == 0
    before = (tmp_path / "out" / "0001.mp4").read_bytes()
    capsys.readouterr()
    assert run_jobs(runs, path, tmp_path / "out", "sample.guidance=5") == USER_MISTAKE
    assert "'guidance': 5.0" in capsys.readouterr().err
    shutil.copy(sounds["high"], speech)
    assert run_jobs(runs, path, tmp_path / "out") == USER_MISTAKE
    assert "files was" in capsys.readouterr().err
    shutil.copy(sounds["low"], speech)
    write_jobs(path, {"prompt": "A dog.", "speech": str(speech)})
    assert run_jobs(runs, path, tmp_path / "out") == USER_MISTAKE
    assert "A dog." in capsys.readouterr().err
    assert (tmp_path / "out" / "0001.mp4").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "speech": "nowhere.wav"}', "speech=nowhere.wav: there is no such file"),
        ('{"prompt": "x", "speach": "a.wav"}', "speach: no such key; did you mean speech?"),
        ('{"prompt": "x", "prompt": "y"}', "given twice"),
        ('{"prompt": ["x"]}', 'prompt: must be a text or a number, not ["x"]'),
        ('{"prompt": "x", "name": "../x"}', "name=../x: it names a file"),
        ('{"prompt": "x", "name": "0001"}', "has the same name"),
        ('{"seed": 3}', "asks for nothing"),
        ("prompt=x", "is not JSON"),
        ('["x"]', "must be a JSON object"),
    ],
)
def test_a_bad_line_is_named_before_the_first_job_is_made(runs, tmp_path, capsys, line, message):
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "A face."}\n\n' + line + "\n")
    assert run_jobs(runs, path, tmp_path / "out") == USER_MISTAKE
    error = capsys.readouterr().err
    assert f"{path}, line 3: " in error and message in error
    assert not (tmp_path / "out").exists()


def test_a_grid_exchanges_one_track_and_keeps_the_rest(runs, sounds, tmp_path, capsys):
    words = ["run=last", f"runs_dir={runs}", "prompt=A face.", f"speech={sounds['other']}", "seed=2", "duration_s=1"]
    files = ",".join(str(sounds[name]) for name in ("low", "high", "long"))
    assert avlit(["sample", *words, "vary=music", f"music={files}", f"out={tmp_path / 'grid'}"]) == 0
    names = ["00-low.mp4", "01-high.mp4", "02-long.mp4", "grid.mp4", "contact_sheet.png"]
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == sorted(names)
    assert capsys.readouterr().out.splitlines()[-5:] == [str(tmp_path / "grid" / name) for name in names]
    assert avlit(["sample", *words, f"music={sounds['high']}", f"out={tmp_path / 'alone.mp4'}"]) == 0
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "grid" / "01-high.mp4").read_bytes()

    grid = read_clip(tmp_path / "grid" / "grid.mp4")
    single = read_clip(tmp_path / "alone.mp4")
    assert grid.frames.shape == (12, 24 + 256, 3 * 256, 3) and single.frames.shape == (12, 256, 256, 3)
    tile = grid.frames[:, 24:, 256:512].astype(float)
    assert np.abs(tile - single.frames).mean() < 3 < np.abs(grid.frames[:, 24:, :256] - tile).mean()
    shared = read_audio(sounds["other"], 16000)
    assert grid.waveform is not None and np.corrcoef(grid.waveform, shared)[0, 1] > 0.99


def test_prompts_can_be_exchanged_in_a_grid(runs, tmp_path):
    words = ["run=last", f"runs_dir={runs}", "vary=prompt", "prompt=A face. | A dog, in a field.", f"out={tmp_path}"]
    assert avlit(["sample", *words]) == 0
    first, second = (read_clip(tmp_path / f"{n:02d}-prompt.mp4", rate_hz=None).frames for n in range(2))
    assert (first != second).any()
    assert probe(tmp_path / "grid.mp4").rate_hz is None


def test_a_clip_without_a_place_goes_to_the_samples_of_its_run(runs, capsys):
    words = ["run=last", f"runs_dir={runs}", "prompt=A face."]
    assert avlit(["sample", *words]) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.is_file() and path.parent.name == "samples" and path.name.startswith("step-00000003-seed-0-")
    assert avlit(["sample", *words]) == USER_MISTAKE
    assert "is there already" in capsys.readouterr().err


def test_weights_that_the_run_never_trained_are_not_sampled(runs):
    with pytest.raises(UserError, match=r"lacks \d+ tensors of this model, first .*model\.\* settings"):
        Generator.of_run("last", runs_dir=runs / "one", words=["model.second_speaker=true"])


def test_heldout_clips_tell_every_step_and_can_be_given_up(generator, tmp_path):
    clip = make_clip("multiple_characters", 2, CorpusSettings(num_frames=FRAMES))
    encoded = encode_clip(clip, generator.encoders)
    batch = collate([encoded], step=0, slots=(0,), contents=Contents(text_tokens=48))
    clips = [HeldoutClip(batch, encoded.annotation, clip.mix, clip.rate_hz)] * 2
    steps = []

    def give_up() -> None:
        raise InterruptedError

    def write(folder: Path, on_step: Callable[[], None]) -> list[Path]:
        return write_clips(
            generator.module, clips, encoders=generator.encoders, settings=generator.settings, seed=0,
            folder=folder, on_step=on_step,
        )  # fmt: skip

    with pytest.raises(InterruptedError):
        write(tmp_path / "none", give_up)
    assert not (tmp_path / "none").exists()
    assert len(write(tmp_path / "all", lambda: steps.append(None))) == 3
    assert len(steps) == 2  # both clips are one batch


def test_a_scheduler_and_steps_of_choice_make_another_clip(runs, generator):
    request = Request(prompt="A face.")
    words = ["sample.scheduler=EulerDiscreteScheduler", "sample.steps=3"]
    other = Generator.of_run("last", runs_dir=runs, words=words)
    assert (frames_of(other, request) != frames_of(generator, request)).any()
    assert other.num_steps(other.plan(request)) == 3


def test_released_codecs_make_a_long_clip_from_prompt_tracks_and_image(
    cogvideox_folder, wav2vec2_folder, sounds, image
):
    sizes = [
        "model.num_layers=2", "model.num_heads=2", "model.head_dim=16", "model.in_channels=8", "model.out_channels=4",
        "model.text_dim=16", "model.time_embed_dim=16", "model.sample_height=4", "model.sample_width=4",
        "model.sample_frames=9", "model.audio_layers=3", "model.audio_dim=16", "model.audio_hidden=8",
        "model.audio_tokens=2", "model.control_dim=16", "model.interaction_heads=2",
    ]  # fmt: skip
    shape = ["data.num_frames=9", "data.height=32", "data.width=32", "data.fps=12", "sample.steps=2"]
    codecs = [f"codecs.{kind}_weights={cogvideox_folder}" for kind in ("video", "text")]
    codecs.append(f"codecs.tracks_weights={wav2vec2_folder}")
    config = load_config(["recipe=mtv_stage2", "size=paper", *sizes, *shape, *codecs])
    encoders, module = build_encoders(config), build_module(config).eval()
    assert encoders.video is not None and encoders.tracks is not None
    generator = Generator(module, encoders, abilities=Abilities.of(config), settings=config.sample)
    calls = []
    sample = module.sample

    def record(batch, **kwargs):
        calls.append((batch, kwargs["keyframes"]))
        return sample(batch, **kwargs)

    module.sample = record
    request = Request(prompt="a woman talks", speech=sounds["long"], music=sounds["low"], images={0: image, 5: image},
                      duration_s=1.0)  # fmt: skip
    clip = generator(request)
    assert clip.frames.shape == (12, 32, 32, 3)
    (first, given_first), (second, given_second) = calls
    assert given_first.tolist() == [[True, False, True]] and given_second.tolist() == [[True, True, False]]
    assert first.text.shape == (1, 226, 16) and first.tracks.speech.shape == (1, 9, 3, 16)
    pixels = torch.from_numpy(read_image(image, size=(32, 32))).permute(2, 0, 1).float() / 127.5 - 1
    still = encoders.video.encode(pixels[None, :, None].expand(-1, -1, 5, -1, -1))  # a latent frame of one, one of four
    torch.testing.assert_close(first.video_latents[:, :, [0, 2]], still, rtol=0, atol=1e-5)
    silence = encoders.tracks.encode(torch.zeros(12000), num_frames=9)
    torch.testing.assert_close(first.tracks.effects[0], silence, rtol=0, atol=1e-5)
    assert silence.abs().max() > 0.1  # wav2vec2 gives silence features of its own: not what guidance contrasts with
    assert not torch.allclose(first.tracks.speech, second.tracks.speech, atol=1e-3)
    assert (generator(request).frames == clip.frames).all()
