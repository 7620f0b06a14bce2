"""MMControl's recipe: what each task gives and asks, what trains and is saved, and runs through the real commands."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.checkpoints import Checkpoint, newest_valid
from avlit.codecs.blank import grey_latents, silence_latents
from avlit.codecs.build import build_audio_codec, build_video_codec
from avlit.commands import curriculum, resume, sample
from avlit.commands.assembly import build_encoders, encoders_of
from avlit.commands.train import train
from avlit.commit import CheckpointError
from avlit.config import ConfigError, load_config
from avlit.models.bypass import BypassLTX2
from avlit.models.control_unit import Control
from avlit.objectives import Losses, ltx2_mu, shifted_logit_normal
from avlit.randomness import Draws
from avlit.runs import Run, list_runs
from avlit.sampling import Latents
from data.corpus import CorpusSettings, make_clip
from data.encode import encode_clip
from data.shards import ShardWriter
from recipes.mmcontrol.config import MMControlConfig
from recipes.mmcontrol.recipe import MMControl

SMALL = ("model.num_layers=2", "model.num_heads=2", "model.video_head_dim=12", "model.audio_head_dim=8",
         "data.num_frames=9", "data.height=32", "data.width=32", "train.threads=1")  # fmt: skip
FRAMES, TOKENS, CELLS, VOICE = 3, 47, 4, 32  # latent frames, audio latents, latent cells a side, reference latents
NEVER = ("dropout.text=0", "dropout.visual=0", "dropout.acoustic=0")
CONTROLS = ("reference_image", "reference", "depth", "pose")


def module(*words: str, recipe: str = "mmcontrol") -> MMControl:
    config = load_config([f"recipe={recipe}", *SMALL, *words])
    assert isinstance(config, MMControlConfig)
    made = MMControl(config)
    made.freeze()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # no output is zero as built, so that every input matters
        for parameter in made.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def batch_of(count: int = 6, *, step: int = 0, without: tuple[str, ...] = ()) -> AVBatch:
    """Clips with every control but those named; the voice of the second ends early."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    voice = draw(VOICE, 64)
    voice[1, 20:] = 0
    controls: dict[str, Any] = {"reference": voice, "reference_image": draw(48, 1, CELLS, CELLS)}
    controls |= {name: draw(48, FRAMES, CELLS, CELLS) for name in ("depth", "pose")}
    for name in without:
        controls[name] = torch.zeros_like(controls[name])
    controls |= {f"has_{name}": (name not in without,) * count for name in CONTROLS}
    return AVBatch(
        keys=tuple(f"clip-{number}" for number in range(count)),
        subsets=("basic_face",) * count,
        captions=("",) * count,
        duration_s=0.75,
        step=step,
        slots=tuple(range(count)),
        text=draw(48, 64),
        text_lengths=(9, 5, *(7,) * (count - 2))[:count],
        audio_latents=draw(TOKENS, 64),
        video_latents=draw(48, FRAMES, CELLS, CELLS),
        **controls,
    )


def draws_of(batch: AVBatch, *, seed: int = 0) -> Draws:
    return Draws(seed, batch.step, batch.slots)


