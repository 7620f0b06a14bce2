"""UniTalking's recipe: what each task gives and asks, what trains, and its runs through the real commands."""

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
from avlit.commands.train import train
from avlit.config import Config, ConfigError, load_config
from avlit.objectives import Losses, unipc_sigma, wan_scheduler_config
from avlit.randomness import Draws, numpy_generator
from avlit.runs import list_runs
from avlit.sampling import Latents, guide
from recipes.unitalking.config import UniTalkingConfig
from recipes.unitalking.recipe import UniTalking

SMALL = ("model.num_layers=1", "model.num_heads=2", "data.num_frames=9", "data.height=32", "data.width=32",
         "train.threads=1")  # fmt: skip
FRAMES, TOKENS = 3, 47  # latent frames of 9, audio latents of 9 frames at 12 a second
VIDEO_TASKS = ("t2av", "tv2a", "ti2av", "tr2av")
ONLY = {name: [f"tasks.{each}={float(each == name)}" for each in VIDEO_TASKS] for name in VIDEO_TASKS}


def module(*words: str, stage: int = 2) -> UniTalking:
    config = load_config([f"recipe=unitalking_stage{stage}", *SMALL, *words])
    assert isinstance(config, UniTalkingConfig)
    made = UniTalking(config)
    made.freeze()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # no output is zero as built, so that every input matters
        for parameter in made.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def batch_of(count: int = 2, *, step: int = 0, has_video: bool = True, has_reference: bool = True) -> AVBatch:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    return AVBatch(
        keys=tuple(f"clip-{number}" for number in range(count)),
        subsets=("basic_face",) * count,
        captions=("",) * count,
        duration_s=0.75,
        step=step,
        slots=tuple(range(count)),
        text=draw(48, 64),
        text_lengths=(48,) * count,
        audio_latents=draw(TOKENS, 64),
        reference=draw(64, 64),
        video_latents=draw(48, FRAMES, 4, 4) if has_video else None,
        has_reference=(has_reference,) * count,
    )


def draws_of(batch: AVBatch, *, seed: int = 0) -> Draws:
    return Draws(seed, batch.step, batch.slots)


class Heard(Exception):
    """What the model was given."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.given = {"video_latents": args[0], "audio_latents": args[1], **kwargs}


def given_to_model(made: UniTalking, batch: AVBatch) -> dict[str, Any]:
    """The arguments of the model's one call in a training step."""

    def stop(_: object, args: tuple, kwargs: dict[str, Any]) -> None:
        raise Heard(args, kwargs)

    handle = made.model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with pytest.raises(Heard) as heard:
            made.step(batch, draws_of(batch))
    finally:
        handle.remove()
    return heard.value.given


OWN_DROPOUT = {"ti2av": ("dropout.image=0",), "tr2av": ("dropout.reference=0",)}
ALL_KEPT = ("dropout.text=0", "dropout.image=0", "dropout.reference=0")


def only_kept(task: str) -> list[str]:
    """One task alone, whose conditions are never dropped."""
    return [*ONLY[task], "dropout.text=0", *OWN_DROPOUT.get(task, ())]


def test_t2av_noises_video_and_sound_to_the_same_level_and_gives_nothing_else() -> None:
    batch = batch_of()
    given = given_to_model(module(*only_kept("t2av")), batch)
    assert given["reference"] is None and given["mode"] == ["joint", "joint"]
    assert torch.equal(given["text"], batch.text)
    levels = given["audio_timestep"] / 1000
    assert torch.equal(given["video_timestep"], given["audio_timestep"][:, None].expand(-1, FRAMES))
    draws = draws_of(batch)
    for name, clean in (("video", batch.video_latents), ("audio", batch.audio_latents)):
        assert clean is not None
        sigma = levels.view(-1, *[1] * (clean.ndim - 1))
        expected = (1 - sigma) * clean + sigma * draws.normal(f"{name} noise", clean)
        torch.testing.assert_close(given[f"{name}_latents"], expected)


