"""`just inspect mouth`: the damage of zeroed latents is counted where it is, and what cannot be shown is a message."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.codecs.embedded_text import EmbeddedTextEncoder
from avlit.codecs.embedded_video import EmbeddedVideoCodec
from avlit.metrics.mouth_damage import mouth_damage
from avlit.mouth_mask import BOX_COLOUR
from avlit.timing import Timing
from data.clip import RawClip
from data.encode import Encoders, encode_clip
from data.shard_writer import ShardWriter

FRAMES, SIZE = 5, 32
MOUTH = (8.0, 16.0, 24.0, 24.0)
"""Two whole cells of the 4 x 4."""


class BlockCodec:
    """A cell of latents is the colour of its 8 x 8 pixels and its frames."""

    identity, channels, temporal_factor, spatial_factor = "blocks", 3, 4, 8

    def encode(self, video: Tensor) -> Tensor:
        return video[:, :, ::4, ::8, ::8]

    def decode(self, latents: Tensor) -> Tensor:
        frames = torch.cat([latents[:, :, :1], latents[:, :, 1:].repeat_interleave(4, 2)], 2)
        return frames.repeat_interleave(8, 3).repeat_interleave(8, 4)


@pytest.mark.parametrize(
    ("box", "share", "area"),
    [
        (MOUTH, 1.0, 16 * 8 / 1024),
        ((12.0, 16.0, 20.0, 24.0), 0.5, 8 * 8 / 1024),  # half of each of the two cells that it touches
        ((8.0, 17.5, 24.0, 22.5), 6 / 8, 16 * 6 / 1024),  # pixels that a box touches are inside
    ],
)
def test_damage_inside_the_boxes_is_counted_pixel_by_pixel(box, share, area):
    timing = Timing(fps=12, num_frames=FRAMES, height=SIZE, width=SIZE, rate_hz=16000)
    latents = torch.full((3, 2, 4, 4), 0.5)
    found = mouth_damage(BlockCodec(), latents, [[box]] * FRAMES, timing=timing, sample="a")
    assert found.in_boxes is not None and found.in_grown is not None
    assert found.in_boxes.found == pytest.approx(share)
    assert found.in_boxes.chance == pytest.approx(area)
    assert found.in_grown.found == 1
    assert found.in_grown.chance > found.in_boxes.chance
    assert found.difference.sum() == pytest.approx(3 * 0.25 * 2 * 64 * FRAMES)  # two cells of all frames, and no other


def test_damage_in_frames_without_a_mouth_is_outside_the_boxes():
    timing = Timing(fps=12, num_frames=FRAMES, height=SIZE, width=SIZE, rate_hz=16000)
    boxes = [[], [MOUTH], [], [], []]  # one frame of the second latent frame's four
    found = mouth_damage(BlockCodec(), torch.ones(3, 2, 4, 4), boxes, timing=timing, sample="a")
    assert found.in_boxes is not None
    assert found.in_boxes.found == pytest.approx(1 / 4)
    assert not found.difference[0].any()
    same = mouth_damage(BlockCodec(), torch.zeros(3, 2, 4, 4), boxes, timing=timing, sample="a")
    assert same.in_boxes is None
    with pytest.raises(ValueError, match=r"sample a: no mouth is seen in any of its frames"):
        mouth_damage(BlockCodec(), torch.ones(3, 2, 4, 4), [[]] * FRAMES, timing=timing, sample="a")


def make_shards(root: Path, *, codec: str = "", has_frames: bool = True) -> Path:
    """Held-out clips `a` without boxes, `b` and `c` with them, and one to train on, `d`."""
    video = EmbeddedVideoCodec()
    encoders = Encoders(text=EmbeddedTextEncoder(), video=video if has_frames else None)
    identity = encoders.identity(fps=12, rate_hz=16000)
    if codec:
        identity |= {"video_codec": codec}
    random = np.random.default_rng(0)
    samples = round(FRAMES / 12 * 16000)
    with ShardWriter(root, identity) as writer:
        for key in "abcd":
            silence = np.zeros(samples, np.float32)
            frames = random.integers(0, 255, (FRAMES, SIZE, SIZE, 3), np.uint8) if has_frames else None
            boxes = [[MOUTH] for _ in range(FRAMES)] if key != "a" and has_frames else []
            clip = RawClip(key, "basic_face", 12, 16000, frames, silence, silence, silence, None, "x", "", boxes)
            writer.add("basic_face", "train" if key == "d" else "heldout", encode_clip(clip, encoders))
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


def test_clips_with_mouths_are_drawn_with_their_boxes_and_measured(shards, tmp_path, capsys):
    words = ["inspect", "mouth", "recipe=unitalking_stage2", f"data.root={shards}"]
    assert avlit([*words, f"out={tmp_path / 'new' / 'mouths.png'}"]) == 0
    _, head, first, second, means, path = capsys.readouterr().out.splitlines()
    assert head.split("  ")[-4:] == ["in mouth boxes", "area of them", "in grown boxes", "area of them"]
    assert [line.split()[0] for line in (first, second)] == ["b", "c"]  # held-out ones, and those with boxes
    assert [line.split()[1:] for line in (first, second)] == [["100.0%", "12.5%", "100.0%", "75.0%"]] * 2
    assert means.split() == ["mean", "of", "2", "clips", "100.0%", "12.5%", "100.0%", "75.0%"]
    picture = np.asarray(Image.open(path))
    assert picture.shape == (2 * 4 * (24 + 128), FRAMES * 128, 3)
    green = (picture == BOX_COLOUR).all(-1)
    with_boxes = [bool(green[row * 152 : (row + 1) * 152].any()) for row in range(8)]
    assert with_boxes == [True, False, False, False] * 2
    assert avlit([*words, "clip=d,c", f"out={tmp_path / 'named.png'}"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["d", "c"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clip=a"], "clip=a: has no mouth boxes: no face was found in it"),
        (["clip=bb"], "clip=bb: no such clip in "),
        (["codecs.video=wan2.2"], "codecs.video_weights"),
        (["recipe=unitalking_stage1"], "recipe=unitalking_stage1: sees no video (codecs.video=none)"),
        (["run=last"], "run=last: no run is needed to look at mouths"),
        (["optimizer.lr=1"], "optimizer.lr=1: has no effect on mouths"),
        (["clips=a"], "clips=a: no such word; did you mean clip?"),
        (["data.num_frames=9"], "data.num_frames=9: the clips of data.root have their own sizes"),
        (["data.subsets.sound_event=1"], "data.subsets.sound_event: the shards hold basic_face"),
        (["out=a.jpg"], "out=a.jpg: the picture is written to a file, for example out=a.png"),
    ],
)
def test_what_cannot_be_shown_is_one_message_and_leaves_nothing(shards, tmp_path, capsys, words, message):
    given = {"recipe": "recipe=unitalking_stage2", "out": f"out={tmp_path / 'mouths.png'}"}
    given |= {word.partition("=")[0]: word for word in words}
    assert avlit(["inspect", "mouth", f"data.root={shards}", *given.values()]) == USER_MISTAKE
    error = capsys.readouterr().err
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_codec_and_shards_of_sound_are_refused(tmp_path, capsys):
    words = ["inspect", "mouth", "recipe=unitalking_stage2", f"out={tmp_path / 'mouths.png'}"]
    other, sound = make_shards(tmp_path / "other", codec="other"), make_shards(tmp_path / "sound", has_frames=False)
    assert avlit([*words, f"data.root={other}"]) == USER_MISTAKE
    error = capsys.readouterr().err
    assert "'other'" in error and "'embedded-video-1'" in error
    assert avlit([*words, f"data.root={sound}"]) == USER_MISTAKE
    assert "holds sound without picture" in capsys.readouterr().err


def test_boxes_of_too_few_frames_are_named(tmp_path, capsys):
    encoders = Encoders(text=EmbeddedTextEncoder(), video=EmbeddedVideoCodec())
    silence = np.zeros(round(FRAMES / 12 * 16000), np.float32)
    frames = np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)
    clip = RawClip("a", "basic_face", 12, 16000, frames, silence, silence, silence, None, "x", "", [])
    sample = encode_clip(clip, encoders)
    sample = replace(sample, annotation=replace(sample.annotation, mouth_boxes=[[MOUTH]] * 3))
    with ShardWriter(tmp_path / "shards", encoders.identity(fps=12, rate_hz=16000)) as writer:
        writer.add("basic_face", "heldout", sample)
    words = ["recipe=unitalking_stage2", f"data.root={tmp_path / 'shards'}", f"out={tmp_path / 'mouths.png'}"]
    assert avlit(["inspect", "mouth", *words]) == USER_MISTAKE
    assert "clip=a: sample a: has mouth boxes of 3 frames, but 5 frames" in capsys.readouterr().err
