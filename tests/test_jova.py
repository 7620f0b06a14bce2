"""JoVA's recipe: what each stage gives and asks, the mouth loss, what trains, and runs through the real commands."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.checkpoints import newest_valid
from avlit.commands import curriculum, sample
from avlit.commands.assembly import build_encoders
from avlit.commands.train import train
from avlit.config import Config, ConfigError, load_config
from avlit.errors import UserError
from avlit.models.mmdit_branch import BranchText
from avlit.models.twin_mmdit import TwinMMDiT
from avlit.objectives import Losses
from avlit.randomness import Draws, numpy_generator
from avlit.runs import list_runs
from avlit.sampling import Latents
from data.batches import Contents, with_mouths
from data.sample import Annotation, DamagedSample, EncodedSample
from recipes.jova.config import JoVAConfig
from recipes.jova.recipe import STEPS_WITHOUT_MOUTH, JoVA

SMALL = ("model.num_single_layers=1", "model.num_heads=2", "model.head_dim=16", "model.rope_axes=[4,6,6]",
         "data.num_frames=9", "data.height=32", "data.width=32", "train.threads=1")  # fmt: skip
FRAMES, TOKENS, CELLS = 3, 47, 4  # latent frames of 9, audio latents of 9 frames at 12 a second, 32 pixels
STAGES = ("stage1_video", "stage1_audio", "stage2")
NO_IMAGE = ("image_share=0", "sample.sync_clips=0")
NEVER = ("dropout.text=0", *NO_IMAGE)


def module(*words: str, stage: str = "stage2") -> JoVA:
    config = load_config([f"recipe=jova_{stage}", *SMALL, *words])
    assert isinstance(config, JoVAConfig)
    made = JoVA(config)
    made.freeze()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # no output is zero as built, so that every input matters
        for parameter in made.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def batch_of(count: int = 2, *, step: int = 0, stage: str = "stage2") -> AVBatch:
    """Clips of which the second shows no mouth."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    mask = torch.zeros(count, FRAMES, CELLS, CELLS, dtype=torch.bool)
    mask[0, :, 2:, 1:3] = True
    batch = AVBatch(
        keys=tuple(f"clip-{number}" for number in range(count)),
        subsets=("basic_face",) * count,
        captions=("",) * count,
        duration_s=0.75,
        step=step,
        slots=tuple(range(count)),
        text=draw(48, 64),
        text_lengths=(9, 5, *(7,) * (count - 2)),
        audio_captions=("",) * count,
        audio_text=draw(48, 64),
        audio_text_lengths=(4, 6, *(5,) * (count - 2)),
        audio_latents=draw(TOKENS, 64),
        video_latents=draw(48, FRAMES, CELLS, CELLS),
        mouth_mask=mask,
        has_mouth=tuple(bool(each.any()) for each in mask),
    )
    without_second_text = {"audio_text": None, "audio_text_lengths": (), "mouth_mask": None, "has_mouth": ()}
    if stage == "stage1_video":
        return replace(batch, audio_latents=None, **without_second_text)
    if stage == "stage1_audio":
        return replace(batch, video_latents=None, **without_second_text)
    return batch


def draws_of(batch: AVBatch, *, seed: int = 0) -> Draws:
    return Draws(seed, batch.step, batch.slots)


class Heard(Exception):
    """What the model was given."""

    def __init__(self, given: dict[str, Any]):
        super().__init__()
        self.given = given


def given_to_model(made: JoVA, batch: AVBatch) -> dict[str, Any]:
    """The arguments of the model's one call in a training step."""

    def stop(_: object, args: tuple, kwargs: dict[str, Any]) -> None:
        raise Heard(kwargs)

    handle = made.model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with pytest.raises(Heard) as heard:
            made.step(batch, draws_of(batch))
    finally:
        handle.remove()
    return heard.value.given


def gradients(made: JoVA, losses: Losses) -> dict[str, Tensor]:
    made.zero_grad()
    losses.total.backward()
    return {name: each.grad.clone() for name, each in made.model.named_parameters() if each.grad is not None}


# The training step.