def test_ti2av_gives_the_first_latent_frame_clean_and_supervises_the_others_only() -> None:
    made, batch = module(*only_kept("ti2av")), batch_of()
    assert batch.video_latents is not None
    given = given_to_model(made, batch)
    assert torch.equal(given["video_latents"][:, :, 0], batch.video_latents[:, :, 0])
    assert not given["video_timestep"][:, 0].any() and given["video_timestep"][:, 1:].all()
    assert not torch.equal(given["video_latents"][:, :, 1], batch.video_latents[:, :, 1])
    loss = made.step(batch, draws_of(batch)).parts["video"]
    pred = made.model(**without_positions(given)).video
    target = draws_of(batch).normal("video noise", batch.video_latents) - batch.video_latents
    expected = (pred - target)[:, :, 1:].square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected)


def without_positions(given: dict[str, Any]) -> dict[str, Any]:
    return {"video_latents": given["video_latents"], **{k: v for k, v in given.items() if k != "video_latents"}}


def test_tv2a_gives_the_video_clean_and_deaf_and_asks_for_the_sound_only() -> None:
    made, batch = module(*only_kept("tv2a")), batch_of()
    assert batch.audio_latents is not None and batch.video_latents is not None
    given = given_to_model(made, batch)
    assert torch.equal(given["video_latents"], batch.video_latents) and not given["video_timestep"].any()
    assert given["mode"] == ["one-way", "one-way"]
    losses = made.step(batch, draws_of(batch))
    assert not losses.parts["video"].any() and losses.parts["audio"].all()
    assert losses.applies["video"] == (False, False)
    louder = made.model(**{**given, "audio_latents": given["audio_latents"] + 1.0})
    before = made.model(**given)
    assert torch.equal(louder.video, before.video)  # bit for bit, whatever the sound
    other = made.step(replace(batch, video_latents=batch.video_latents + 1.0), draws_of(batch))
    assert not torch.equal(other.parts["audio"], losses.parts["audio"])  # the sound hears of the video


def test_tr2av_gives_the_reference_and_falls_back_where_a_clip_has_none() -> None:
    made, batch = module(*only_kept("tr2av")), batch_of()
    assert batch.reference is not None
    assert torch.equal(given_to_model(made, batch)["reference"], batch.reference)
    mixed = replace(batch, has_reference=(True, False))
    given = given_to_model(made, mixed)
    assert torch.equal(given["reference"][0], batch.reference[0]) and not given["reference"][1].any()
    assert made.step(mixed, draws_of(mixed)).tasks == ("tr2av", "t2av")


def test_a_fallback_is_logged_also_where_it_has_no_weight() -> None:
    from callbacks.training_log import LossSums

    made, batch = module(*ONLY["tr2av"]), batch_of(has_reference=False)
    sums = LossSums(["basic_face"], torch.device("cpu"), tasks=made.tasks)
    sums.add(made.step(batch, draws_of(batch)), batch.subsets)
    assert "val/loss/audio/task/t2av" in sums.read("val")


def test_clips_of_mixed_tasks_are_what_they_are_alone() -> None:
    made, batch = module(*ALL_KEPT), batch_of(6)
    assert len(set(made.step(batch, draws_of(batch)).tasks)) > 2
    together = made.step(batch, draws_of(batch))
    for row in range(6):
        alone = made.step(one_of(batch, row), Draws(0, 0, (row,)))
        for part in ("video", "audio"):
            torch.testing.assert_close(together.parts[part][row : row + 1], alone.parts[part], rtol=1e-4, atol=1e-5)


def one_of(batch: AVBatch, row: int) -> AVBatch:
    assert batch.audio_latents is not None and batch.video_latents is not None and batch.reference is not None
    only = slice(row, row + 1)
    return replace(
        batch, keys=batch.keys[only], subsets=batch.subsets[only], captions=batch.captions[only], slots=(row,),
        text=batch.text[only], text_lengths=batch.text_lengths[only], audio_latents=batch.audio_latents[only],
        video_latents=batch.video_latents[only], reference=batch.reference[only],
        has_reference=batch.has_reference[only],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "word"),
    [("t2av", "dropout.text=1"), ("ti2av", "dropout.image=1"), ("tr2av", "dropout.reference=1")],
)
def test_a_dropped_condition_is_gone_and_stays_when_measured(task: str, word: str) -> None:
    others = [each for each in only_kept(task) if not each.startswith(word.partition("=")[0])]
    made, batch = module(*others, word), batch_of()
    given = given_to_model(made, batch)
    assert {
        "t2av": lambda: not given["text"].any(),
        "ti2av": lambda: given["video_timestep"].all(),
        "tr2av": lambda: given["reference"] is None,
    }[task]()
    measured = Draws(0, 0, batch.slots, is_training=False)
    kept = module(*only_kept(task))
    assert torch.equal(made.step(batch, measured).parts["audio"], kept.step(batch, measured).parts["audio"])