def calls_of(made: MMControl, act: Any) -> list[dict[str, Any]]:
    """What the model is given in each of the calls that `act` makes."""
    calls: list[dict[str, Any]] = []

    def note(_: object, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> None:
        calls.append({"video_latents": args[0], "audio_latents": args[1], **kwargs})

    handle = made.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        act()
    finally:
        handle.remove()
    return calls


def given_to_model(made: MMControl, batch: AVBatch) -> dict[str, Any]:
    (given,) = calls_of(made, lambda: made.step(batch, draws_of(batch)))
    return given


def control_of(made: MMControl, batch: AVBatch) -> Control:
    return given_to_model(made, batch)["control"]


def empty() -> Tensor:
    """[C, T, h, w]"""
    return grey_latents(build_video_codec("embedded"), num_frames=9, height=32, width=32)[0]


def silence() -> Tensor:
    """[P + L, C]"""
    return silence_latents(build_audio_codec("embedded"), VOICE + TOKENS)[0]


def levels(batch: AVBatch) -> Tensor:
    return shifted_logit_normal(draws_of(batch).times(), mu=ltx2_mu(FRAMES * CELLS * CELLS))


# The training step.


def test_the_backbone_stage_noises_video_and_sound_to_the_same_level_without_controls() -> None:
    made, batch = module("dropout.text=0", recipe="mmcontrol_backbone"), batch_of()
    given = given_to_model(made, batch)
    assert given["control"] is None and made.model.bypass is None
    sigma, draws = levels(batch), draws_of(batch)
    for name, clean in (("video", batch.video_latents), ("audio", batch.audio_latents)):
        assert clean is not None
        torch.testing.assert_close(given[f"{name}_timestep"], 1000 * sigma)
        level = sigma.view(-1, *[1] * (clean.ndim - 1))
        expected = (1 - level) * clean + level * draws.normal(f"{name} noise", clean)
        torch.testing.assert_close(given[f"{name}_latents"], expected)
    assert torch.equal(given["text"], batch.text[:, :9])
    assert given["text_mask"].sum(1).tolist() == list(batch.text_lengths)


def test_dropped_text_is_one_token_of_zeros() -> None:
    given = given_to_model(module("dropout.text=1"), batch_of())
    assert given["text"].shape == (6, 1, 64) and not given["text"].any() and given["text_mask"].all()


def test_each_clip_is_controlled_by_what_its_task_names() -> None:
    made = module(*NEVER, "tasks.audio=1", "tasks.depth=1")
    seen = []
    for step in range(3):
        batch = batch_of(step=step)
        assert batch.reference_image is not None and batch.reference is not None
        tasks = made.step(batch, draws_of(batch)).tasks
        control = control_of(made, batch)
        assert (control.num_images, control.num_voice_latents) == (1, VOICE)
        for row, task in enumerate(tasks):
            visual, acoustic = control.visual[row], control.acoustic[row]  # [C + 1, 1 + T, h, w], [P + L, C + 1]
            assert torch.equal(visual[:-1, :1], batch.reference_image[row])
            structure = empty() if task == "audio" else getattr(batch, task)[row]
            torch.testing.assert_close(visual[:-1, 1:], structure)
            assert not visual[-1, 0].any() and visual[-1, 1:].all()
            voice = silence()[:VOICE]
            if task == "audio":
                heard = batch.reference[row].any(-1, keepdim=True)
                voice = torch.where(heard, batch.reference[row], voice)  # a voice that ends early is silent after it
            torch.testing.assert_close(acoustic[:VOICE, :-1], voice)
            torch.testing.assert_close(acoustic[VOICE:, :-1], silence()[VOICE:])
            assert acoustic[:VOICE, -1].eq(0 if task == "audio" else 1).all() and acoustic[VOICE:, -1].all()
        seen.append(tasks)
    for row in range(6):  # in turns: each once in three steps
        assert {tasks[row] for tasks in seen} == {"audio", "depth", "pose"}


def test_visual_and_acoustic_controls_are_dropped_each_on_its_own() -> None:
    batch = batch_of()
    plain = control_of(module(*NEVER), batch)
    blind = control_of(module("dropout.text=0", "dropout.visual=1", "dropout.acoustic=0"), batch)
    deaf = control_of(module("dropout.text=0", "dropout.visual=0", "dropout.acoustic=1"), batch)
    assert torch.equal(blind.acoustic, plain.acoustic) and torch.equal(deaf.visual, plain.visual)
    expected = torch.cat((empty()[:, :1], empty()), dim=1).expand(6, -1, -1, -1, -1)
    torch.testing.assert_close(blind.visual[:, :-1], expected)
    torch.testing.assert_close(deaf.acoustic[..., :-1], silence().expand(6, -1, -1))
    assert blind.visual[:, -1].all() and deaf.acoustic[..., -1].all()
    both = [
        [Draws(0, step, range(50)).happens(f"drop {name}", 0.1) for step in range(60)]
        for name in ("visual", "acoustic")
    ]
    rates = np.mean(both, axis=(1, 2))
    assert rates == pytest.approx([0.1, 0.1], abs=0.02)
    assert np.mean(np.all(both, axis=0)) == pytest.approx(0.01, abs=0.008)


def test_references_lead_the_main_stream_at_the_clips_noise_level_and_leave_its_noise_alone() -> None:
    made, batch = module(*NEVER), batch_of()
    given = given_to_model(made, batch)
    control, draws, sigma = given["control"], draws_of(batch), levels(batch)
    for name, clean, lead, axis, kind in (
        ("video", batch.video_latents, control.images, 2, "image"),
        ("audio", batch.audio_latents, control.voices, 1, "voice"),
    ):
        assert clean is not None
        level = sigma.view(-1, *[1] * (clean.ndim - 1))
        noisy = [
            (1 - level) * x + level * draws.normal(f"{which} noise", x) for which, x in ((kind, lead), (name, clean))
        ]
        torch.testing.assert_close(given[f"{name}_latents"], torch.cat(noisy, dim=axis))
        assert given[f"{name}_timestep"].shape == (6,)


@pytest.mark.parametrize("without", [(), CONTROLS], ids=["with references", "without"])
def test_a_reference_is_supervised_where_the_clip_has_it(without: tuple[str, ...]) -> None:
    made, batch = module(*NEVER), batch_of(without=without)
    losses = made.step(batch, draws_of(batch))
    given = given_to_model(made, batch)
    with torch.no_grad():
        pred = made.model(given.pop("video_latents"), given.pop("audio_latents"), **given)
    control, draws = given["control"], draws_of(batch)
    for name, clean, lead, axis, kind in (
        ("video", batch.video_latents, control.images, 2, "image"),
        ("audio", batch.audio_latents, control.voices, 1, "voice"),
    ):
        assert clean is not None
        target = torch.cat(
            (draws.normal(f"{kind} noise", lead) - lead, draws.normal(f"{name} noise", clean) - clean), dim=axis
        )
        errors = (getattr(pred, name) - target).square()
        for row, task in enumerate(losses.tasks):
            has_lead = not without and (name == "video" or task == "audio")
            first = 0 if has_lead else lead.shape[axis]
            counted = errors[row].narrow(axis - 1, first, errors.shape[axis] - first)
            torch.testing.assert_close(losses.parts[name][row], counted.mean())


def test_clips_of_a_batch_are_what_they_are_alone() -> None:
    made, batch = module("dropout.text=0.3", "dropout.visual=0.3", "dropout.acoustic=0.3"), batch_of()
    batch = replace(batch, has_reference=(True, False) * 3, has_pose=(False, True) * 3)
    together = made.step(batch, draws_of(batch))
    for row in range(6):
        alone = made.step(one_of(batch, row), Draws(0, 0, (row,)))
        assert alone.tasks == together.tasks[row : row + 1]
        for part in ("video", "audio"):
            torch.testing.assert_close(together.parts[part][row : row + 1], alone.parts[part], rtol=1e-4, atol=1e-5)


def one_of(batch: AVBatch, row: int) -> AVBatch:
    only = slice(row, row + 1)
    cut: dict[str, Any] = {}
    for name, value in vars(batch).items():
        cut[name] = value[only] if isinstance(value, Tensor | tuple) else value
    return replace(batch, **cut)


def gradients(made: MMControl, losses: Losses) -> set[str]:
    made.zero_grad()
    losses.total.backward()
    return {name for name, each in made.model.named_parameters() if each.grad is not None}


def test_a_stage_trains_the_backbone_or_the_bypass_alone() -> None:
    for recipe, part in (("mmcontrol_backbone", "backbone"), ("mmcontrol", "bypass")):
        made, batch = module(recipe=recipe), batch_of()
        names = {name for name, _ in made.model.named_parameters() if name.startswith(f"{part}.")}
        assert set(made.trained_parameters) == names == gradients(made, made.step(batch, draws_of(batch)))


def test_a_held_out_measurement_drops_nothing_and_spreads_tasks_and_noise_levels() -> None:
    never = ("dropout.text=1", "dropout.visual=1", "dropout.acoustic=1")
    made, batch = module(*never, "tasks.audio=1", "tasks.depth=1"), batch_of()
    draws = Draws(0, 0, batch.slots, is_training=False)
    losses = made.step(batch, draws)
    (given,) = calls_of(made, lambda: made.step(batch, draws))
    assert given["text"].any() and not given["control"].visual[:, -1, 0].any()
    assert sorted(losses.tasks) == ["audio", "audio", "depth", "depth", "pose", "pose"]
    assert losses.noise_level.unique().numel() == 6


# Sampling.


def sampled(made: MMControl, batch: AVBatch, keyframes: Tensor | None = None, **values: Any) -> tuple[Tensor, Tensor]:
    values = {"steps": 2, **values}
    found: Latents = made.sample(
        batch, seeds=range(len(batch)), settings=replace(made.config.sample, **values), keyframes=keyframes
    )
    assert found.video is not None and found.audio is not None
    return found.video, found.audio


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def lacking(batch: AVBatch, *names: str) -> AVBatch:
    changes: dict[str, Any] = {name: None for name in names} | {f"has_{name}": () for name in names}
    return replace(batch, **changes)


def test_every_control_of_a_clip_and_every_combination_has_its_own_effect() -> None:
    made, batch = module(), batch_of(2)
    found = [
        sampled(made, lacking(batch, *(name for bit, name in enumerate(CONTROLS) if not number >> bit & 1)))
        for number in range(16)
    ]
    assert found[0][0].shape == (2, 48, FRAMES, CELLS, CELLS) and found[0][1].shape == (2, TOKENS, 64)
    for number in range(16):
        for other in range(number):
            depth_alone = {number & ~8, other & ~8} == {number & ~8} and number & 4 and other & 4  # pose is then unread
            assert same(found[number], found[other]) == bool(depth_alone), (number, other)


def test_scales_weigh_each_modality_and_zero_is_the_clip_without_controls() -> None:
    made, batch = module(), batch_of(2)
    of = {
        scales: sampled(made, batch, visual_scale=scales[0], acoustic_scale=scales[1])
        for scales in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (2.0, 1.0))
    }
    assert not any(same(of[a], of[b]) for a in of for b in of if a != b)
    other = replace(batch_of(2, step=1), reference=-batch.reference)  # pyright: ignore[reportOptionalOperand]
    assert same(sampled(made, other, visual_scale=0.0, acoustic_scale=0.0), of[0.0, 0.0])
    assert same(sampled(made, other, acoustic_scale=0.0), of[1.0, 0.0])  # the voice reaches nothing else
    assert not same(sampled(made, other), of[1.0, 1.0])


