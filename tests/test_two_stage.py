"""MMControl's second stage: a distilled LoRA that comes and goes, the refinement itself, and clips through it."""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.adapter_config import AdapterConfig
from avlit.adapters import adapter_layers, inject
from avlit.checkpoints import CheckpointState, load_checkpoint, save_checkpoint
from avlit.codecs.ltx2_video import LTX2Upsampler, LTX2VideoCodec
from avlit.commands.abilities import Abilities
from avlit.commands.assembly import build_encoders, build_refiner
from avlit.commands.generation import Generator
from avlit.commands.request import Request
from avlit.config import ConfigError, load_config, to_yaml
from avlit.errors import UserError
from avlit.inherit import load_base
from avlit.media import probe, read_audio, read_clip, write_mp4
from avlit.runs import create_run
from avlit.sampling import Latents, start_noise
from data.encode import picture_latents
from recipes.mmcontrol.config import MMControlConfig
from recipes.mmcontrol.recipe import MMControl
from recipes.mmcontrol.two_stage import Refiner, distilled, read_lora

PROMPT = "[VISUAL]: a lamp. [SPEECH]: hello"
FRAMES, DRAFT, WHOLE = 9, 64, 128
SIGMAS = (0.909375, 0.725, 0.421875, 0.0)
RELEASED = {
    "audio_time_embed": "audio_adaln_single",
    "time_embed": "adaln_single",
    "audio_proj_in": "audio_patchify_proj",
    "proj_in": "patchify_proj",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
"""diffusers' name of a part of LTX-2's transformer -> the released one."""


def config_of(folder: Path, *words: str) -> MMControlConfig:
    tiny = (
        "recipe=mmcontrol", "size=paper", "precision=fp32", f"data.num_frames={FRAMES}", f"data.height={DRAFT}",
        f"data.width={DRAFT}", "reference_tokens=12", "model.num_layers=2", "model.num_heads=2",
        "model.video_head_dim=8", "model.audio_head_dim=4", "model.text_dim=16", "model.video_channels=8",
        "model.audio_channels=32", "train.threads=1", "train.accelerator=cpu",
        *(() if "sample.stages=second" in words else ("sample.steps=2",)),
        *(f"codecs.{name}_weights={folder}" for name in ("video", "audio", "text")),
    )  # fmt: skip
    config = load_config([*tiny, *words])
    assert isinstance(config, MMControlConfig)
    return config


def module_of(config: MMControlConfig) -> MMControl:
    """Weights that nobody trained, all of which have an effect."""
    module = MMControl(config)
    module.freeze()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return module.eval()


@pytest.fixture(scope="module")
def plain(ltx2_folder: Path) -> MMControl:
    return module_of(config_of(ltx2_folder))


@pytest.fixture(scope="module")
def lora(plain: MMControl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA of every linear layer of the backbone, in the released keys."""
    draw = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for name, layer in plain.model.backbone.named_modules():
        if isinstance(layer, nn.Linear):
            first, _, rest = name.partition(".")
            name = f"diffusion_model.{'.'.join(filter(None, (RELEASED.get(first, first), rest)))}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(3, layer.in_features, generator=draw)
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(layer.out_features, 3, generator=draw)
    path = tmp_path_factory.mktemp("lora") / "distilled.safetensors"
    save_file(tensors, path)
    return path


def generator_of(folder: Path, *words: str) -> Generator:
    config = config_of(folder, *words)
    module, encoders, abilities = module_of(config), build_encoders(config), Abilities.of(config)
    refiner = None if abilities.draft is None else build_refiner(config, module, encoders)
    return Generator(module, encoders, abilities=abilities, settings=config.sample, refiner=refiner)


@pytest.fixture(scope="module")
def both(ltx2_folder: Path, lora: Path) -> Generator:
    return generator_of(ltx2_folder, "sample.stages=both", f"sample.distilled_lora={lora}")


@pytest.fixture(scope="module")
def second(ltx2_folder: Path, lora: Path) -> Generator:
    return generator_of(ltx2_folder, "sample.stages=second", f"sample.distilled_lora={lora}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Videos `talk`, with sound, and `depth`, without; `face` and `other`."""
    folder = tmp_path_factory.mktemp("files")
    y, x = np.mgrid[0:WHOLE, 0:WHOLE]
    waves = np.stack([128 + 90 * np.sin(x / 9 + frame / 2) * np.cos(y / 12) for frame in range(12)]).astype(np.uint8)
    frames = np.repeat(waves[..., None], 3, axis=3)
    sound = 0.3 * np.sin(2 * np.pi * 400 * np.arange(24000 * 12 // 25) / 24000).astype(np.float32)
    write_mp4(folder / "talk.mp4", frames, fps=25, waveform=sound, rate_hz=24000, scale=1)
    write_mp4(folder / "depth.mp4", frames[::-1], fps=25, scale=1)
    Image.fromarray(frames[3]).save(folder / "face.png")
    Image.fromarray(255 - frames[3]).save(folder / "other.png")
    return {path.stem: path for path in folder.iterdir()}


def calls_of(module: MMControl, act: Any) -> list[dict[str, Any]]:
    """What the model is given in each of the calls that `act` makes."""
    calls: list[dict[str, Any]] = []

    def note(_: object, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> None:
        calls.append({"video": args[0], "audio": args[1], **kwargs})

    handle = module.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        act()
    finally:
        handle.remove()
    return calls


def module_in(generator: Generator) -> MMControl:
    assert isinstance(generator.module, MMControl)
    return generator.module


def merged(module: MMControl, path: Path) -> MMControl:
    """A copy whose backbone has the LoRA in its weights; keys are compared by their shapes in the order of layers."""
    changed = copy.deepcopy(module)
    tensors = list(load_file(path).items())
    layers = [each for each in changed.model.backbone.modules() if isinstance(each, nn.Linear)]
    by_name = dict(tensors)
    with torch.no_grad():
        for name, layer in changed.model.backbone.named_modules():
            if isinstance(layer, nn.Linear):
                first, _, rest = name.partition(".")
                key = f"diffusion_model.{'.'.join(filter(None, (RELEASED.get(first, first), rest)))}"
                layer.weight += by_name[f"{key}.lora_B.weight"] @ by_name[f"{key}.lora_A.weight"]
    assert len(tensors) == 2 * len(layers)
    return changed


# The LoRA.


def velocity(module: MMControl, call: Mapping[str, Any]) -> Tensor:
    given = {name: value for name, value in call.items() if name not in ("video", "audio")}
    with torch.no_grad():
        return module.model(call["video"], call["audio"], **given).video


@pytest.fixture(scope="module")
def call(plain: MMControl, both: Generator, files: Mapping[str, Path]) -> dict[str, Any]:
    """One call of the model, under controls."""
    request = Request(prompt=PROMPT, reference_image=files["face"], depth=files["depth"])
    plan = both.plan(request)
    batch, _ = both.conditions.of_window(plan.windows[0], plan, None)
    return calls_of(plain, lambda: plain.sample(batch, seeds=[0], settings=plain.config.sample))[1]


def test_the_lora_is_added_to_the_backbone_alone_and_gone_afterwards(
    plain: MMControl, lora: Path, call: dict[str, Any]
) -> None:
    backbone = plain.model.backbone
    before = dict(plain.model.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    trains = {name: parameter.requires_grad for name, parameter in before.items()}
    stock = velocity(plain, call)
    with distilled(backbone, read_lora(backbone, lora)):
        changed = velocity(plain, call)
        assert plain.model.bypass is not None
        assert not any("lora" in name for name, _ in plain.model.bypass.named_parameters())
    torch.testing.assert_close(changed, velocity(merged(plain, lora), call), rtol=1e-4, atol=1e-5)
    assert (changed - stock).abs().max() > 0.1
    after = dict(plain.model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], values[name]) and after[name].requires_grad == trains[name] for name in after)
    assert torch.equal(velocity(plain, call), stock)


def test_the_lora_is_gone_after_an_interruption_too(plain: MMControl, lora: Path, call: dict[str, Any]) -> None:
    stock, tensors = velocity(plain, call), read_lora(plain.model.backbone, lora)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), distilled(plain.model.backbone, tensors):
            raise KeyboardInterrupt
    assert torch.equal(velocity(plain, call), stock)


def test_an_adapter_of_the_run_stays_when_the_lora_goes(
    ltx2_folder: Path, both: Generator, lora: Path, call: dict[str, Any]
) -> None:
    module = module_of(config_of(ltx2_folder, "sample.stages=both", f"sample.distilled_lora={lora}"))
    stock = velocity(module, call)
    names = [f"backbone.transformer_blocks.{layer}.attn1.{name}" for layer in (0, 1) for name in ("to_q", "to_v")]
    inject(module.model, names, AdapterConfig(kind="lora", rank=2), seed=0)
    for layer in adapter_layers(module.model).values():
        torch.nn.init.ones_(layer.lora_B["default"].weight)  # pyright: ignore[reportArgumentType]
    adapted = velocity(module, call)
    assert not torch.allclose(adapted, stock, atol=1e-3)
    build_refiner(module.config, module, both.encoders)
    merged_in = velocity(module, call)
    torch.testing.assert_close(merged_in, adapted, rtol=1e-3, atol=1e-4)
    with distilled(module.model.backbone, read_lora(module.model.backbone, lora)):
        assert not torch.allclose(velocity(module, call), adapted, atol=1e-3)
    assert torch.equal(velocity(module, call), merged_in)


def test_a_lora_of_a_part_of_the_layers_and_in_diffusers_keys_is_taken(plain: MMControl, lora: Path, tmp_path: Path):
    released = load_file(lora)
    part = {name: tensor for name, tensor in released.items() if "attn1.to_q" in name}
    text = {f"text_embedding_projection.aggregate_embed.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file({**part, **text}, tmp_path / "released.safetensors")
    ours = {name.replace("diffusion_model.", "transformer."): tensor for name, tensor in part.items()}
    save_file(ours, tmp_path / "diffusers.safetensors")
    found = [read_lora(plain.model.backbone, tmp_path / f"{name}.safetensors") for name in ("released", "diffusers")]
    assert len(part) == 8 and found[0].keys() == found[1].keys() == ours.keys()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {"other." + name: tensor for name, tensor in state.items()}, "is of no layer that"),
        (lambda state: {name.replace(".1.", ".7."): tensor for name, tensor in state.items()}, r"blocks\.7\..* of no"),
        (
            lambda state: {name: tensor for name, tensor in state.items() if "lora_B" not in name},
            r"lora_A.* for a layer",
        ),
        (lambda state: {name: tensor[:, :-1].contiguous() for name, tensor in state.items()}, r"for a layer of Linear"),
        (lambda state: {name.replace("lora_A.weight", "alpha"): x for name, x in state.items()}, "is of no layer that"),
        (
            lambda state: {"text_embedding_projection.a.lora_A.weight": torch.ones(1)},
            "holds no tensor of a transformer",
        ),
    ],
    ids=["unknown", "deeper", "half", "narrower", "alpha", "text"],
)
def test_a_lora_of_another_model_is_refused(
    plain: MMControl, lora: Path, tmp_path: Path, change: Any, says: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(change(load_file(lora)), path)
    with pytest.raises(UserError, match=rf"sample\.distilled_lora=.*other\.safetensors: .*{says}.*expected a LoRA of"):
        read_lora(plain.model.backbone, path)


def test_a_lora_that_is_no_safetensors_is_refused(plain: MMControl, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "lora.bin")
    with pytest.raises(UserError, match=r"lora\.bin: cannot be read as safetensors \(pickled weights are not opened\)"):
        read_lora(plain.model.backbone, tmp_path / "lora.bin")
    with pytest.raises(UserError, match=r"nowhere\.safetensors: there is no such file"):
        read_lora(plain.model.backbone, tmp_path / "nowhere.safetensors")


# The refinement.


def test_refinement_is_three_euler_steps_from_the_enlarged_draft_noised_again(
    ltx2_folder: Path, both: Generator, lora: Path, files: Mapping[str, Path]
) -> None:
    module, codec = module_in(both), both.encoders.video
    assert isinstance(codec, LTX2VideoCodec) and both.refiner is not None
    request = Request(prompt=PROMPT, reference_image=files["face"], depth=files["depth"])
    plan = both.plan(request)
    batch, _ = both.conditions.of_window(plan.windows[0], plan, None)
    draw = torch.Generator().manual_seed(5)
    draft = Latents(torch.randn(1, 8, 2, 2, 2, generator=draw), torch.randn(1, 9, 32, generator=draw))
    assert draft.video is not None and draft.audio is not None
    steps: list[int] = []
    made: list[Latents] = []

    def refine() -> None:
        refined = both.refiner(  # pyright: ignore[reportOptionalCall]
            batch, draft, seeds=[4], settings=both.settings, on_step=lambda: steps.append(1)
        )
        made.append(refined)

    calls = calls_of(module, refine)
    assert len(calls) == 3 and len(steps) == 3 and made[0].audio is draft.audio
    assert [float(each["video_timestep"]) for each in calls] == pytest.approx([1000 * s for s in SIGMAS[:3]])
    assert all(torch.equal(each["video_timestep"], each["audio_timestep"]) for each in calls)

    control = calls[0]["control"]
    assert control.visual.shape == (1, 9, 1 + 2, 4, 4)
    large = LTX2Upsampler(ltx2_folder, codec)(draft.video)
    grey, silence = module.controls.grey(large)[:, :, :1], module.controls.silence(draft.audio, 12 + 9)[:, :12]
    video, audio = torch.cat((grey, large), dim=2), torch.cat((silence, draft.audio), dim=1)
    noise = [start_noise([4], like, f"refined {name}") for name, like in
             (("image", grey), ("video", large), ("voice", silence), ("audio", draft.audio))]  # fmt: skip
    x = (1 - SIGMAS[0]) * video + SIGMAS[0] * torch.cat(noise[:2], dim=2)
    sound = (1 - SIGMAS[0]) * audio + SIGMAS[0] * torch.cat(noise[2:], dim=1)
    changed = merged(module, lora)
    for now, after in pairwise(SIGMAS):
        given = {name: value for name, value in calls[0].items() if name not in ("video", "audio")}
        given |= dict.fromkeys(("video_timestep", "audio_timestep"), torch.tensor([1000 * now]))
        with torch.no_grad():
            pred = changed.model(x, sound, **given)
        x, sound = x + (after - now) * pred.video, sound + (after - now) * pred.audio
    torch.testing.assert_close(made[0].video, x[:, :, 1:], rtol=1e-3, atol=1e-3)


def test_a_draft_of_another_size_is_refused(both: Generator) -> None:
    plan = both.plan(Request(prompt=PROMPT))
    batch, _ = both.conditions.of_window(plan.windows[0], plan, None)
    assert both.refiner is not None
    with pytest.raises(ValueError, match="it must have half the height and width"):
        both.refiner(
            batch, Latents(torch.zeros(1, 8, 2, 4, 4), torch.zeros(1, 9, 32)), seeds=[0], settings=both.settings
        )


# Clips.


def test_two_stages_make_twice_the_size_with_the_controls_of_each(
    ltx2_folder: Path, both: Generator, files: Mapping[str, Path]
) -> None:
    request = Request(prompt=PROMPT, reference_image=files["face"], depth=files["depth"])
    clips = []
    calls = calls_of(module_in(both), lambda: clips.append(both(request)))
    assert [tuple(each["video"].shape[2:]) for each in calls] == [(3, 2, 2)] * 4 + [(3, 4, 4)] * 3
    assert both.num_steps(both.plan(request)) == 2 + 3  # guidance takes two passes a step, in the first stage alone
    assert both.encoders.video is not None
    for each, size in ((calls[0], DRAFT), (calls[-1], WHOLE)):
        frames = read_clip(files["depth"], size=(size, size), rate_hz=None).frames[:FRAMES]
        expected = torch.from_numpy(picture_latents(frames, codec=both.encoders.video))
        torch.testing.assert_close(each["control"].visual[0, :-1, 1:], expected, rtol=0, atol=1e-4)
    (clip,) = clips
    assert clip.frames.shape == (FRAMES, WHOLE, WHOLE, 3)
    first = generator_of(ltx2_folder)(request)
    assert first.frames.shape == (FRAMES, DRAFT, DRAFT, 3)
    assert first.waveform is not None and clip.waveform is not None and first.waveform.std() > 1e-4
    assert np.array_equal(clip.waveform, first.waveform)  # the sound is the first stage's
    again = both(request)  # no trace of the LoRA is left for the next clip's first stage
    assert np.array_equal(again.frames, clip.frames) and np.array_equal(again.waveform, clip.waveform)  # pyright: ignore[reportArgumentType]


def test_with_both_scales_at_zero_controls_leave_no_trace_in_either_stage(
    ltx2_folder: Path, lora: Path, files: Mapping[str, Path]
) -> None:
    words = ["sample.stages=both", f"sample.distilled_lora={lora}", "sample.visual_scale=0", "sample.acoustic_scale=0"]
    off = generator_of(ltx2_folder, *words)
    clips = [off(Request(prompt=PROMPT, reference_image=files[name])).frames for name in ("face", "other")]
    assert np.array_equal(clips[0], clips[1])


def test_the_second_stage_alone_refines_a_video_and_keeps_its_sound(
    second: Generator, files: Mapping[str, Path]
) -> None:
    request = Request(prompt=PROMPT, video=files["talk"], reference_image=files["face"])
    plan = second.plan(request)
    assert plan.notes == ("video: the clip of 0.36 s uses the beginning of its 0.48 s",)
    assert second.num_steps(plan) == 3
    clip = second(request)
    assert clip.frames.shape == (FRAMES, WHOLE, WHOLE, 3)
    own = read_audio(files["talk"], 48000, duration_s=0.36)
    assert clip.waveform is not None and np.allclose(clip.waveform, own, atol=1e-6) and own.std() > 0.1
    draft = second.conditions.of_draft(plan)
    assert second.encoders.video is not None and second.encoders.audio is not None and second.refiner is not None
    frames = read_clip(files["talk"], size=(DRAFT, DRAFT), rate_hz=None).frames[:FRAMES]
    expected = torch.from_numpy(picture_latents(frames, codec=second.encoders.video))[None]
    torch.testing.assert_close(draft.video, expected, rtol=0, atol=1e-4)
    heard = torch.from_numpy(read_audio(files["talk"], 24000, duration_s=0.36))[None]
    torch.testing.assert_close(draft.audio, second.encoders.audio.encode(heard), rtol=0, atol=1e-4)
    batch, _ = second.conditions.of_window(plan.windows[0], plan, None)
    refined = second.refiner(batch, draft, seeds=[0], settings=second.settings)
    assert refined.video is not None
    video = second.encoders.video.decode(refined.video)[0].permute(1, 2, 3, 0)
    assert np.abs(clip.frames / 127.5 - 1 - video.numpy()).max() < 0.01


def test_a_mute_video_is_refined_to_a_silent_clip(second: Generator, files: Mapping[str, Path]) -> None:
    request = Request(prompt=PROMPT, video=files["depth"], duration_s=0.2)
    assert second.plan(request).notes[-1] == "video: has no sound; the clip stays silent"
    clip = second(request)
    assert len(clip.frames) == 5 and clip.waveform is not None and len(clip.waveform) == 9600
    assert not clip.waveform.any()


def test_the_second_stage_alone_needs_a_video_and_the_first_takes_none(
    both: Generator, second: Generator, files: Mapping[str, Path]
) -> None:
    with pytest.raises(UserError, match=r"sample\.stages=second: refines a clip; give it as video=FILE"):
        second.plan(Request(prompt=PROMPT))
    with pytest.raises(UserError, match=r"video=.*talk\.mp4: mmcontrol takes prompt, .*, pose; leave it out"):
        both.plan(Request(prompt=PROMPT, video=files["talk"]))


# Words.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sample.stages=both"], r"sample\.stages=both: needs sample\.distilled_lora=FILE, such as .*-lora-384"),
        (["sample.upsampler_weights=x"], r"sample\.upsampler_weights=x: has no effect while sample\.stages=first"),
        (["sample.stages=second", "sample.distilled_lora=x", "sample.guidance=2"], r"guidance=2: has no effect while"),
        (["sample.stages=all"], r"sample\.stages=all .*: must be one of first, both, second"),
    ],
)
def test_words_of_stages_that_do_not_fit_are_refused(ltx2_folder: Path, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_of(ltx2_folder, *words)


def test_an_upsampler_is_read_from_its_own_folder_or_the_codecs(ltx2_folder: Path, lora: Path, tmp_path: Path) -> None:
    folder = tmp_path / "LTX-2"
    shutil.copytree(ltx2_folder, folder, ignore=shutil.ignore_patterns("latent_upsampler"))
    words = ["sample.stages=both", f"sample.distilled_lora={lora}"]
    with pytest.raises(UserError, match=r"codecs\.video_weights: .*latent_upsampler"):
        generator_of(folder, *words)
    with pytest.raises(UserError, match=r"sample\.upsampler_weights: .*latent_upsampler"):
        generator_of(folder, *words, f"sample.upsampler_weights={tmp_path}")
    assert isinstance(generator_of(folder, *words, f"sample.upsampler_weights={ltx2_folder}").refiner, Refiner)


def test_a_training_refuses_stages_that_its_own_clips_would_not_take(both: Generator) -> None:
    with pytest.raises(ConfigError, match=r"sample\.stages=both: a training's own clips are of its size"):
        both.module.check_encoders(both.encoders)


def test_stages_are_words_of_just_sample(
    ltx2_folder: Path, lora: Path, files: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(ltx2_folder, f"runs_dir={tmp_path}")
    run = create_run(tmp_path, config.recipe)
    run.write_config(to_yaml(config))
    module = module_of(config)
    weights = dict(module.model.state_dict())
    state = CheckpointState(step=3, seed=0, recipe=config.recipe, run=run.id)
    base = load_checkpoint(save_checkpoint(tmp_path / "base", weights=weights, state=state))
    base_model = load_base(module.model, base, module.base_names)
    save_checkpoint(run.checkpoints_dir, weights=weights, state=replace(state, base_model=base_model))

    def sample(*words: str) -> int:
        return avlit(["sample", "run=last", f"runs_dir={tmp_path}", f"sample.distilled_lora={lora}", *words])

    draft, out = tmp_path / "draft.mp4", tmp_path / "clip.mp4"
    asked = [f"prompt={PROMPT}", f"reference_image={files['face']}", f"pose={files['depth']}"]
    assert avlit(["sample", "run=last", f"runs_dir={tmp_path}", *asked, f"out={draft}"]) == 0
    assert sample("sample.stages=second", f"video={draft}", *asked, f"out={out}") == 0
    assert (probe(draft).height, probe(out).height) == (probe(out).height, 256)  # files of small clips are enlarged
    assert len(read_clip(out, rate_hz=None).frames) == FRAMES
    assert sample("sample.stages=both", *asked, f"out={tmp_path / 'both.mp4'}") == 0
    assert sample("sample.stages=both", f"out={tmp_path / 'held-out'}") == USER_MISTAKE
    assert "sample.stages=both: held-out clips have their controls at one size; leave it out" in capsys.readouterr().err