def test_the_joint_stage_noises_video_and_sound_to_the_same_level_and_gives_each_branch_its_text() -> None:
    batch = batch_of()
    given = given_to_model(module(*NEVER), batch)
    assert torch.equal(given["video_timestep"], given["audio_timestep"]) and "image" not in given
    draws = draws_of(batch)
    sigma = torch.from_numpy(draws.times()).float()
    torch.testing.assert_close(given["video_timestep"], 1000 * sigma)
    for name, clean in (("video", batch.video_latents), ("audio", batch.audio_latents)):
        assert clean is not None
        level = sigma.view(-1, *[1] * (clean.ndim - 1))
        expected = (1 - level) * clean + level * draws.normal(f"{name} noise", clean)
        torch.testing.assert_close(given[f"{name}_latents"], expected)
    for name, text, lengths in (
        ("video_text", batch.text, (9, 5)),
        ("audio_text", batch.audio_text, (4, 6)),
    ):
        assert text is not None
        assert tuple(given[name].lengths) == lengths
        assert torch.equal(given[name].features, text[:, : max(lengths)])


@pytest.mark.parametrize("stage", ["stage1_video", "stage1_audio"])
def test_a_branch_alone_is_given_nothing_of_the_other(stage: str) -> None:
    words = NEVER if stage == "stage1_video" else NEVER[:1]
    made, batch = module(*words, stage=stage), batch_of(stage=stage)
    given = given_to_model(made, batch)
    own, other = ("video", "audio") if stage == "stage1_video" else ("audio", "video")
    assert given[f"{other}_latents"] is None and f"{other}_text" not in given
    assert torch.equal(given[f"{own}_text"].features, batch.text[:, :9])
    if own == "audio":
        assert given["num_frames"] == FRAMES  # of the clip that lasts as long
    losses = made.step(batch, draws_of(batch))
    assert list(losses.parts) == [own]
    trained = gradients(made, losses)
    assert {name.split(".")[0] for name in trained} == {"backbone" if own == "video" else "audio"}


def test_dropped_text_is_one_token_of_zeros_for_both_branches() -> None:
    batch = batch_of()
    given = given_to_model(module("dropout.text=1", *NO_IMAGE), batch)
    for name in ("video_text", "audio_text"):
        assert given[name].features.shape == (2, 1, 64) and not given[name].features.any()
        assert list(given[name].lengths) == [1, 1]


def test_the_reference_image_is_the_first_latent_frame_of_the_share_of_clips_that_get_one() -> None:
    made, batch = module("image_share=1"), batch_of()
    assert batch.video_latents is not None
    given = given_to_model(made, batch)
    assert torch.equal(given["image"], batch.video_latents[:, :, :1]) and given["has_image"].all()
    draws = [Draws(0, step, range(50)).happens("give image", 0.2) for step in range(40)]
    assert np.mean(draws) == pytest.approx(0.2, abs=0.03)


def test_the_mouth_loss_is_the_mean_error_over_the_mouth_s_cells_alone() -> None:
    made, batch = module(*NEVER), batch_of()
    assert batch.video_latents is not None
    losses = made.step(batch, draws_of(batch))
    pred = made.model(**given_to_model(made, batch)).video
    target = draws_of(batch).normal("video noise", batch.video_latents) - batch.video_latents
    errors = (pred - target).square()  # [B, C, T, h, w]
    torch.testing.assert_close(losses.parts["mouth"][0], errors[0, :, :, 2:, 1:3].mean())
    assert losses.parts["mouth"][1] == 0 and losses.applies["mouth"] == (True, False)
    torch.testing.assert_close(losses.measures["mouth_coverage"], torch.tensor([0.25, 0.0]))
    plain = losses.parts["video"].mean() + losses.parts["audio"].mean()
    torch.testing.assert_close(losses.total, plain + 5.0 * losses.parts["mouth"].mean())


