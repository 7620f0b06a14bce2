"""`just sample` of models that make sound: each way to ask, what of it ends in the file, and what is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.batch import AVBatch
from avlit.checkpoints import CheckpointState, save_checkpoint
from avlit.commands.abilities import Abilities
from avlit.commands.assembly import build_encoders, build_module
from avlit.commands.generation import Generator
from avlit.commands.request import Request
from avlit.commands.variations import VARIED_KEYS
from avlit.config import load_config, to_yaml
from avlit.errors import UserError
from avlit.media import probe, read_audio, read_clip, write_mp4
from avlit.runs import create_run
from avlit.sampling import Latents
from data.batches import Contents, collate
from data.corpus import CorpusSettings, make_clip
from data.encode import encode_clip
from data.shard_writer import ShardWriter

SMALL = (
    "model.num_layers=2", "model.num_heads=2", "model.head_dim=16", "model.ffn_dim=32", "data.num_frames=9",
    "sample.steps=2", "train.threads=1",
)  # fmt: skip
FRAMES, FPS, SECONDS = 9, 12, 0.75
REFERENCE_S = 64 / 62.5
"""Seconds of sound that the model's 64 reference tokens hold."""


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
    """A run of video and sound, `last`, and in `speech` one of sound alone."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder, "recipe=unitalking_stage2")
    make_run(folder / "speech", "recipe=unitalking_stage1")
    return folder


@pytest.fixture(scope="module")
def generator(runs: Path) -> Generator:
    return Generator.of_run("last", runs_dir=runs)


@pytest.fixture(scope="module")
def speech_generator(runs: Path) -> Generator:
    return Generator.of_run("last", runs_dir=runs / "speech")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Voices `low` and `high` of half a second, `long` of 1.5 s; videos `talk` of 2 s, `short` and mute; a face."""
    folder = tmp_path_factory.mktemp("files")
    time = np.arange(8000) / 16000
    for name, hertz in (("low", 150), ("high", 700)):
        soundfile.write(folder / f"{name}.wav", 0.3 * np.sin(2 * np.pi * hertz * time * (1 + 0.3 * time)), 16000)
    soundfile.write(folder / "long.flac", np.tile(0.1 * np.sin(500 * time), 3), 16000)
    y, x = np.mgrid[0:48, 0:96]
    waves = [128 + 90 * np.sin(x / 9 + frame / 5) * np.cos(y / 12) for frame in range(64)]
    frames = np.repeat(np.stack(waves).astype(np.uint8)[..., None], 3, axis=3)
    sound = 0.3 * np.sin(2 * np.pi * 400 * np.arange(32000) / 16000).astype(np.float32)
    write_mp4(folder / "talk.mp4", frames, fps=32, waveform=sound, rate_hz=16000, scale=1)
    write_mp4(folder / "short.mp4", frames[:16], fps=32, scale=1)
    Image.fromarray(frames[20]).save(folder / "face.png")
    return {path.stem: path for path in folder.iterdir()}


def sample(runs: Path, *words: str) -> int:
    return avlit(["sample", "run=last", f"runs_dir={runs}", *words])


def sound_of(generator: Generator, request: Request) -> np.ndarray:
    waveform = generator(request).waveform
    assert waveform is not None
    return waveform


