"""`just sample` of models with controls: which files are taken, what the model is given of them, what is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.batch import AVBatch
from avlit.checkpoints import CheckpointState, load_checkpoint, save_checkpoint
from avlit.commands.abilities import Abilities
from avlit.commands.assembly import batch_contents, build_module
from avlit.commands.control_files import write_controls
from avlit.commands.generation import Generator
from avlit.commands.plan import plan_clip
from avlit.commands.request import Request
from avlit.config import load_config, to_yaml
from avlit.errors import UserError
from avlit.inherit import load_base
from avlit.media import read_clip, write_mp4
from avlit.runs import create_run
from data.batches import collate
from data.corpus import CorpusSettings, make_clip
from data.datamodule import HeldoutClip
from data.encode import encode_clip, picture_latents
from data.prepare.controls import GREY

RECIPE = (
    "recipe=mmcontrol", "model.num_layers=2", "model.num_heads=2", "model.video_head_dim=12", "model.audio_head_dim=8",
    "data.num_frames=9", "data.height=32", "data.width=32", "sample.steps=2", "train.threads=1",
)  # fmt: skip
FRAMES, FPS = 9, 12
PROMPT = "[VISUAL]: A man. [SPEECH]: hello"


def make_run(runs_dir: Path, *words: str) -> None:
    """A run with weights that nobody trained, all of which have an effect, and that holds its own backbone."""
    config = load_config([*RECIPE, f"runs_dir={runs_dir}", *words])
    run = create_run(runs_dir, config.recipe)
    run.write_config(to_yaml(config))
    module, draw = build_module(config), torch.Generator().manual_seed(7)
    weights = {
        name: tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in module.model.state_dict().items()
    }
    state = CheckpointState(step=3, seed=0, recipe=config.recipe, run=run.id)
    path = save_checkpoint(runs_dir / "base", weights=weights, state=state)
    base = load_base(module.model, load_checkpoint(path), module.base_names)
    save_checkpoint(run.checkpoints_dir, weights=weights, state=replace(state, base_model=base))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def generator(runs: Path) -> Generator:
    return Generator.of_run("last", runs_dir=runs)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Videos `depth`, `other` and `wide` of a second, `short` of half; pictures `face`, `red`; sounds `low`, `high`,
    and `late`, silent for a second."""
    folder = tmp_path_factory.mktemp("files")
    y, x = np.mgrid[0:64, 0:128]
    waves = np.stack([128 + 90 * np.sin(x / 9 + frame / 5) * np.cos(y / 12) for frame in range(24)])
    frames = np.repeat(waves.astype(np.uint8)[..., None], 3, axis=3)
    write_mp4(folder / "depth.mp4", frames[:, :, :64], fps=24, scale=1)
    write_mp4(folder / "other.mp4", frames[:, :, 40:104], fps=24, scale=1)
    write_mp4(folder / "wide.mp4", frames, fps=24, scale=1)
    write_mp4(folder / "short.mp4", frames[:12, :, :64], fps=24, scale=1)
    Image.fromarray(frames[20, :, :64]).save(folder / "face.png")
    Image.fromarray(frames[20] // np.array([1, 3, 3], np.uint8)).save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    time = np.arange(8000) / 16000
    for name, hertz in (("low", 150), ("high", 700)):
        soundfile.write(folder / f"{name}.wav", 0.3 * np.sin(2 * np.pi * hertz * time * (1 + 0.3 * time)), 16000)
    soundfile.write(folder / "late.wav", np.concatenate([np.zeros(16000), np.sin(time)]), 16000)
    return {path.stem: path for path in folder.iterdir()}


def sample(runs: Path, *words: str) -> int:
    return avlit(["sample", "run=last", f"runs_dir={runs}", *words])


def batch_for(generator: Generator, request: Request) -> AVBatch:
    """What the model is given for a request."""
    plan = generator.plan(request)
    batch, keyframes = generator.conditions.of_window(plan.windows[0], plan, None)
    assert keyframes is None
    return batch


def control(batch: AVBatch, name: str) -> torch.Tensor:
    (found,) = getattr(batch, name)
    return found


# What the model is given.


@pytest.mark.parametrize(("structure", "other"), [("depth", "pose"), ("pose", "depth")])
def test_a_request_is_what_training_reads_of_the_same_clip(
    generator: Generator, tmp_path: Path, structure: str, other: str
) -> None:
    settings = CorpusSettings(fps=FPS, num_frames=FRAMES, height=32, width=32)
    clip = make_clip("basic_face", 1, settings, controls=("reference_image", structure))
    assert clip.reference_image is not None
    Image.fromarray(clip.reference_image).save(tmp_path / "face.png")
    soundfile.write(tmp_path / "voice.flac", clip.references[0], clip.rate_hz)
    path = tmp_path / "structure.mp4"
    write_mp4(path, getattr(clip, structure), fps=clip.fps)
    lossy = read_clip(path, size=(32, 32), rate_hz=None).frames  # and written larger than it is
    clip = replace(clip, references=clip.references[:1], **{structure: lossy})
    request = Request(prompt=clip.captions["visual_speech"], reference=tmp_path / "voice.flac")
    request = request.with_file("reference_image", tmp_path / "face.png").with_file(structure, path)
    batch = batch_for(generator, request)
    config = load_config(RECIPE)
    encoders = generator.encoders
    expected = collate([encode_clip(clip, encoders)], step=0, slots=(0,), contents=batch_contents(config, encoders))
    for name in ("text", "reference", "reference_image", "depth", "pose"):
        found, wanted = getattr(batch, name), getattr(expected, name)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert wanted.any() == (name != other)
    for name in ("text_lengths", "has_reference", "has_reference_image", "has_depth", "has_pose", "duration_s"):
        assert getattr(batch, name) == getattr(expected, name)
    assert batch.video_latents is not None and not batch.video_latents.any()  # all of it is made


def test_a_clip_has_the_controls_that_its_request_gives(generator: Generator, files: Mapping[str, Path]) -> None:
    for names in ((), ("reference_image",), ("depth",), ("reference", "pose")):
        given = {"reference": files["low"], "reference_image": files["face"]}
        given |= dict.fromkeys(("depth", "pose"), files["depth"])
        request = Request(prompt=PROMPT)
        for name in names:
            request = request.with_file(name, given[name])
        batch = batch_for(generator, request)
        assert {name for name in given if getattr(batch, f"has_{name}") == (True,)} == set(names)


def test_a_voice_is_the_same_in_mono_and_stereo_at_any_rate(
    generator: Generator, files: Mapping[str, Path], tmp_path: Path
) -> None:
    time = np.arange(24000) / 48000
    voice = 0.3 * np.sin(2 * np.pi * 150 * time * (1 + 0.3 * time))
    soundfile.write(tmp_path / "stereo.wav", np.stack([1.5 * voice, 0.5 * voice], axis=1), 48000)
    mono, stereo, other = (
        control(batch_for(generator, Request(prompt=PROMPT, reference=path)), "reference")
        for path in (files["low"], tmp_path / "stereo.wav", files["high"])
    )
    assert (mono - stereo).abs().mean() < 0.05 * (mono - other).abs().mean()


def test_a_control_of_another_rate_and_size_is_brought_to_the_clips(
    generator: Generator, files: Mapping[str, Path]
) -> None:
    found = control(batch_for(generator, Request(prompt=PROMPT, depth=files["depth"])), "depth")
    frames = read_clip(files["depth"], size=(32, 32), rate_hz=None).frames[: 2 * FRAMES : 2]  # 24 a second, of 64x64
    assert generator.encoders.video is not None
    expected = picture_latents(frames, codec=generator.encoders.video)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_a_transparent_picture_stands_before_grey(
    generator: Generator, files: Mapping[str, Path], tmp_path: Path
) -> None:
    opaque = np.asarray(Image.open(files["face"]))
    alpha = np.zeros(opaque.shape[:2], np.uint8)
    alpha[16:48, 16:48] = 255
    Image.fromarray(np.dstack([opaque, alpha])).save(tmp_path / "cut.png")
    Image.fromarray(np.where(alpha[..., None] == 255, opaque, np.uint8(GREY))).save(tmp_path / "grey.png")
    cut, grey, whole = (
        control(batch_for(generator, Request(prompt=PROMPT, reference_image=path)), "reference_image")
        for path in (tmp_path / "cut.png", tmp_path / "grey.png", files["face"])
    )
    assert torch.equal(cut, grey) and not torch.equal(cut, whole)
    Image.fromarray(np.dstack([opaque, 0 * alpha])).save(tmp_path / "nothing.png")
    with pytest.raises(UserError, match=r"reference_image=.*nothing\.png: is transparent everywhere"):
        generator.plan(Request(prompt=PROMPT, reference_image=tmp_path / "nothing.png"))


def test_a_portrait_lies_as_its_camera_says_and_is_cut_around_its_centre(
    generator: Generator, files: Mapping[str, Path], tmp_path: Path
) -> None:
    wide = np.asarray(Image.open(files["red"]))
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 5  # stored transposed
    Image.fromarray(wide).save(tmp_path / "phone.png", exif=exif)
    Image.fromarray(wide.transpose(1, 0, 2)[32:96]).save(tmp_path / "centre.png")
    requests = {
        name: Request(prompt=PROMPT, reference_image=tmp_path / f"{name}.png")
        for name in ("upright", "phone", "centre")
    }
    upright, phone, centre = (control(batch_for(generator, each), "reference_image") for each in requests.values())
    assert torch.equal(upright, phone)
    torch.testing.assert_close(upright, centre, rtol=0, atol=0.05)  # but for what the filter sees beyond the edges
    for name in ("upright", "phone"):
        (note,) = generator.plan(requests[name]).notes
        assert note.startswith("reference_image: 64x128 pixels are of another shape than the clip's 32x32; what")


def test_a_clip_is_as_long_as_what_it_follows_and_its_last_frame_is_held_for_the_model(
    generator: Generator, files: Mapping[str, Path]
) -> None:
    request = Request(prompt=PROMPT, depth=files["short"])
    clip = generator(request)
    assert len(clip.frames) == 6 and clip.waveform is not None and len(clip.waveform) == 24000
    (note,) = generator.plan(request).notes
    assert note.startswith("depth: 0.50 s for a model of 0.75 s; its last frame is held")
    assert generator.encoders.video is not None
    frames = read_clip(files["short"], size=(32, 32), rate_hz=None).frames[::2]
    held = np.concatenate([frames, np.repeat(frames[-1:], 3, axis=0)])
    expected = torch.from_numpy(picture_latents(held, codec=generator.encoders.video))
    torch.testing.assert_close(control(batch_for(generator, request), "depth"), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"duration_s=0\.7: depth=.*short\.mp4 has 0\.50 s at the run's 12 frames"):
        generator.plan(replace(request, duration_s=0.7))


def test_notes_say_what_of_a_control_is_not_used(generator: Generator, files: Mapping[str, Path]) -> None:
    plan = generator.plan(Request(prompt=PROMPT, pose=files["wide"], reference_image=files["red"]))
    cut = "128x64 pixels are of another shape than the clip's 32x32; what does not fit is cut off around the centre"
    assert plan.notes == (
        "pose: the clip of 0.75 s uses the beginning of its 1.00 s", f"pose: {cut}", f"reference_image: {cut}"
    )  # fmt: skip
    request = Request(prompt=PROMPT, reference_image=files["face"])
    assert generator.plan(request).notes == ()
    off = Abilities.of(load_config([*RECIPE, "sample.visual_scale=0"]))
    assert plan_clip(request, off).notes == ("reference_image: has no effect at sample.visual_scale=0",)
    assert len(plan_clip(Request(prompt=PROMPT, reference=files["low"]), off).notes) == 1  # how much of it is used


def test_what_a_held_out_clip_was_controlled_by_can_be_given_again(generator: Generator, tmp_path: Path) -> None:
    settings = CorpusSettings(fps=FPS, num_frames=FRAMES, height=32, width=32)
    clip = make_clip("basic_face", 1, settings, controls=("reference_image", "depth", "pose"))
    encoded = encode_clip(clip, generator.encoders)
    contents = batch_contents(load_config(RECIPE), generator.encoders)
    held = HeldoutClip(
        batch=collate([encoded], step=0, slots=(0,), contents=contents),
        annotation=encoded.annotation,
        waveform=clip.references[0],
        rate_hz=clip.rate_hz,
    )
    paths = write_controls([held], generator.encoders, tmp_path / "controls")
    names = ("depth", "pose", "reference_image", "reference")
    assert [path.name.partition(".")[2].partition(".")[0] for path in paths] == list(names)
    for name, path in zip(names, paths, strict=True):
        again = control(batch_for(generator, Request(prompt=PROMPT).with_file(name, path)), name)
        given = {other: latents for other in names if (latents := control(held.batch, other)).shape == again.shape}
        differences = {other: float((again - latents).abs().mean()) for other, latents in given.items()}
        assert differences.pop(name) < 0.3 * min([float(given[name].abs().mean()), *differences.values()]), name
    bare = replace(held, batch=batch_for(generator, Request(prompt=PROMPT)))
    assert write_controls([bare], generator.encoders, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


# What is taken and what is refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["depth={depth}", "pose={other}"], "depth={depth} and pose={other}: a clip follows one of the two"),
        (["depth=nowhere.mp4"], "depth=nowhere.mp4: there is no such file"),
        (["pose={low}"], "pose={low}: has no video stream"),
        (["reference_image={broken}"], "reference_image={broken}: cannot be read as a picture"),
        (["reference_image=nowhere.png"], "reference_image=nowhere.png: there is no such file"),
        (["reference_image="], "reference_image=: is empty"),
        (["pose={face}"], "pose={face}: shows one picture; a clip follows a video, frame by frame"),
        (["reference={depth}"], "reference={depth}: has no audio stream"),
        (["reference={late}"], "reference={late}: the 0.51 s that the model reads of it are silent, below"),
        (["image.0={face}"], "image.0={face}: mmcontrol takes prompt, reference, reference_image, depth, pose; leave"),
        (["video={depth}"], "video={depth}: mmcontrol takes prompt, reference, reference_image, depth, pose; leave"),
        (["prompt=A man says hello."], "prompt='A man says hello.': must be of the form `[VISUAL]: "),
        (["prompt=[VISUAL]: A man."], "prompt='[VISUAL]: A man.': must be of the form"),
        (["free_prompts=yes"], "free_prompts=yes: must be true or false"),
        (["vary=depth", "depth={depth}"], "vary=depth needs two values or more, for example depth=a.mp4,b.mp4"),
        (["vary=reference_image", "reference_image={face}"], "for example reference_image=a.png,b.png"),
        (["sample.stages=both"], "sample.stages=both: the second stage enlarges latents of LTX-2's video codec"),
        (["sample.distilled_lora=a.safetensors"], "sample.distilled_lora=a.safetensors: has no effect while"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_sampled(
    runs: Path,
    files: Mapping[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    given = {"prompt": PROMPT, "out": str(tmp_path / "a.mp4")}
    for word in words:
        key, _, value = word.partition("=")
        given[key] = value.format_map(files) if key != "prompt" else value
    assert sample(runs, *(f"{key}={value}" for key, value in given.items())) == USER_MISTAKE
    error = capsys.readouterr().err
    assert (message.format_map(files) if "{" in message else message) in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_prompt_of_another_form_is_taken_where_that_is_asked_for(generator: Generator) -> None:
    batch = batch_for(generator, Request(prompt="A man.", free_prompts=True))
    assert torch.equal(batch.text[0, : batch.text_lengths[0]], generator.encoders.text.encode("A man."))
    with pytest.raises(UserError, match=r"A man\..*free_prompts=true takes others as they are"):
        generator.plan(Request(prompt="A man."))
    others = Abilities.of(load_config(["recipe=unitalking_stage2"]))
    with pytest.raises(UserError, match="free_prompts=true: unitalking_stage2 takes prompts of any form; leave it out"):
        others.refuse_others(Request(prompt="A man.", free_prompts=True))


def test_a_run_takes_the_controls_that_it_was_trained_with(files: Mapping[str, Path]) -> None:
    abilities = Abilities.of(load_config([*RECIPE, "tasks.depth=0"]))
    abilities.refuse_others(Request(prompt=PROMPT, pose=files["depth"]))
    with pytest.raises(UserError, match=r"depth=.*: mmcontrol takes prompt, reference, reference_image, pose; "):
        abilities.refuse_others(Request(prompt=PROMPT, depth=files["depth"]))
    without_bypass = Abilities.of(load_config(["recipe=mmcontrol_backbone"]))
    for name, path in (("reference_image", files["face"]), ("reference", files["low"])):
        with pytest.raises(UserError, match=rf"{name}=.*: mmcontrol_backbone takes prompt; leave it out"):
            without_bypass.refuse_others(Request(prompt=PROMPT).with_file(name, path))


# Clips.


def test_words_of_controls_and_their_scales_reach_the_clip(
    runs: Path, files: Mapping[str, Path], tmp_path: Path
) -> None:
    controls = [f"reference_image={files['face']}", f"reference={files['low']}", f"depth={files['depth']}"]
    cases = {
        "none": [],
        "all": controls,
        "again": controls,
        "image": controls[:1],
        "weak": [*controls, "sample.visual_scale=0.5"],
        "off": [*controls, "sample.visual_scale=0", "sample.acoustic_scale=0"],
        "other": ["reference_image=" + str(files["red"]), "sample.visual_scale=0", "sample.acoustic_scale=0"],
    }
    made = {}
    for name, words in cases.items():
        out = tmp_path / f"{name}.mp4"
        assert sample(runs, f"prompt={PROMPT}", *words, f"out={out}") == 0
        made[name] = out.read_bytes()
    assert made["all"] == made["again"]
    assert made["off"] == made["other"]  # with both scales at 0 nothing of the controls is left
    assert len({made[name] for name in ("none", "all", "image", "weak", "off")}) == 5


def test_controls_vary_and_are_words_of_jobs(
    runs: Path, files: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"prompt={PROMPT}", "vary=depth", f"depth={files['depth']},{files['other']}", f"out={tmp_path / 'grid'}"]
    assert sample(runs, *words) == 0
    assert {path.name for path in (tmp_path / "grid").iterdir()} == {
        "00-depth.mp4", "01-other.mp4", "grid.mp4", "contact_sheet.png"
    }  # fmt: skip
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    lines = [
        {"name": "a", "prompt": PROMPT, "depth": str(files["other"])},
        {"name": "b", "prompt": "A man.", "free_prompts": "true", "reference_image": str(files["face"])},
    ]
    jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sample(runs, f"jobs={jobs}", f"out={out}", f"depth={files['depth']}") == USER_MISTAKE
    assert f"depth={files['depth']}: belongs into the lines of jobs=" in capsys.readouterr().err
    assert sample(runs, f"jobs={jobs}", f"out={out}") == 0
    assert (out / "a.mp4").read_bytes() == (tmp_path / "grid" / "01-other.mp4").read_bytes()
    assert list(json.loads((out / "b.json").read_text())["files"]) == [str(files["face"])]
    assert sample(runs, f"jobs={jobs}", f"out={out}") == 0
    assert "0 clips made, 2 were there already" in capsys.readouterr().out