@pytest.mark.parametrize("zero", ["mouth_weight=0", "mouth_weight=null"])
def test_lambda_zero_is_the_plain_objective_bit_for_bit(zero: str) -> None:
    made, batch = module(zero), batch_of()
    if zero.endswith("null"):
        batch = replace(batch, mouth_mask=None, has_mouth=())
    losses = made.step(batch, draws_of(batch))
    plain = losses.parts["video"].mean() + losses.parts["audio"].mean()
    assert torch.equal(losses.total, plain)
    found = gradients(made, losses)
    made.zero_grad()
    again = made.step(batch, draws_of(batch))
    (again.parts["video"].mean() + again.parts["audio"].mean()).backward()
    expected = {name: each.grad for name, each in made.model.named_parameters() if each.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_lambda_above_zero_changes_the_gradient_and_nothing_of_what_is_drawn() -> None:
    batch = batch_of()
    some, none = (module(f"mouth_weight={weight}") for weight in (5, 0))
    losses, without = some.step(batch, draws_of(batch)), none.step(batch, draws_of(batch))
    assert all(torch.equal(losses.parts[part], without.parts[part]) for part in ("video", "audio", "mouth"))
    found, plain = gradients(some, losses), gradients(none, without)
    assert not torch.equal(found["backbone.proj_out.weight"], plain["backbone.proj_out.weight"])


def test_clips_of_a_batch_are_what_they_are_alone() -> None:
    made, batch = module("image_share=0.5", "dropout.text=0.3"), batch_of(4)
    together = made.step(batch, draws_of(batch))
    for row in range(4):
        alone = made.step(one_of(batch, row), Draws(0, 0, (row,)))
        for part in ("video", "audio", "mouth"):
            torch.testing.assert_close(together.parts[part][row : row + 1], alone.parts[part], rtol=1e-4, atol=1e-5)


def one_of(batch: AVBatch, row: int) -> AVBatch:
    only = slice(row, row + 1)
    cut: dict[str, Any] = {}
    for name, value in vars(batch).items():
        cut[name] = value[only] if isinstance(value, Tensor | tuple) else value
    return replace(batch, **cut)


def faceless(step: int) -> AVBatch:
    batch = batch_of(step=step)
    assert batch.mouth_mask is not None
    return replace(batch, mouth_mask=torch.zeros_like(batch.mouth_mask), has_mouth=(False, False))


def test_the_user_is_told_once_where_no_clip_of_many_steps_shows_a_mouth() -> None:
    made = module()
    with torch.no_grad(), pytest.warns(UserWarning, match=r"mouth_weight=5: no clip of 20 steps shows a mouth") as told:
        for step in range(STEPS_WITHOUT_MOUTH + 5):
            for _ in range(2):  # micro-batches
                assert not made.step(faceless(step), draws_of(faceless(step))).parts["mouth"].any()
    assert len(told) == 1


def test_measurements_and_micro_batches_of_one_step_are_no_steps_without_a_mouth() -> None:
    made = module()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(STEPS_WITHOUT_MOUTH + 5):
            made.step(faceless(0), draws_of(faceless(0)))
        for step in range(STEPS_WITHOUT_MOUTH + 5):
            made.step(faceless(step), replace(draws_of(faceless(step)), is_training=False))
        made.step(batch_of(step=1), draws_of(batch_of(step=1)))
        made.step(faceless(STEPS_WITHOUT_MOUTH), draws_of(faceless(STEPS_WITHOUT_MOUTH)))


def test_a_flow_shift_of_training_moves_the_noise_level_of_the_same_draw() -> None:
    batch = batch_of()
    plain, shifted = (
        given_to_model(module(*NEVER, f"flow_shift={shift}"), batch)["video_timestep"] / 1000 for shift in (1, 3)
    )
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_sound_alone_spans_the_video_that_lasts_as_long() -> None:
    made, batch = module(*NEVER[:1], stage="stage1_audio"), batch_of(stage="stage1_audio")
    assert batch.audio_latents is not None
    longer = replace(batch, duration_s=1.5, audio_latents=torch.cat([batch.audio_latents] * 2, dim=1))
    assert given_to_model(made, batch)["num_frames"] == FRAMES
    assert given_to_model(made, longer)["num_frames"] > FRAMES


def test_an_audio_branch_that_was_trained_is_not_made_a_copy_again() -> None:
    made = module(stage="stage1_audio")
    every = frozenset(name for name, _ in made.model.named_parameters())
    of_audio = frozenset(name for name in every if name.startswith("audio."))
    before = {name: each.clone() for name, each in made.model.named_parameters()}
    assert "stays as it is" in made.copy_weights(every, of_audio)
    assert all(torch.equal(before[name], each) for name, each in made.model.named_parameters())
    assert "are copies of the video branch's" in made.copy_weights(every, every - of_audio)
    inner = "transformer_blocks.0.attn.to_q.weight"
    after = dict(made.model.named_parameters())
    assert torch.equal(after[f"audio.{inner}"], before[f"backbone.{inner}"])


# Mouth boxes on their way from a shard.


def sample_with(boxes: list[list[tuple[float, float, float, float]]]) -> EncodedSample:
    annotation = Annotation(
        caption="a face", transcript="", subset="basic_face", fps=12.0, rate_hz=16000, num_frames=9, height=32,
        width=32, mouth_boxes=boxes,
    )  # fmt: skip
    return EncodedSample(
        "clip", annotation, {"caption": np.zeros((1, 64))}, video_latents=np.zeros((48, FRAMES, CELLS, CELLS))
    )


MOUTHS = Contents(text_tokens=48, tracks=False, mouth_factors=(4, 8))


def test_boxes_become_the_cells_that_they_touch_and_those_outside_the_frame_none() -> None:
    boxes = [[(8.0, 16.0, 20.0, 24.0), (40.0, 40.0, 50.0, 50.0)]] * 9
    mask = with_mouths(sample_with(boxes), MOUTHS, shard="s").mouth_mask
    assert mask is not None and mask.shape == (FRAMES, CELLS, CELLS)
    assert mask.sum() == FRAMES * 2 and mask[:, 2, 1:3].all()
    assert with_mouths(sample_with([[]] * 9), MOUTHS, shard="s").mouth_mask is not None


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([[(8.0, 16.0, 20.0, 24.0)]] * 5, "has mouth boxes of 5 frames, but 9 frames"),
        ([[(20.0, 16.0, 8.0, 24.0)]] * 9, "x1 <= x2"),
        ([[(float("nan"), 16.0, 20.0, 24.0)]] * 9, "four finite numbers"),
        ([["mouth"]] * 9, "four finite numbers"),
    ],
)
def test_boxes_that_do_not_fit_the_clip_make_it_a_damaged_sample(boxes: Any, reason: str) -> None:
    with pytest.raises(DamagedSample, match=reason):
        with_mouths(sample_with(boxes), MOUTHS, shard="faces-000001")


