"""`just inspect`: the attention that is shown is that of a training step; its shares are beside what chance gives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.checkpoint_state import CheckpointState
from avlit.checkpoints import save_checkpoint
from avlit.commands.assembly import build_module
from avlit.commands.inspect import clip_attention
from avlit.config import load_config, to_yaml
from avlit.metrics.attention import attention_shares, mouth_cover
from avlit.randomness import Draws
from avlit.runs import create_run
from data.batches import Contents, collate
from data.datamodule import HeldoutClip
from data.sample import Annotation, EncodedSample
from recipes.unitalking.config import UniTalkingConfig
from recipes.unitalking.recipe import UniTalking

SMALL = ("model.num_layers=2", "model.num_heads=2", "data.num_frames=9", "data.height=32", "data.width=32",
         "data.num_clips=8", "train.threads=1")  # fmt: skip
GRID, TOKENS = (3, 2, 2), 6
KEYS = 3 * 2 * 2 + TOKENS


def make_run(runs_dir: Path, *words: str) -> None:
    """A run with weights as built, the average being other ones."""
    config = load_config([*words, f"runs_dir={runs_dir}", f"data.cache_dir={runs_dir.parent / 'cache'}"])
    run = create_run(runs_dir, config.recipe)
    run.write_config(to_yaml(config))
    module, draw = build_module(config), torch.Generator().manual_seed(7)
    weights = {name: tensor.detach() for name, tensor in module.saved_weights().items()}
    ema = {name: each + 0.3 * torch.randn(each.shape, generator=draw) for name, each in weights.items()}
    state = CheckpointState(step=3, seed=0, recipe=config.recipe, run=run.id)
    save_checkpoint(run.checkpoints_dir, weights=weights, ema=ema, state=state)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of twins, `twins/`, of the audio twin alone, `sound/`, and of a model without joint attention, `other/`."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "twins", "recipe=unitalking_stage2", *SMALL)
    make_run(folder / "sound", "recipe=unitalking_stage1", *SMALL)
    other = ("model.num_layers=2", "model.num_heads=2", "model.num_interaction_blocks=1", "model.audio_hidden=32")
    make_run(folder / "other", "recipe=mtv_stage1", *other)
    return folder


def test_a_run_is_inspected_by_its_averaged_weights_into_a_picture_that_is_never_overwritten(runs, tmp_path, capsys):
    words = ["inspect", "attention", "run=last", f"runs_dir={runs / 'twins'}", "clip=1", "layers=1"]
    assert avlit([*words, f"out={tmp_path / 'new' / 'first.png'}"]) == 0
    *_, head, layer, even, path = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / "new" / "first.png")
    assert Image.open(path).size == (128 * 3 + 44 + 256 + 22, 24 + 128 + 44)  # three latent frames of one layer
    columns = [name.strip() for name in head.split("  ") if name]
    assert columns == ["sound to video", "in mouth boxes", "video to sound", "within a latent frame"]
    assert even.split()[:2] == ["spread", "evenly"]
    assert layer.startswith("layer 1 ")
    found, chance = ([float(word.rstrip("%")) for word in line.split()[2:]] for line in (layer, even))
    assert chance[0] == pytest.approx(100 * 12 / (12 + 47), abs=0.05)  # 3 x 2 x 2 video tokens, 47 of sound
    assert chance[2] == pytest.approx(100 * 47 / (12 + 47), abs=0.05)
    assert 0 < chance[1] < 30
    assert found != chance
    assert all(0 < each < 100 for each in found)
    assert avlit([*words, f"out={tmp_path / 'new' / 'first.png'}"]) == USER_MISTAKE
    assert "is there already" in capsys.readouterr().err
    assert avlit([*words, "seed=1", f"out={tmp_path / 'other.png'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-3] != layer
    assert avlit(words) == 0
    own = Path(capsys.readouterr().out.splitlines()[-1])
    assert own.is_relative_to(runs / "twins")
    assert own.read_bytes() == Path(path).read_bytes()


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        ("twins", ["attenton", "run=last"], "attenton: cannot be inspected; did you mean attention?"),
        ("twins", ["weights", "run=last"], "weights: cannot be inspected. just inspect attention: "),
        ("twins", ["run=last"], "what to inspect is missing before the other words. just inspect attention: "),
        ("twins", ["attention"], "run=… is missing"),
        ("twins", ["attention", "run=last", "clip=-1"], "clip=-1: must be the number of a held-out clip, from 0"),
        ("twins", ["attention", "run=last", "noise=1.5"], "noise=1.5: must be a number from 0 (clean) to 1"),
        ("twins", ["attention", "run=last", "noise=nan"], "noise=nan: must be a number from 0 (clean) to 1"),
        ("twins", ["attention", "run=last", "layers=0,0"], "layers=0,0: must be different numbers of layers"),
        ("twins", ["attention", "run=last", "layers=0,2"], "layers=0,2: there is no layer 2, only 0 to 1"),
        ("twins", ["attention", "run=last", "clip=999"], "clip=999: the data has "),
        ("twins", ["attention", "run=last", "layer=0"], "layer=0: no such word; did you mean layers?"),
        ("twins", ["attention", "run=last", "sample.steps=2"], "sample.steps=2: has no effect on attention"),
        ("twins", ["attention", "run=last", "out=a.jpg"], "out=a.jpg: the picture is written to a file, for example "),
        ("sound", ["attention", "run=last"], "unitalking_stage1 sees no video (codecs.video=none)"),
        ("other", ["attention", "run=last"], "has no joint attention of video and sound to show"),
    ],
)
def test_what_cannot_be_inspected_is_one_message_and_leaves_nothing(runs, capsys, run, words, message):
    before = sorted(runs.rglob("*.png"))
    place = [f"runs_dir={runs / run}"] if "attention" in words else []
    assert avlit(["inspect", *words, *place]) == USER_MISTAKE
    error = capsys.readouterr().err
    assert error.startswith("just inspect: ")
    assert message in error
    assert sorted(runs.rglob("*.png")) == before


def given_to(module: UniTalking, call: Any) -> Mapping[str, Any]:
    """The arguments of the first call of the module's model."""
    found: list[dict[str, Any]] = []
    hook = module.model.register_forward_pre_hook(
        lambda _, args, kwargs: found.append({"video": args[0], "audio": args[1], **kwargs}), with_kwargs=True
    )
    call()
    hook.remove()
    return found[0]