def test_stage_one_hears_no_video_and_places_sound_on_the_clips_time_axis() -> None:
    made, batch = module(stage=1), batch_of(has_video=False)
    given = given_to_model(made, batch)
    assert given["video_latents"] is None and given["num_frames"] == pytest.approx(FRAMES)
    short = replace(batch, duration_s=0.375)
    assert given_to_model(made, short)["num_frames"] == pytest.approx(FRAMES / 2)


def test_losses_are_logged_by_task_and_clips_a_part_is_not_of_do_not_thin_it() -> None:
    from callbacks.training_log import LossSums

    sums = LossSums(["faces"], torch.device("cpu"), tasks=("t2av", "tv2a"))
    parts = {"video": torch.tensor([4.0, 0.0]), "audio": torch.tensor([1.0, 3.0])}
    losses = Losses(
        parts=parts, noise_level=torch.tensor([0.1, 0.1]), applies={"video": (True, False)}, tasks=("t2av", "tv2a")
    )
    sums.add(losses, ("faces", "faces"))
    metrics = sums.read("train")
    assert metrics["train/loss/video"] == metrics["train/loss/video/task/t2av"] == 4.0
    assert metrics["train/loss/video/subset/faces"] == 4.0 and "train/loss/video/task/tv2a" not in metrics
    assert metrics["train/loss/audio"] == 2.0 and metrics["train/loss/audio/task/tv2a"] == 3.0
    assert losses.total == 2.0 + 2.0  # the mean over all clips of the batch


# Shared pieces.


def test_turns_have_exact_proportions_for_every_slot_whatever_the_ranks() -> None:
    weights = {"t2av": 0.4, "tv2a": 0.2, "ti2av": 0.2, "tr2av": 0.2}
    steps = [Draws(7, step, range(6)).turns("task", weights) for step in range(20)]
    for slot in range(6):
        taken = [names[slot] for names in steps]
        assert [taken.count(name) for name in weights] == [8, 4, 4, 4]
        assert all(taken[at : at + 5].count("t2av") == 2 for at in range(0, 20, 5))
    halves = [Draws(7, 3, slots).turns("task", weights) for slots in ((0, 2, 4), (1, 3, 5))]
    assert [halves[0], halves[1]] == [steps[3][0::2], steps[3][1::2]]
    assert len({tuple(names) for names in zip(*steps, strict=True)}) == 6  # slots do not march in step


def test_turns_of_a_measurement_cover_all_names_and_do_not_depend_on_the_step() -> None:
    weights = {"t2a": 1.0, "tr2a": 3.0}
    first, later = (Draws(7, step, range(8), is_training=False).turns("task", weights) for step in (0, 50))
    assert first == later and first.count("t2a") == 2


def test_noise_levels_are_the_table_of_diffusers_unipc() -> None:
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    settings = {name: value for name, value in wan_scheduler_config(shift=5.0).items() if name != "shift"}
    scheduler = UniPCMultistepScheduler(**settings)
    scheduler.set_timesteps(1000)
    entries = unipc_sigma((np.arange(1000) + 0.5) / 1000, shift=5.0)
    torch.testing.assert_close(entries.flip(0), scheduler.sigmas[:-1], rtol=0, atol=1e-5)


def test_guidance_adds_one_condition_after_the_other() -> None:
    none, text, both = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([4.0])
    assert guide([none, both], [2.0]) == 1 + 2 * 3
    assert guide([none, text, both], [2.0, 5.0]) == 1 + 2 * 2 + 5 * 1
    assert guide([both], []) == 4.0
    assert torch.equal(guide([none, text, both], [1.0, 1.0]), both)