def test_clips_whose_mouths_were_not_looked_for_are_refused_with_both_ways_out() -> None:
    with pytest.raises(UserError, match=r"mouths=facemesh.*mouth_weight=null"):
        with_mouths(sample_with([]), MOUTHS, shard="faces-000001")
    without = replace(MOUTHS, mouth_factors=None)
    assert with_mouths(sample_with([]), without, shard="s").mouth_mask is None


# Sampling.


def sampled(made: JoVA, batch: AVBatch, keyframes: Tensor | None = None, **values: Any) -> Latents:
    values = {"steps": 3, **values}
    return made.sample(
        batch, seeds=range(len(batch)), settings=replace(made.config.sample, **values), keyframes=keyframes
    )


def test_a_reference_image_changes_the_picture_that_it_is_given_for() -> None:
    made, batch = module(), batch_of()
    assert batch.video_latents is not None
    keyframes = torch.zeros(2, FRAMES, dtype=torch.bool)
    keyframes[0, 0] = True
    with_image, without = sampled(made, batch, keyframes).video, sampled(made, batch).video
    assert with_image is not None and without is not None
    assert not torch.allclose(with_image[0], without[0]) and torch.allclose(with_image[1], without[1], atol=1e-5)
    keyframes[:, 1] = True
    with pytest.raises(ValueError, match="reference image as the first frame"):
        sampled(made, batch, keyframes)


@pytest.mark.parametrize("stage", ["stage1_video", "stage1_audio"])
def test_a_branch_alone_makes_its_own_latents(stage: str) -> None:
    made = sampled(module(stage=stage), batch_of(stage=stage))
    assert (made.video is None, made.audio is None) == (stage == "stage1_audio", stage == "stage1_video")