def recorded(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[tuple[AVBatch, Any]]:
    """The batches and keyframes that the generator's model is given from now on."""
    calls, made = [], generator.module.sample

    def record(batch, **kwargs):
        calls.append((batch, kwargs["keyframes"]))
        return made(batch, **kwargs)

    monkeypatch.setattr(generator.module, "sample", record)
    return calls


def test_text_makes_video_with_a_sound_of_its_own_as_long_as_the_frames(runs, generator, tmp_path):
    out = tmp_path / "new" / "a.mp4"
    assert sample(runs, "prompt=A man says: hello.", f"out={out}") == 0
    written = read_clip(out)
    assert written.frames.shape[0] == FRAMES and written.fps == FPS and probe(out).rate_hz == 48000
    sound = sound_of(generator, Request(prompt="A man says: hello."))
    assert sound.shape == (48000 * SECONDS,) and sound.std() > 0.01
    heard = read_audio(out, 48000)[: len(sound)]
    assert np.corrcoef(heard, sound)[0, 1] > 0.95


def test_the_sound_is_what_its_latents_decode_to_at_the_rate_of_the_file(generator, monkeypatch):
    tone = torch.sin(2 * np.pi * 440 * torch.arange(12000) / 16000)[None] * 0.5
    codec = generator.encoders.audio
    assert codec is not None
    latents = codec.encode(tone)
    monkeypatch.setattr(
        generator.module, "sample", lambda batch, **_: Latents(video=batch.video_latents, audio=latents)
    )
    sound = sound_of(generator, Request(prompt="a tone"))
    spectrum = np.abs(np.fft.rfft(sound))
    assert generator.rate_hz == 48000 and len(sound) == 36000
    assert spectrum.argmax() / SECONDS == pytest.approx(440, abs=15)


def test_a_shorter_clip_with_video_is_the_beginning_of_the_whole_one(generator):
    whole = generator(Request(prompt="A man."))
    part = generator(Request(prompt="A man.", duration_s=0.4))
    assert len(part.frames) == 5 and np.array_equal(part.frames, whole.frames[:5])
    assert whole.waveform is not None and part.waveform is not None
    assert len(part.waveform) == 20000 and np.array_equal(part.waveform, whole.waveform[:20000])


def test_a_first_image_is_given_and_the_rest_is_made(generator, files, monkeypatch):
    calls = recorded(generator, monkeypatch)
    clip = generator(Request(prompt="A man.", images={0: files["face"]}))
    assert calls[0][1].tolist() == [[True, False, False]]
    picture = np.asarray(Image.open(files["face"]).resize((128, 64)).crop((32, 0, 96, 64))).astype(float)
    differences = np.abs(clip.frames.astype(float) - picture).mean((1, 2, 3))
    assert differences[0] < 6 and differences[1:].min() > 12
    assert clip.waveform is not None and clip.waveform.std() > 0.01


@pytest.mark.parametrize("kind", ["generator", "speech_generator"])
def test_a_reference_changes_the_sound_and_another_changes_it_differently(kind, files, request):
    generator = request.getfixturevalue(kind)
    plain, low, high = (
        sound_of(generator, Request(prompt="one", reference=reference))
        for reference in (None, files["low"], files["high"])
    )
    assert (plain != low).any() and (low != high).any() and (plain != high).any()


def test_the_model_is_given_what_training_encodes(generator, tmp_path, monkeypatch):
    """Caption, reference and frames of a clip of the corpus give the batch that its shard would."""
    clip = make_clip("basic_face", 1, CorpusSettings(num_frames=FRAMES))
    clip = replace(clip, references=clip.references[:1])
    assert clip.frames is not None
    soundfile.write(tmp_path / "voice.flac", clip.references[0], clip.rate_hz)
    write_mp4(tmp_path / "clip.mp4", clip.frames, fps=clip.fps)
    clip = replace(clip, frames=read_clip(tmp_path / "clip.mp4", size=(64, 64), rate_hz=None).frames)  # MP4 is lossy
    calls = recorded(generator, monkeypatch)
    generator(Request(prompt=clip.caption, reference=tmp_path / "voice.flac", video=tmp_path / "clip.mp4"))
    contents = Contents(text_tokens=generator.encoders.text.max_tokens, audio=True, tracks=False, reference_tokens=64)
    encoded = encode_clip(clip, generator.encoders)
    expected = collate([encoded], step=0, slots=(0,), contents=contents)
    ((batch, keyframes),) = calls
    assert batch.audio_latents is not None and expected.audio_latents is not None and expected.reference is not None
    for name in ("text", "reference", "video_latents"):
        torch.testing.assert_close(getattr(batch, name), getattr(expected, name), rtol=0, atol=1e-5)
    assert batch.audio_latents.shape == expected.audio_latents.shape and batch.text_lengths == expected.text_lengths
    assert batch.duration_s == expected.duration_s
    assert batch.has_reference == (True,) and expected.reference.abs().max() > 0.5
    assert keyframes.all()


def test_a_dubbed_video_keeps_its_own_frames_and_gets_a_new_sound(runs, generator, files, tmp_path):
    request = Request(prompt="He says: hello.", video=files["talk"])
    clip = generator(request)
    given = read_clip(files["talk"], fps=FPS, size=(64, 64), rate_hz=None, duration_s=SECONDS).frames
    assert np.array_equal(clip.frames, given)
    assert clip.waveform is not None and len(clip.waveform) == 48000 * SECONDS
    assert generator.plan(request).notes == ("video: the clip of 0.75 s uses the beginning of its 2.00 s",)
    assert (clip.waveform != sound_of(generator, Request(prompt="He says: hello."))).any()
    out = tmp_path / "dubbed.mp4"
    assert sample(runs, "prompt=He says: hello.", f"video={files['talk']}", f"out={out}") == 0
    written = read_clip(out, size=(64, 64))
    assert written.waveform is not None
    assert np.abs(written.frames.astype(float) - given).mean() < 3
    old = read_audio(files["talk"], 16000)[: len(written.waveform)]
    assert abs(np.corrcoef(written.waveform, old)[0, 1]) < 0.3


def test_a_video_shorter_than_the_models_clips_is_held_and_cut(generator, files, monkeypatch):
    calls = recorded(generator, monkeypatch)
    request = Request(prompt="one", video=files["short"])
    clip = generator(request)
    assert len(clip.frames) == 6 and clip.waveform is not None and len(clip.waveform) == 24000
    (note,) = generator.plan(request).notes
    assert "0.50 s for a model of 0.75 s" in note
    ((batch, keyframes),) = calls
    assert batch.video_latents is not None and batch.video_latents.shape[2] == 3 and keyframes.all()
    with pytest.raises(UserError, match=r"duration_s=0\.7: video=.*short\.mp4 has 0\.50 s at the run's 12 frames"):
        generator.plan(replace(request, duration_s=0.7))


def test_sound_alone_is_a_wav_of_the_length_that_was_asked_for(runs, speech_generator, tmp_path, monkeypatch):
    out = tmp_path / "zero.wav"
    assert sample(runs / "speech", "prompt=zero", "duration_s=0.64", f"out={out}") == 0
    assert soundfile.info(out).frames == 0.64 * 16000 and soundfile.info(out).samplerate == 16000
    assert soundfile.read(out)[0].std() > 0.01
    calls = recorded(speech_generator, monkeypatch)
    clips = [speech_generator(Request(prompt="zero", duration_s=seconds)) for seconds in (None, 0.64, 0.5)]
    assert [clip.waveform is not None and len(clip.waveform) for clip in clips] == [12000, 10240, 8000]
    latents = [batch.audio_latents for batch, _ in calls]
    assert [each is not None and each.shape for each in latents] == [(1, 47, 64), (1, 40, 64), (1, 32, 64)]
    assert [batch.duration_s for batch, _ in calls] == [0.75, 0.64, 0.5]
    assert all(clip.rate_hz == 16000 and len(clip.frames) == 0 for clip in clips)


@pytest.mark.parametrize(("folder", "suffix"), [("", ".mp4"), ("speech", ".wav")])
def test_the_same_seed_makes_the_same_bytes_and_another_others(runs, files, tmp_path, folder, suffix):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        words = ["prompt=one", f"reference={files['low']}", f"seed={seed}", f"out={tmp_path / name}{suffix}"]
        assert sample(runs / folder, *words) == 0
    a, b, c = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "abc")
    assert a == b and a != c