@pytest.mark.parametrize("has_reference", [False, True])
def test_a_clip_is_noised_and_conditioned_as_in_a_measurement_of_the_recipe(has_reference):
    task = "tr2av" if has_reference else "t2av"
    words = [f"tasks.{each}={float(each == task)}" for each in ("t2av", "tv2a", "ti2av", "tr2av")]
    config = load_config(["recipe=unitalking_stage2", *SMALL, *words])
    assert isinstance(config, UniTalkingConfig)
    module, random = UniTalking(config), np.random.default_rng(0)
    about = Annotation("a", "", "basic_face", fps=12.0, rate_hz=16000, num_frames=9, height=32, width=32)
    sample = EncodedSample(
        "a", about, {"caption": random.normal(size=(5, 64)).astype(np.float32)},
        video_latents=random.normal(size=(48, 3, 4, 4)).astype(np.float32),
        audio_latents=random.normal(size=(47, 64)).astype(np.float32),
        references=(random.normal(size=(9, 64)).astype(np.float32),) if has_reference else (),
    )  # fmt: skip
    contents = Contents(text_tokens=48, video=True, audio=True, tracks=False, reference_tokens=64)
    batch = collate([sample], step=0, slots=(2,), contents=contents)
    draws = Draws(config.seed, 0, (2,), is_training=False)
    trained = given_to(module, lambda: module.step(batch, draws))
    level = float(trained["audio_timestep"]) / 1000
    clip = HeldoutClip(batch, about, np.zeros(12000, np.float32), 16000)
    shown = given_to(module, lambda: clip_attention(module, clip, noise=level, seed=0, layers=None))
    for name in ("video", "audio", "text"):
        torch.testing.assert_close(shown[name], trained[name], rtol=0, atol=1e-6)
    assert torch.equal(shown["audio_timestep"], trained["audio_timestep"])
    assert torch.equal(shown["video_timestep"].expand(3), trained["video_timestep"][0])
    if has_reference:
        assert torch.equal(shown["reference"], trained["reference"])
    else:
        assert shown["reference"] is None and trained["reference"] is None