@pytest.mark.parametrize(("name", "own"), [("guidance", "video"), ("audio_guidance", "audio")])
def test_guidance_of_a_modality_moves_that_modality_alone_in_a_step(name: str, own: str) -> None:
    made, batch = module(), batch_of()
    before, after = sampled(made, batch, steps=1), sampled(made, batch, None, steps=1, **{name: 7.0})
    for modality in ("video", "audio"):
        first, second = getattr(before, modality), getattr(after, modality)
        assert torch.equal(first, second) == (modality != own)


def test_a_flow_shift_of_the_sampler_changes_both_modalities() -> None:
    made, batch = module(), batch_of()
    before, after = sampled(made, batch), sampled(made, batch, None, flow_shift=7.0)
    for modality in ("video", "audio"):
        assert not torch.equal(getattr(before, modality), getattr(after, modality))


def test_no_guidance_is_one_pass_with_both_texts() -> None:
    made, batch = module(), batch_of()
    texts: list[BranchText] = []
    made.model.register_forward_pre_hook(lambda _, args, kw: texts.append(kw["audio_text"]), with_kwargs=True)
    sampled(made, batch, guidance=1.0, audio_guidance=1.0)
    assert len(texts) == 3 and list(texts[0].lengths or ()) == [4, 6]


def test_a_branch_alone_is_not_guided_twice_for_the_other_ones_guidance() -> None:
    made, batch = module(stage="stage1_audio"), batch_of(stage="stage1_audio")
    passes: list[object] = []
    made.model.register_forward_pre_hook(lambda *_: passes.append(None))
    sampled(made, batch, audio_guidance=1.0)
    assert len(passes) == 3


# Configuration.