def test_another_seed_makes_another_picture_and_another_sound(generator):
    clips = [generator(Request(prompt="one", seed=seed)) for seed in (1, 2)]
    assert (clips[0].frames != clips[1].frames).any() and (clips[0].waveform != clips[1].waveform).any()


def test_notes_say_how_much_of_a_reference_is_used_and_that_no_words_are_given(generator, files):
    assert generator.plan(Request(prompt="one", reference=files["long"])).notes == (
        f"reference: the first {REFERENCE_S:.2f} of its 1.50 s are used",
    )
    assert generator.plan(Request(reference=files["low"])).notes == (
        "reference: all of its 0.50 s are used",
        "without prompt= the model is given no text: what is said is its own choice",
    )


def test_only_the_beginning_of_a_reference_matters(speech_generator, tmp_path):
    draw = np.random.default_rng(0)
    begin, one, other = (0.1 * draw.standard_normal(16000 * seconds) for seconds in (3, 2, 2))
    for name, rest in (("a", one), ("b", other)):
        soundfile.write(tmp_path / f"{name}.wav", np.concatenate([begin, rest]), 16000)
    first, second = (
        sound_of(speech_generator, Request(prompt="one", reference=tmp_path / f"{name}.wav")) for name in "ab"
    )
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("folder", "word", "message"),
    [
        ("", "speech={low}", "speech={low}: unitalking_stage2 takes prompt, reference, image.0, video; leave it out"),
        ("", "effects={low}", "effects={low}: unitalking_stage2 takes"),
        ("", "image.4={face}", "image.4={face}: unitalking_stage2 takes"),
        ("", "image.last={face}", "image.last={face}: unitalking_stage2 takes"),
        ("", "prompt.0.4=later", "prompt.0.4=later: unitalking_stage2 takes"),
        ("speech", "image.0={face}", "image.0={face}: unitalking_stage1 takes prompt, reference; leave it out"),
        ("speech", "video={talk}", "video={talk}: unitalking_stage1 takes prompt, reference; leave it out"),
        ("", "reference=nowhere.wav", "reference=nowhere.wav: there is no such file"),
        ("", "reference={short}", "reference={short}: has no audio stream"),
        ("", "reference={face}", "reference={face}: has no audio stream"),
        ("", "video={low}", "video={low}: has no video stream"),
        ("", "video=nowhere.mp4", "video=nowhere.mp4: there is no such file"),
        ("", "duration_s=2", "duration_s=2: the model of this run was trained on clips of 0.750 s"),
        ("speech", "duration_s=0.8", "duration_s=0.8: the model of this run was trained on clips of 0.750 s"),
        ("speech", "duration_s=0.01", "duration_s=0.01: is shorter than one of the 62.5 latents a second"),
        ("", "out=clip.wav", "out=clip.wav: one clip is written to a file, for example out=clip.mp4"),
        (
            "speech",
            "out=clip.mp4",
            "out=clip.mp4: a clip of sound alone is written to a file, for example out=clip.wav",
        ),
        ("speech", "sample.guidance=2", "sample.guidance=2: has no effect while codecs.video=none"),
        ("", "sample.sync_clips=2", "sample.sync_clips=2: has no effect on one clip"),
        ("", "data.root=x", "data.root=x: has no effect on one clip"),
        ("speech", "data.root=/nowhere", "data.root=/nowhere: has no effect on one clip"),
        ("", "vary=image", f"vary=image: must be one of {', '.join(VARIED_KEYS)}"),
        ("", "referense=a.wav", "referense=a.wav: no such word; did you mean reference?"),
    ],
)
def test_what_a_run_does_not_take_is_one_message_and_nothing_is_written(
    runs, files, tmp_path, capsys, folder, word, message
):
    given = {"prompt": "one", "out": str(tmp_path / f"a{'.wav' if folder else '.mp4'}")}
    key, _, value = word.format_map(files).partition("=")
    assert sample(runs / folder, *(f"{key}={value}" for key, value in {**given, key: value}.items())) == USER_MISTAKE
    error = capsys.readouterr().err
    assert message.format_map(files) in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_video_and_a_first_image_exclude_each_other(generator, files):
    with pytest.raises(UserError, match=r"video=.*talk\.mp4: gives every frame; leave image\.FRAME= out"):
        generator.plan(Request(video=files["talk"], images={0: files["face"]}))