def test_packed_latents_come_back() -> None:
    latents = Latents(video=torch.randn(2, 3, 4, 2, 2), audio=torch.randn(2, 5, 6))
    again = latents.unpack(latents.pack())
    assert again.video is not None and again.audio is not None and latents.video is not None
    assert latents.audio is not None
    assert torch.equal(again.video, latents.video) and torch.equal(again.audio, latents.audio)
    alone = Latents(audio=torch.randn(2, 5, 6))
    assert alone.unpack(alone.pack()).video is None


# Sampling.


def sampled(made: UniTalking, batch: AVBatch, keyframes: Tensor | None = None, **values: Any) -> Latents:
    values = {"steps": 3, **values}
    return made.sample(
        batch, seeds=range(len(batch)), settings=replace(made.config.sample, **values), keyframes=keyframes
    )


def test_given_frames_come_out_as_they_went_in_and_the_rest_is_made() -> None:
    made, batch = module(), batch_of()
    keyframes = torch.zeros(2, FRAMES, dtype=torch.bool)
    keyframes[:, 0] = True
    video, given = sampled(made, batch, keyframes).video, batch.video_latents
    assert video is not None and given is not None
    assert torch.equal(video[:, :, 0], given[:, :, 0]) and not torch.equal(video[:, :, 1], given[:, :, 1])


def test_dubbing_makes_sound_for_the_video_it_is_given() -> None:
    made, batch = module(), batch_of()
    assert batch.video_latents is not None
    everything = torch.ones(2, FRAMES, dtype=torch.bool)
    dubbed = sampled(made, batch, everything)
    assert dubbed.audio is not None
    other = sampled(made, replace(batch, video_latents=-batch.video_latents), everything)
    assert dubbed.video is not None and torch.equal(dubbed.video, batch.video_latents)
    assert dubbed.audio is not None and other.audio is not None and not torch.equal(dubbed.audio, other.audio)


def test_a_clip_does_not_depend_on_the_others_that_are_sampled_with_it() -> None:
    made, batch = module(), batch_of(3)
    together = sampled(made, batch).audio
    assert together is not None and batch.video_latents is not None
    assert batch.audio_latents is not None and batch.reference is not None
    settings = replace(made.config.sample, steps=3)
    alone = made.sample(one_of(batch, 1), seeds=[1], settings=settings).audio
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["guidance", "audio_guidance", "reference_guidance"])
def test_every_guidance_has_its_own_effect(name: str) -> None:
    made, batch = module(), batch_of()
    before = sampled(made, batch, reference_guidance=2.0)
    after = sampled(made, batch, None, **{"reference_guidance": 2.0, name: 7.0})
    assert before.audio is not None and after.audio is not None
    assert not torch.equal(before.audio, after.audio)  # what one stream becomes, the other sees


def test_no_guidance_is_one_pass_with_all_conditions() -> None:
    made, batch = module(), batch_of()
    calls = []
    made.model.register_forward_pre_hook(lambda *_: calls.append(1))
    sampled(made, batch, guidance=1.0, audio_guidance=1.0)
    assert len(calls) == 3


# Configuration.