def test_scales_of_zero_sample_what_the_backbone_alone_does() -> None:
    made, batch = module(), batch_of(2)
    alone = module(recipe="mmcontrol_backbone")
    alone.model.backbone.load_state_dict(made.model.backbone.state_dict())
    assert same(sampled(made, batch, visual_scale=0.0, acoustic_scale=0.0), sampled(alone, batch))


def test_guidance_contrasts_the_text_alone_under_the_same_controls() -> None:
    made, batch = module(), batch_of(2)
    calls = calls_of(made, lambda: sampled(made, batch, steps=1))
    assert [call["text"].shape[1] for call in calls] == [1, 9] and not calls[0]["text"].any()
    assert calls[0]["control"] is calls[1]["control"]
    assert len(calls_of(made, lambda: sampled(made, batch, steps=1, guidance=1.0, audio_guidance=1.0))) == 1
    plain = sampled(made, batch)
    assert not same(sampled(made, batch, guidance=5.0), plain)
    assert not same(sampled(made, batch, audio_guidance=5.0), plain)


def test_given_frames_are_refused() -> None:
    made, batch = module(), batch_of(2)
    keyframes = torch.zeros(2, FRAMES, dtype=torch.bool)
    assert same(sampled(made, batch, keyframes), sampled(made, batch))
    keyframes[0, 0] = True
    with pytest.raises(ValueError, match="keyframes: MMControl takes a reference image, depth and pose, and no given"):
        sampled(made, batch, keyframes)