def test_a_recipe_driven_by_tracks_takes_no_reference_and_no_video(tmp_path, files, capsys):
    config = load_config(["recipe=mtv_stage1", f"runs_dir={tmp_path}"])
    create_run(tmp_path, config.recipe).write_config(to_yaml(config))
    save_checkpoint(  # of another model: words are refused before weights are read
        next(tmp_path.glob("*-mtv*")) / "checkpoints",
        weights={"a": torch.zeros(1)},
        state=CheckpointState(step=1, seed=0, recipe=config.recipe, run="x"),
    )
    for word in ("reference", "video"):
        assert sample(tmp_path, "prompt=x", f"{word}={files['talk']}", f"out={tmp_path / 'a.mp4'}") == USER_MISTAKE
        error = capsys.readouterr().err
        assert f"{word}={files['talk']}: mtv_stage1 takes prompt, prompt.SECONDS, speech, " in error


@pytest.mark.parametrize("word", ["sample.guidance=7", "sample.audio_guidance=7", "sample.reference_guidance=7"])
def test_guidance_of_each_modality_is_a_word_of_one_clip(runs, generator, files, word):
    request = Request(prompt="one", reference=files["low"])
    guided = Generator.of_run("last", runs_dir=runs, words=[word])
    assert (sound_of(generator, request) != sound_of(guided, request)).any()