@pytest.mark.parametrize(
    ("stage", "word", "message"),
    [
        (1, "tasks.t2av=1", r"tasks\.t2av=1: with codecs\.video=none the tasks are t2a, tr2a"),
        (2, "tasks.t2a=1", r"tasks\.t2a=1: with codecs\.video=embedded the tasks are t2av, tv2a, ti2av, tr2av"),
        (2, " ".join(f"tasks.{each}=0" for each in VIDEO_TASKS), "tasks: every weight is 0"),
        (2, "tasks.t2av=0.1234567", r"tasks: t2av=0\.123457, .*use weights with fewer digits"),
        (2, "tasks.t2av=1e-300", r"tasks: t2av=1e-300, .*use weights with fewer digits"),
        (1, "sample.guidance=2", r"sample\.guidance=2: has no effect while codecs\.video=none"),
        (2, "codecs.tracks=none", r"codecs\.tracks=none: is set by the recipe"),
        (1, "dropout.image=0.2", r"dropout\.image=0\.2: has no effect while tasks\.ti2av=0"),
        (2, "tasks.tr2av=0 dropout.reference=0.2", r"dropout\.reference=0\.2: has no effect while no task with a ref"),
        (2, "tasks.tr2av=0 sample.reference_guidance=2", r"sample\.reference_guidance=2: has no effect while no task"),
        (1, "model.trainable=all", r"model\.trainable=all: with codecs\.video=none the video twin sees no clip"),
        (1, "codecs.video=wan2.1", r"codecs\.video=wan2\.1 .*must be one of none, embedded, wan2\.2"),
    ],
)
def test_what_does_not_fit_a_stage_is_refused(stage: int, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([f"recipe=unitalking_stage{stage}", *word.split()])


def test_the_paper_size_is_what_the_paper_publishes() -> None:
    first, second = (load_config([f"recipe=unitalking_stage{n}", "size=paper"]) for n in (1, 2))
    assert isinstance(first, UniTalkingConfig) and isinstance(second, UniTalkingConfig)
    assert (first.data.batch_size, first.train.steps, first.model.trainable) == (256, 100_000, "audio")
    assert (second.data.batch_size, second.train.steps, second.model.trainable) == (64, 100_000, "all")
    assert first.reads.captions == ("speech",) and second.reads.captions == ("detailed", "short", "fused")
    assert second.reads.reference_tokens == 257 and second.model.max_text_tokens == 512
    assert (second.timing.latent_frames, second.timing.latent_size) == (31, (44, 80))
    assert (second.sample.steps, second.flow_shift) == (50, 5.0)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.audio_channels=40", r"model\.audio_channels=40: must be 64"),
        ("model.video_channels=16", r"model\.video_channels=16: must be 48"),
        ("model.text_dim=100", r"model\.text_dim=100: must be 64"),
        ("model.max_text_tokens=10", r"model\.max_text_tokens=10: must be at least 48"),
        ("model.patch_size=3", r"model\.patch_size=3: must divide the 4 latent cells of data\.height"),
    ],
)
def test_sizes_that_do_not_fit_the_codecs_are_named_before_training(word: str, message: str) -> None:
    from avlit.commands.assembly import build_encoders

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


def test_stage_one_trains_the_audio_branch_and_not_one_bit_of_the_rest(tmp_path: Path, cache: Path) -> None:
    config = load_config(words(tmp_path, cache, "recipe=unitalking_stage1", "ema.decay=0"))
    outcome = train(config)
    checkpoint, _ = newest_valid(outcome.run.checkpoints_dir)
    assert checkpoint is not None
    before, after = fresh(config).model.state_dict(), checkpoint.weights()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = ("backbone.", "video_references.", "audio.condition_embedder.")
    assert not [name for name in changed if name.startswith(frozen)]
    assert {"audio.stem.0.weight", "audio.blocks.0.attn1.to_q.weight", "audio.blocks.0.ffn.net.2.weight"} <= changed
    assert {"audio.proj_out.weight", "audio_references.0.to_k.weight", "reference_embedding.weight"} <= changed
    assert sorted(path.suffix for path in outcome.run.samples_dir.glob("step-*/*.*")) == [
        ".json",
        ".png",
        ".wav",
        ".wav",
    ]
    assert {"val/loss/audio", "val/loss/audio/task/tr2a", "val/loss/audio/task/t2a"} <= outcome.metrics.keys()


def fresh(config: Config) -> UniTalking:
    assert isinstance(config, UniTalkingConfig)
    return UniTalking(config)


def test_a_curriculum_hands_the_audio_branch_to_the_joint_stage(tmp_path: Path, cache: Path) -> None:
    given = ("recipe=unitalking", "train.steps=1", "sample.count=0", "optimizer.lr=1e-30", "ema.decay=0")
    assert curriculum.main(words(tmp_path, cache, *given)) == 0
    stages = sorted((run for run in list_runs(tmp_path / "runs") if run.parent), key=lambda run: run.recipe)
    assert [run.recipe for run in stages] == ["unitalking_stage1", "unitalking_stage2"]
    assert stages[1].record().init_run == stages[0].id
    first, second = (newest_valid(run.checkpoints_dir)[0] for run in stages)
    assert first is not None and second is not None
    one, two = first.weights(), second.weights()
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-12) for name in one)