# Configuration.


@pytest.mark.parametrize(
    ("recipe", "word", "message"),
    [
        ("mmcontrol", "tasks.audio=0", r"reference_tokens=32: with tasks\.audio=0 no voice is read; set it to 0"),
        ("mmcontrol", "tasks.audio=0 dropout.acoustic=0.3", r"dropout\.acoustic=0\.3: has no effect while"),
        ("mmcontrol", "reference_tokens=0", r"reference_tokens=0: with tasks\.audio=3 a voice is read"),
        ("mmcontrol", "tasks.depth=0.1234567", r"tasks: .*use weights with fewer digits"),
        ("mmcontrol", "sample.sync_clips=4", r"sample\.sync_clips=4: lip sync is measured with a first frame given"),
        ("mmcontrol", "model.trainable=backbone", r"model\.trainable=backbone: is set by the recipe"),
        ("mmcontrol", "model.bypass_every=0", r"model\.bypass_every=0: must be at least 1"),
        ("mmcontrol_backbone", "tasks.pose=2", r"tasks\.pose=2: has no effect while model\.trainable=backbone"),
        ("mmcontrol_backbone", "sample.visual_scale=2", r"sample\.visual_scale=2: has no effect"),
        ("mmcontrol_backbone", "dropout.acoustic=0", r"dropout\.acoustic=0: has no effect"),
    ],
)
def test_what_does_not_fit_a_stage_is_refused(recipe: str, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([f"recipe={recipe}", *SMALL, *word.split()])


def test_a_stage_reads_and_accepts_what_its_tasks_are_controlled_by() -> None:
    def reads(recipe: str, *words: str) -> tuple[tuple[str, ...], int, bool]:
        config = load_config([f"recipe={recipe}", *words])
        found = config.reads
        assert found.captions == ("visual_speech",)
        assert config.accepts == ("prompt", *(["reference"] if found.own_reference else []), *found.controls)
        return found.controls, found.reference_tokens, found.own_reference

    assert reads("mmcontrol_backbone") == ((), 0, False)
    assert reads("mmcontrol") == (("reference_image", "depth", "pose"), 32, True)
    assert reads("mmcontrol", "tasks.depth=0") == (("reference_image", "pose"), 32, True)
    assert reads("mmcontrol", "tasks.audio=0", "reference_tokens=0") == (("reference_image", "depth", "pose"), 0, False)
    with pytest.raises(ConfigError, match="tasks: every weight is 0"):
        load_config(["recipe=mmcontrol", "tasks.audio=0", "tasks.depth=0", "tasks.pose=0", "reference_tokens=0"])


def test_the_paper_size_is_what_the_paper_publishes() -> None:
    config = load_config(["recipe=mmcontrol", "size=paper"])
    assert isinstance(config, MMControlConfig)
    assert (config.train.steps, config.data.batch_size, config.optimizer.schedule) == (7200, 16, "cosine")
    assert (config.dropout.visual, config.dropout.acoustic) == (0.1, 0.1)
    assert round(config.optimizer.warmup * config.train.steps) == 200
    assert len(set(config.tasks.weights.values())) == 1 and len(config.tasks.weights) == 3
    assert (config.timing.latent_frames, config.timing.latent_size) == (7, (16, 24))
    assert (config.model.num_layers, config.model.video_dim, config.model.audio_dim) == (48, 4096, 2048)
    assert len(config.model.bypass_layers) == 24
    assert (config.sample.guidance, config.sample.audio_guidance, config.sample.steps) == (3.0, 7.0, 40)
    assert (config.codecs.video, config.codecs.audio, config.codecs.text) == ("ltx2", "ltx2", "gemma")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.audio_channels=40", r"model\.audio_channels=40: must be 64"),
        ("model.video_channels=16", r"model\.video_channels=16: must be 48"),
        ("model.text_dim=100", r"model\.text_dim=100: must be 64"),
    ],
)
def test_sizes_that_do_not_fit_the_codecs_are_named_before_training(word: str, message: str) -> None:
    made = module(word)
    with pytest.raises(ConfigError, match=message):
        made.check_encoders(build_encoders(made.config))