def test_guidance_words_reach_the_clip_from_the_command_line(runs, files, tmp_path):
    words = ["prompt=one", f"reference={files['low']}"]
    guided = ["sample.guidance=1", "sample.audio_guidance=5", "sample.reference_guidance=2"]
    assert sample(runs, *words, f"out={tmp_path / 'a.mp4'}") == 0
    assert sample(runs, *words, *guided, f"out={tmp_path / 'b.mp4'}") == 0
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "b.mp4").read_bytes()


def test_jobs_of_sound_alone_are_wavs_with_a_record_and_are_not_made_twice(runs, files, tmp_path, capsys):
    path, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    lines = [{"name": "zero", "prompt": "zero", "duration_s": 0.64, "seed": 3}, {"reference": str(files["low"])}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sample(runs / "speech", f"jobs={path}", f"out={out}") == 0
    assert {each.name for each in out.iterdir()} == {"zero.wav", "zero.json", "0002.wav", "0002.json"}
    record = json.loads((out / "0002.json").read_text())
    assert record["sample"]["audio_guidance"] == 2.0 and list(record["files"]) == [str(files["low"])]
    alone = tmp_path / "alone.wav"
    assert sample(runs / "speech", "prompt=zero", "duration_s=0.64", "seed=3", f"out={alone}") == 0
    assert alone.read_bytes() == (out / "zero.wav").read_bytes()
    assert sample(runs / "speech", f"jobs={path}", f"out={out}") == 0
    assert "0 clips made, 2 were there already" in capsys.readouterr().out
    assert sample(runs / "speech", f"jobs={path}", f"out={out}", "sample.audio_guidance=5") == USER_MISTAKE
    assert "'audio_guidance': 5.0" in capsys.readouterr().err


def test_a_grid_of_sound_alone_is_wavs_and_a_contact_sheet(runs, files, tmp_path, capsys):
    words = ["prompt=one", "vary=reference", f"reference={files['low']},{files['high']}", f"out={tmp_path / 'grid'}"]
    assert sample(runs / "speech", *words) == 0
    names = ["00-low.wav", "01-high.wav", "contact_sheet.png"]
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == names
    assert capsys.readouterr().out.splitlines()[-3:] == [str(tmp_path / "grid" / name) for name in names]
    assert Image.open(tmp_path / "grid" / names[-1]).height > 100
    alone = tmp_path / "alone.wav"
    assert sample(runs / "speech", "prompt=one", f"reference={files['high']}", f"out={alone}") == 0
    assert alone.read_bytes() == (tmp_path / "grid" / names[1]).read_bytes()


def test_a_grid_of_clips_with_their_own_sound_is_itself_silent(runs, tmp_path):
    assert sample(runs, "vary=prompt", "prompt=one | two", f"out={tmp_path}") == 0
    sounds = [read_clip(tmp_path / f"{number:02d}-prompt.mp4").waveform for number in range(2)]
    assert sounds[0] is not None and sounds[1] is not None and (sounds[0] != sounds[1]).any()
    assert probe(tmp_path / "grid.mp4").rate_hz is None
    assert (tmp_path / "contact_sheet.png").is_file()


def test_videos_of_other_lengths_are_not_set_side_by_side_unless_cut(runs, files, tmp_path, capsys):
    words = ["prompt=one", "vary=video", f"video={files['talk']},{files['short']}"]
    assert sample(runs, *words, f"out={tmp_path / 'no'}") == USER_MISTAKE
    assert "talk.mp4 0.75 s, video=short.mp4 0.50 s; give duration_s=0.500" in capsys.readouterr().err
    assert sample(runs, *words, "duration_s=0.5", f"out={tmp_path / 'yes'}") == 0
    assert len(read_clip(tmp_path / "yes" / "grid.mp4", rate_hz=None).frames) == 6


def test_clips_of_a_run_on_shards_are_as_long_as_those(runs, tmp_path):
    words = ["recipe=unitalking_stage1", "data.subsets.digits=1", f"data.root={tmp_path / 'shards'}"]
    encoders = build_encoders(load_config(["recipe=unitalking_stage1"]))
    settings = CorpusSettings(num_frames=FRAMES)
    with ShardWriter(tmp_path / "shards", encoders.identity(fps=12, rate_hz=16000)) as writer:
        for number, samples in enumerate((10240, 8000)):
            clip = make_clip("basic_face", number, settings, has_frames=False)
            tracks = {name: getattr(clip, name)[:samples] for name in ("speech", "effects", "music")}
            writer.add("digits", "train", encode_clip(replace(clip, subset="digits", **tracks), encoders))
    make_run(tmp_path / "runs", *words)
    generator = Generator.of_run("last", runs_dir=tmp_path / "runs")
    assert len(sound_of(generator, Request(prompt="zero"))) == 10240
    with pytest.raises(UserError, match=r"trained on clips of 0\.640 s"):
        generator.plan(Request(prompt="zero", duration_s=0.7))


def test_released_codecs_dub_a_video_in_a_voice(wan22_folder, mmaudio_folder, files, monkeypatch):
    sizes = ["model.num_layers=2", "model.num_heads=2", "model.head_dim=16", "model.ffn_dim=32", "model.text_dim=16"]
    shape = ["data.num_frames=9", "data.height=32", "data.width=32", "sample.steps=2", "model.video_channels=6"]
    codecs = [f"codecs.{kind}_weights={wan22_folder}" for kind in ("video", "text")]
    codecs.append(f"codecs.audio_weights={mmaudio_folder}")
    config = load_config(["recipe=unitalking_stage2", "size=paper", *sizes, *shape, *codecs])
    encoders = build_encoders(config)
    assert encoders.video is not None and encoders.audio is not None
    module = build_module(config).eval()
    generator = Generator(module, encoders, abilities=Abilities.of(config), settings=config.sample)
    calls = recorded(generator, monkeypatch)
    request = Request(prompt="a woman talks", video=files["talk"], reference=files["long"])
    clip = generator(request)
    assert clip.frames.shape == (9, 32, 32, 3) and clip.waveform is not None and len(clip.waveform) == 0.375 * 48000
    ((batch, _),) = calls
    sound = torch.from_numpy(read_audio(files["long"], 44100))
    voice = encoders.audio.encode(sound[None])[0]  # 1.5 s are 64 latents of the 257 that are read
    assert batch.reference is not None and batch.reference.shape == (1, 257, 40) and len(voice) == 64
    torch.testing.assert_close(batch.reference[0, :64], voice, rtol=0, atol=1e-5)
    assert not batch.reference[0, 64:].any()
    frames = torch.from_numpy(clip.frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(batch.video_latents, encoders.video.encode(frames[None]), rtol=0, atol=1e-5)
    assert np.array_equal(sound_of(generator, request), clip.waveform)