def test_words_of_a_curriculum_hold_for_all_its_stages_or_for_the_one_they_begin_with(tmp_path: Path) -> None:
    stages = ("unitalking_stage1", "unitalking_stage2")
    given = ("train.steps=9", "unitalking_stage2.train.steps=5", "unitalking_stage2.sample.guidance=3")

    def of(*words: str) -> list[Config]:
        plan = curriculum.Plan("unitalking", stages, words, None)
        return [plan.config(stage, runs_dir=tmp_path, init=None) for stage in stages]

    first, second = of(*given)
    assert (first.train.steps, second.train.steps, second.sample.guidance) == (9, 5, 3.0)
    with pytest.raises(
        ConfigError, match=r"no effect while codecs\.video=none.*in unitalking_stage1; `unitalking_stage1"
    ):
        of("sample.guidance=3")
    with pytest.raises(ConfigError, match=r"unitalking_stage2\.init: is settled for every stage"):
        of("unitalking_stage2.init=last")


def test_paper_settings_train_released_parts(
    tmp_path: Path, wan22_folder: Path, mmaudio_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper size's own path, at tiny sizes: released Wan, its codecs, umT5, MMAudio, bf16, accumulation."""
    from avlit.commands import prepare
    from avlit.models.twin_wan import TwinWan

    clips = write_clips(tmp_path / "clips")
    codecs = [
        f"codecs.video_weights={wan22_folder}", f"codecs.text_weights={wan22_folder}",
        f"codecs.audio_weights={mmaudio_folder}",
    ]  # fmt: skip
    shape = ["data.num_frames=9", "data.height=32", "data.width=32", "data.fps=12"]
    shards = tmp_path / "shards"
    recipe = ["recipe=unitalking_stage2", "size=paper"]
    assert prepare.main([f"source={clips}", f"out={shards}", *recipe, "heldout=0.3", *codecs, *shape]) == 0
    model = [
        "model.num_layers=2", "model.num_heads=2", "model.head_dim=16", "model.ffn_dim=32", "model.freq_dim=16",
        "model.text_dim=16", "model.video_channels=6", f"model.audio_channels={audio_channels(mmaudio_folder)}",
    ]  # fmt: skip
    released = tmp_path / "Wan2.2"
    given = [
        *recipe, f"data.root={shards}", f"model.weights={released}", *codecs, *shape, *model,
        "data.batch_size=2", "train.accumulate=2", "train.steps=2", "sample.count=1", "sample.steps=2",
        "optimizer.lr=1e-2", f"runs_dir={tmp_path / 'runs'}", "tracking.uri=offline",
    ]  # fmt: skip
    config = load_config(given)
    assert isinstance(config, UniTalkingConfig)
    backbone = TwinWan(config.model).backbone.to(torch.bfloat16)  # as it is released
    backbone.save_pretrained(released / "transformer")
    outcome = train(config)
    assert "new (" in capsys.readouterr().out
    checkpoint, _ = newest_valid(outcome.run.checkpoints_dir)
    assert checkpoint is not None and checkpoint.state.base_model
    saved = checkpoint.weights()
    stock = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    assert stock.keys() <= saved.keys()  # everything trains
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any(not torch.equal(saved[name], stock[name].float()) for name in stock)
    assert sample.main(["run=last", f"runs_dir={tmp_path / 'runs'}", f"out={tmp_path / 'clips_out'}"]) == 0


def audio_channels(folder: Path) -> int:
    import json

    return json.loads((folder / "audio_vae" / "config.json").read_text())["latent_channels"]


def write_clips(folder: Path) -> Path:
    """Three captioned MP4s of two seconds, one with a caption of its own for each style."""
    import json

    from avlit.media import write_mp4

    folder.mkdir()
    for index in range(3):
        rng = numpy_generator("clip", index)
        frames = rng.integers(0, 255, (24, 32, 32, 3), dtype=np.uint8)
        sound = (0.1 * rng.standard_normal(2 * 44100)).astype(np.float32)
        write_mp4(folder / f"{index}.mp4", frames, fps=12, waveform=sound, rate_hz=44100)
        (folder / f"{index}.json").write_text(json.dumps({"caption": f"someone talks {index}"}))
    return folder