# Runs.


def words(folder: Path, cache: Path, *more: str) -> list[str]:
    given = [
        *SMALL, "data.num_clips=16", "data.batch_size=4", "data.subsets={basic_face: 1}", "train.steps=2",
        "validation.clips=4", "sample.steps=2", "sample.count=1", "train.log_every=1", "checkpoint.every=1",
        "optimizer.lr=1e-2", "optimizer.schedule=constant", "optimizer.warmup=0", f"runs_dir={folder}/runs",
        "tracking.uri=offline", f"data.cache_dir={cache}",
    ]  # fmt: skip
    return list({word.partition("=")[0]: word for word in (*given, *more)}.values())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with `runs/` of a curriculum; its tests copy it where they change it."""
    folder = tmp_path_factory.mktemp("trained")
    given = [word for word in words(folder, cache, "recipe=mmcontrol") if not word.startswith("optimizer.final")]
    assert curriculum.main(given) == 0
    return folder


def copy_of(trained: Path, folder: Path) -> Path:
    shutil.copytree(trained / "runs", folder / "runs")
    return folder


def run_of(folder: Path, recipe: str) -> Run:
    (run,) = (run for run in list_runs(folder / "runs") if run.recipe == recipe and run.parent)
    return run


def newest(run: Run) -> Checkpoint:
    found, _ = newest_valid(run.checkpoints_dir)
    assert found is not None
    return found


def test_a_curriculum_trains_a_backbone_and_a_bypass_that_is_saved_without_it(trained: Path) -> None:
    first, second = (newest(run_of(trained, recipe)) for recipe in ("mmcontrol_backbone", "mmcontrol"))
    backbone, saved = first.averaged(), second.weights()
    assert all(name.startswith("bypass.") for name in (*saved, *second.ema(), *second.optimizer()))
    assert not first.state.base_model and len(second.state.base_model) == 32
    assert [step for _, step in second.state.lineage] == [2, 2]
    name = "blocks.0.attn1.to_q.weight"
    for stream, own in (("video", ""), ("audio", "audio_")):
        started = backbone[f"backbone.transformer_blocks.0.{own}attn1.to_q.weight"]
        # two steps of AdamW move a weight by twice its learning rate at most: it began as the averaged backbone's copy
        assert (saved[f"bypass.{stream}.{name}"] - started).abs().max() < 2.02e-2
        assert saved[f"bypass.{stream}.blocks.0.hint.weight"].any()
    metrics = json.loads(run_of(trained, "mmcontrol").metrics_path.read_text())
    assert {"val/loss/video", "val/loss/audio"} <= metrics.keys()
    assert {f"val/loss/{part}/task/{task}" for part in ("video", "audio") for task in ("audio", "depth", "pose")} <= {
        name for name in metrics
    }


def test_training_leaves_every_bit_of_the_backbone(trained: Path, cache: Path) -> None:
    from avlit.commands.generation import load_trained, run_config

    run = run_of(trained, "mmcontrol")
    module = load_trained(run_config(run, []), newest(run))
    first = newest(run_of(trained, "mmcontrol_backbone"))
    backbone = first.averaged()
    state = module.model.state_dict()
    assert backbone.keys() == {name for name in state if name.startswith("backbone.")}
    assert all(torch.equal(state[name], tensor) for name, tensor in backbone.items())
    batch = batch_of(2)
    module.freeze()
    before = {name: tensor.clone() for name, tensor in state.items()}
    optimizer = torch.optim.AdamW(module.trained_parameters.values(), lr=1e-2)
    module.step(batch, draws_of(batch)).total.backward()
    optimizer.step()
    moved = {name for name, tensor in module.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("bypass.") for name in moved)


def test_a_run_goes_on_bit_for_bit_on_its_backbone_wherever_both_are(
    trained: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(trained, tmp_path)
    run = run_of(folder, "mmcontrol")
    expected = newest(run)
    shutil.rmtree(expected.path)
    assert newest(run).step == 1
    moved = ["run=" + run.id, f"runs_dir={folder}/runs", "tracking.uri=offline"]
    assert resume.main(moved) == 0
    again = newest(run)
    printed = capsys.readouterr().out
    assert "tensors of" in printed and str(folder) in printed  # not those of the folder that it was copied from
    assert again.step == 2 and again.state.base_model == expected_base(trained)
    for read in ("weights", "ema", "optimizer"):
        ours, theirs = (getattr(each, read)() for each in (again, newest(run_of(trained, "mmcontrol"))))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def expected_base(trained: Path) -> str:
    return newest(run_of(trained, "mmcontrol")).state.base_model


def test_a_trained_bypass_samples_and_is_trained_on_from(trained: Path, cache: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path)
    run = run_of(folder, "mmcontrol")
    out = tmp_path / "clip.mp4"
    asked = [f"run={run.id}", f"runs_dir={folder}/runs", "prompt=[VISUAL]: A man. [SPEECH]: hello.", f"out={out}"]
    assert sample.main(asked) == 0 and out.exists()
    held_out = [*asked[:2], "sample.count=1", f"out={tmp_path / 'held-out'}", "train.accelerator=cpu"]
    assert sample.main(held_out) == 0
    suffixes = {path.name.partition(".")[2] for path in (tmp_path / "held-out" / "controls").iterdir()}
    assert suffixes == {"reference_image.png", "depth.mp4", "pose.mp4", "reference.wav"}
    outcome = train(load_config(words(folder, cache, "recipe=mmcontrol", f"init={run.id}", "train.steps=1")))
    further, before = newest(outcome.run), newest(run)
    assert further.state.base_model == before.state.base_model
    saved, start = further.weights(), before.averaged()
    assert saved.keys() == start.keys()
    assert all((saved[name] - start[name]).abs().max() < 1.01e-2 for name in saved)


def test_another_backbone_is_refused_and_a_missing_one_is_named(trained: Path, cache: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path)
    run, first = run_of(folder, "mmcontrol"), run_of(folder, "mmcontrol_backbone")
    asked = [
        f"run={run.id}",
        f"runs_dir={folder}/runs",
        "prompt=[VISUAL]: A man. [SPEECH]: hello.",
        f"out={tmp_path / 'clip.mp4'}",
    ]
    before_its_last_step = first.checkpoints_dir / "step-00000001"
    for began_from, message in (
        (tmp_path / "gone", r"of its base by fingerprint only, which were in .*gone; put that checkpoint back"),
        (before_its_last_step, r"trained on base weights \w{32}, this run has \w{32}"),
        (None, r"it was trained on released weights: give them as model\.weights"),
    ):
        record = json.loads((run.path / "run.json").read_text())
        record["init_checkpoint"] = began_from and str(began_from)
        (run.path / "run.json").write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match=message):
            sample.main(asked)


def test_a_bypass_without_a_trained_backbone_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe=mmcontrol: needs a trained backbone; give init=RUN"):
        train(load_config(words(tmp_path, cache, "recipe=mmcontrol")))


def test_paper_settings_train_beside_a_released_backbone(
    tmp_path: Path, ltx2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper size's own path, at tiny sizes: released transformer, both VAEs, Gemma with connectors, bf16."""
    codecs = [f"codecs.{name}_weights={ltx2_folder}" for name in ("video", "audio", "text")]
    recipe = ["recipe=mmcontrol", "size=paper", "data.num_frames=9", "data.height=64", "data.width=64", *codecs]
    config = load_config([*recipe, "reference_tokens=12"])
    encoders = encoders_of(config.codecs, config.reads, peak=None, device="cpu")
    assert encoders.video is not None and encoders.audio is not None
    settings = CorpusSettings(fps=25.0, num_frames=9, height=64, width=64, rate_hz=24000)
    with ShardWriter(tmp_path / "shards", encoders.identity(fps=25.0, rate_hz=24000)) as writer:
        for number, split in enumerate(("train", "train", "heldout")):
            clip = make_clip("basic_face", number, settings, controls=config.reads.controls)
            writer.add("basic_face", split, encode_clip(clip, encoders))
    released = tmp_path / "LTX-2"
    given = [
        *recipe, "reference_tokens=12", f"data.root={tmp_path / 'shards'}", f"model.weights={released}",
        "model.num_layers=2", "model.num_heads=2", "model.video_head_dim=8", "model.audio_head_dim=4",
        f"model.text_dim={encoders.text.dim}", f"model.video_channels={encoders.video.channels}",
        f"model.audio_channels={encoders.audio.channels}", "data.batch_size=2", "train.accumulate=2", "train.steps=1",
        "sample.count=1", "sample.steps=2", "optimizer.lr=1e-2", f"runs_dir={tmp_path / 'runs'}",
        "tracking.uri=offline",
    ]  # fmt: skip
    config = load_config(given)
    assert isinstance(config, MMControlConfig)
    backbone = BypassLTX2(config.model, seed=3).backbone.bfloat16()
    torch.nn.init.normal_(backbone.proj_out.weight)  # a trained head is not zero
    backbone.save_pretrained(released / "transformer")
    outcome = train(config)
    assert "tensors loaded, 0 new" in capsys.readouterr().out
    checkpoint = newest(outcome.run)
    assert len(checkpoint.state.base_model) == 32
    saved = checkpoint.weights()
    assert all(name.startswith("bypass.") and tensor.dtype == torch.float32 for name, tensor in saved.items())
    assert saved["bypass.video.blocks.0.hint.weight"].any()
    out = ["run=last", f"runs_dir={tmp_path / 'runs'}", f"out={tmp_path / 'clips_out'}"]
    assert sample.main(out) == 0
    backbone.proj_in.bias.data.add_(1)
    backbone.save_pretrained(released / "transformer")
    with pytest.raises(CheckpointError, match=r"trained on base weights \w{32}, this run has \w{32}"):
        sample.main([*out[:-1], f"out={tmp_path / 'others'}"])