@pytest.mark.parametrize(
    ("stage", "word", "message"),
    [
        ("stage1_video", "mouth_weight=5", r"mouth_weight=5: is for the joint stage .*set it to null"),
        ("stage1_audio", "image_share=0.2", r"image_share=0\.2: no reference image is read, as codecs\.video is none"),
        ("stage2", "model.image_channels=0", r"image_share=0\.5: .*model\.image_channels is 0; set it to 0"),
        ("stage1_video", "model.trainable=all", r"model\.trainable=all: .*use model\.trainable=video"),
        ("stage1_audio", "model.trainable=video", r"model\.trainable=video: .*use model\.trainable=audio"),
        ("stage1_audio", "codecs.audio=none", r"codecs\.video=none: codecs\.audio is none, too"),
        ("stage1_audio", "sample.guidance=2", r"sample\.guidance=2: has no effect while codecs\.video=none"),
        ("stage1_video", "sample.audio_guidance=2", r"sample\.audio_guidance=2: has no effect"),
        ("stage2", "mouth_weight=-1", r"mouth_weight=-1"),
        ("stage2", "model.rope_axes=[2,2,2]", r"model\.rope_axes=\[2, 2, 2\]: must add up to model\.head_dim=16"),
        ("stage2", "model.fusion=sum", r"model\.fusion=sum .*must be one of joint, cross_linear, cross"),
        ("stage2", "codecs.tracks=none", r"codecs\.tracks=none: is set by the recipe"),
        ("stage2", "image_share=0", r"sample\.sync_clips=\d+: .*set sample\.sync_clips=0"),
        ("stage1_audio", "sample.sync_clips=4", r"sample\.sync_clips=4: .*a branch alone has no pair"),
        ("stage2", "model.duplicate_video=true", r"model\.duplicate_video=true: .*leave it out"),
        ("stage2", "model.trainable=video model.fusion=cross_linear", r"model\.trainable=video: .*trainable=all"),
        ("stage2", "model.embedded_guidance=-3", r"model\.embedded_guidance=-3: must be at least 0"),
    ],
)
def test_what_does_not_fit_a_stage_is_refused(stage: str, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(
            [f"recipe=jova_{stage}", *(each for each in SMALL if each.split("=")[0] not in word), *word.split()]
        )


def test_the_paper_size_is_what_the_paper_publishes() -> None:
    video, audio, joint = (load_config([f"recipe=jova_{stage}", "size=paper"]) for stage in STAGES)
    assert isinstance(video, JoVAConfig) and isinstance(audio, JoVAConfig) and isinstance(joint, JoVAConfig)
    for branch in (video, audio):
        assert (branch.data.batch_size, branch.train.steps, branch.optimizer.lr) == (256, 80_000, 1e-4)
        assert branch.optimizer.schedule == "constant" and branch.mouth_weight is None
    assert (video.model.trainable, audio.model.trainable, joint.model.trainable) == ("video", "audio", "all")
    assert (joint.data.batch_size, joint.train.steps, joint.optimizer.lr) == (32, 50_000, 5e-5)
    assert (joint.mouth_weight, joint.image_share) == (5.0, 0.2)
    assert (joint.sample.guidance, joint.sample.audio_guidance) == (10.0, 10.0)
    assert (joint.model.num_layers, joint.model.num_single_layers, joint.model.inner_dim) == (16, 40, 3072)
    assert (joint.timing.latent_frames, joint.timing.latent_size) == (31, (60, 104))
    assert joint.reads.captions == ("video",) and joint.reads.audio_captions == ("speech",) and joint.reads.mouths


@pytest.mark.parametrize(
    ("size", "sizes"), [("waver-12b", (16, 40, 24)), ("waver-1.6b", (8, 24, 12)), ("hunyuanvideo", (20, 40, 24))]
)
def test_the_other_sizes_have_their_layouts(size: str, sizes: tuple[int, int, int]) -> None:
    config = load_config(["recipe=jova_stage2", f"size={size}"])
    assert isinstance(config, JoVAConfig)
    assert (config.model.num_layers, config.model.num_single_layers, config.model.num_heads) == sizes


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.audio_channels=40", r"model\.audio_channels=40: must be 64"),
        ("model.video_channels=16", r"model\.video_channels=16: must be 48"),
        ("model.text_dim=100", r"model\.text_dim=100: must be 64"),
        ("model.patch_size=3", r"model\.patch_size=3: must divide the 4 latent cells of data\.height"),
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
        "validation.clips=4", "sample.steps=2", "sample.count=2", "sample.sync_clips=0", "train.log_every=1",
        "optimizer.lr=1e-2", f"runs_dir={folder}/runs", "tracking.uri=offline",
        f"data.cache_dir={cache}",
    ]  # fmt: skip
    return list({word.partition("=")[0]: word for word in (*given, *more)}.values())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_curriculum_trains_a_branch_copies_it_and_joins_both(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(tmp_path, cache, "recipe=jova", "train.steps=1", "sample.count=1", "ema.decay=0")
    assert curriculum.main(given) == 0
    assert "tensors of the audio branch are copies of the video branch's" in capsys.readouterr().out
    runs = {run.recipe: run for run in list_runs(tmp_path / "runs") if run.parent}
    assert set(runs) == {f"jova_{stage}" for stage in STAGES}
    checkpoints = [newest_valid(runs[f"jova_{stage}"].checkpoints_dir)[0] for stage in STAGES]
    video, audio, joint = (each.weights() for each in checkpoints if each is not None)
    of_video = [name for name in video if name.startswith("backbone.")]
    assert all(torch.equal(video[name], audio[name]) for name in of_video)  # the audio stage left them alone
    start = fresh(runs["jova_stage1_video"].read_config()).model.state_dict()
    assert all(torch.equal(start[name], video[name]) for name in video if name.startswith("audio."))
    # one step of AdamW moves a weight by its learning rate at most: the audio branch began as the video branch's copy
    rate = 1.01e-2
    inner = "transformer_blocks.0.attn.to_q.weight"
    assert (audio[f"audio.{inner}"] - video[f"backbone.{inner}"]).abs().max() < rate
    assert (start[f"audio.{inner}"] - video[f"backbone.{inner}"]).abs().max() > 3 * rate
    assert all((joint[name] - audio[name]).abs().max() < rate for name in joint)
    metrics = json.loads(runs["jova_stage2"].metrics_path.read_text())
    assert {"val/loss/video", "val/loss/audio", "val/loss/mouth", "val/mouth_coverage"} <= metrics.keys()
    assert 0 < metrics["val/mouth_coverage"] < 0.5
    out = tmp_path / "clip.mp4"
    asked = ["run=last", f"runs_dir={tmp_path}/runs", "prompt=A man.", "audio_prompt=Speech: hello.", f"out={out}"]
    assert sample.main(asked) == 0 and out.exists()


def fresh(config: str) -> JoVA:
    from avlit.config import from_yaml

    read: Config = from_yaml(config, source="config.yaml")
    assert isinstance(read, JoVAConfig)
    return JoVA(read)


def test_paper_settings_train_released_parts(
    tmp_path: Path, wan21_folder: Path, mmaudio_folder: Path, cogvideox_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper size's own path, at tiny sizes: released weights in both branches, Wan 2.1, T5, MMAudio, bf16."""
    from avlit.commands import prepare

    clips = write_clips(tmp_path / "clips")
    audio_channels = json.loads((mmaudio_folder / "audio_vae" / "config.json").read_text())["latent_channels"]
    codecs = [
        f"codecs.video_weights={wan21_folder}", f"codecs.text_weights={cogvideox_folder}",
        f"codecs.audio_weights={mmaudio_folder}",
    ]  # fmt: skip
    shape = ["data.num_frames=9", "data.height=32", "data.width=32", "data.fps=12"]
    shards, recipe = tmp_path / "shards", ["recipe=jova_stage2", "size=paper"]
    assert prepare.main([f"source={clips}", f"out={shards}", *recipe, "heldout=0.3", *codecs, *shape]) == 0
    video_channels = json.loads((wan21_folder / "vae" / "config.json").read_text())["z_dim"]
    text_dim = json.loads((cogvideox_folder / "text_encoder" / "config.json").read_text())["d_model"]
    model = [
        "model.num_layers=1", "model.num_single_layers=1", "model.num_heads=2", "model.head_dim=16",
        "model.rope_axes=[4,6,6]", "model.num_refiner_layers=1", f"model.text_dim={text_dim}",
        f"model.video_channels={video_channels}", f"model.image_channels={video_channels + 1}",
        f"model.audio_channels={audio_channels}",
    ]  # fmt: skip
    released = tmp_path / "HunyuanVideo"
    given = [
        *recipe, "mouth_weight=null", f"data.root={shards}", f"model.weights={released}", *codecs, *shape, *model,
        "data.batch_size=2", "train.accumulate=2", "train.steps=1", "sample.count=1", "sample.steps=2",
        "optimizer.lr=1e-2", f"runs_dir={tmp_path / 'runs'}", "tracking.uri=offline",
    ]  # fmt: skip
    config = load_config(given)
    assert isinstance(config, JoVAConfig)
    backbone = TwinMMDiT(config.model, seed=3).backbone.to(torch.bfloat16)  # as such weights are released
    backbone.save_pretrained(released / "transformer")
    outcome = train(config)
    assert "new (" in capsys.readouterr().out
    checkpoint, _ = newest_valid(outcome.run.checkpoints_dir)
    assert checkpoint is not None and checkpoint.state.base_model
    saved, inner = checkpoint.weights(), "transformer_blocks.0.attn.to_q.weight"
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    for branch in ("backbone", "audio"):
        moved = (saved[f"{branch}.{inner}"] - backbone.state_dict()[inner]).abs().max()
        assert 0 < moved < 1.01e-2  # one step away from the released weights
    assert sample.main(["run=last", f"runs_dir={tmp_path / 'runs'}", f"out={tmp_path / 'clips_out'}"]) == 0


def write_clips(folder: Path) -> Path:
    """Three captioned MP4s of two seconds with what is said in them."""
    from avlit.media import write_mp4

    folder.mkdir()
    for index in range(3):
        rng = numpy_generator("clip", index)
        frames = rng.integers(0, 255, (24, 32, 32, 3), dtype=np.uint8)
        sound = (0.1 * rng.standard_normal(2 * 44100)).astype(np.float32)
        write_mp4(folder / f"{index}.mp4", frames, fps=12, waveform=sound, rate_hz=44100)
        described = {"caption": f"someone talks {index}", "transcript": "hello"}
        (folder / f"{index}.json").write_text(json.dumps(described))
    return folder