def even_maps() -> tuple[Tensor, Tensor]:
    """Attention of sound [L, N] and of video [N, L] that is spread evenly over all tokens."""
    num_video = GRID[0] * GRID[1] * GRID[2]
    even = 1 / (num_video + TOKENS)
    return torch.full((TOKENS, num_video), even), torch.full((num_video, TOKENS), even)


def test_attention_spread_evenly_has_the_shares_of_chance():
    mouths = torch.rand(GRID)
    shares = attention_shares(*even_maps(), grid=GRID, num_keys=KEYS, mouths=mouths)
    for share in (shares.sound_to_video, shares.video_to_sound, shares.in_time, shares.in_mouths):
        assert share is not None
        assert share.found == pytest.approx(share.chance, abs=1e-6)
    assert shares.sound_to_video.chance == pytest.approx(12 / 18)
    assert shares.video_to_sound.chance == pytest.approx(6 / 18)
    assert shares.in_time.chance == pytest.approx(12 / 18)  # 3, 5 and 4 of the 6 at 0, 0.5, … 2.5


def test_attention_to_lips_and_to_its_own_time_is_found_there():
    audio_to_video, video_to_audio = torch.zeros(TOKENS, 12), torch.zeros(12, TOKENS)
    audio_to_video[:, 3] = 0.3  # first frame, lower right
    audio_to_video[:, 5] = 0.1  # second frame, upper right
    video_to_audio[:4, :2] = 0.2  # frame 0 at 0 and 0.5
    video_to_audio[8:, 0] = 0.4  # frame 2 at 0
    mouths = torch.zeros(GRID)
    mouths[0, 1, 1] = 1
    shares = attention_shares(audio_to_video, video_to_audio, grid=GRID, num_keys=KEYS, mouths=mouths)
    assert shares.in_mouths is not None
    assert shares.in_mouths.found == pytest.approx(0.75)
    assert shares.in_mouths.chance == pytest.approx(1 / 12)
    assert shares.in_time.found == pytest.approx(0.5)
    assert shares.sound_to_video.found == pytest.approx(0.4)
    assert shares.video_to_sound.found == pytest.approx((4 * 0.4 + 4 * 0.4) / 12)
    assert attention_shares(audio_to_video, video_to_audio, grid=GRID, num_keys=KEYS).in_mouths is None


def test_mouth_cover_is_the_mean_area_of_a_latent_frames_boxes():
    half_cell, whole_cell = (24.0, 16.0, 32.0, 32.0), (0.0, 0.0, 16.0, 16.0)
    boxes = [[half_cell], [whole_cell, whole_cell], [], [], [(-5.0, 8.0, 99.0, 24.0)]]
    cover = mouth_cover(boxes, grid=(2, 2, 2), size=(32, 32), latent_frames=[0, 1, 1, 1, 1])
    assert cover is not None
    torch.testing.assert_close(cover[0], torch.tensor([[0, 0], [0, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(cover[1], torch.tensor([[0.375, 0.125], [0.125, 0.125]], dtype=torch.float64))
    assert mouth_cover([[], []], grid=(1, 2, 2), size=(32, 32), latent_frames=[0, 0]) is None
    with pytest.raises(ValueError, match="shorter"):
        mouth_cover([[half_cell]], grid=(2, 2, 2), size=(32, 32), latent_frames=[0, 1])
