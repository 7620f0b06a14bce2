"""The judge of pictures sees who is there and how far; what it says moves when pictures are swapped or ruined."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from avlit.codecs.embedded_video import EmbeddedVideoCodec
from avlit.commands import corpus_judge
from avlit.commands.corpus_judge import ATTRIBUTES, corpus_picture_judge, corpus_pictures, kept_picture_judge
from avlit.metrics.picture_judge import PictureJudge, Seer, identity_agreement


@pytest.fixture(scope="module")
def judge() -> PictureJudge:
    return corpus_picture_judge(num_clips=80, epochs=6)


@pytest.fixture(scope="module")
def heldout() -> tuple[Tensor, Tensor, list[dict[str, str]]]:
    pictures, depths, persons = corpus_pictures(range(600_000, 600_012))
    codec = EmbeddedVideoCodec()
    seen = codec.decode(codec.encode(pictures[:, :, None])).clamp(-1, 1)  # [B, 3, 1, H, W]
    return seen, depths[:, None], persons


def test_persons_are_seen_as_they_are_and_at_chance_once_swapped_or_hidden(judge: PictureJudge, heldout):
    seen, _, persons = heldout
    own, chance = identity_agreement([judge.person(video) for video in seen], persons)
    assert own > 0.85 and chance < 0.4
    swapped, _ = identity_agreement([judge.person(video) for video in seen.roll(1, 0)], persons)
    assert swapped < 0.55
    hidden, level = identity_agreement([judge.person(torch.zeros_like(video)) for video in seen], persons)
    assert abs(hidden - level) < 0.05


def test_depth_is_that_of_the_scene_and_far_off_once_swapped_shifted_or_destroyed(judge: PictureJudge, heldout):
    seen, depths, _ = heldout

    def error(videos: Tensor) -> float:
        return sum(judge.depth_error(v, d) for v, d in zip(videos, depths, strict=True)) / len(depths)

    own = error(seen)
    assert own < 0.075
    assert error(seen.roll(1, 0)) > 1.5 * own
    assert error(seen.roll(12, -1)) > 1.5 * own
    assert error(torch.zeros_like(seen)) > 1.5 * own


def test_all_frames_say_together_who_is_there(judge: PictureJudge, heldout):
    seen, _, _ = heldout
    video = torch.cat((seen[0], seen[0], seen[1]), dim=1)  # [3, 3, H, W]
    assert judge.person(video) == judge.person(seen[0]) != judge.person(seen[1])
    assert judge.depth(video).shape == (3, 32, 32)


def test_the_same_seed_trains_the_same_judge_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = corpus_picture_judge(num_clips=4, epochs=1)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    second = corpus_picture_judge(num_clips=4, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.seer.parameters(), second.seer.parameters(), strict=True))


def test_a_judge_is_trained_once_and_a_file_that_is_not_what_was_written_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    trained = []

    def train() -> PictureJudge:
        torch.manual_seed(len(trained))
        trained.append(PictureJudge(Seer(ATTRIBUTES).eval(), ATTRIBUTES))
        return trained[-1]

    monkeypatch.setattr(corpus_judge, "corpus_picture_judge", train)
    picture = torch.rand(3, 1, 64, 64)
    expected = kept_picture_judge(tmp_path).depth(picture)
    assert torch.equal(kept_picture_judge(tmp_path).depth(picture), expected) and len(trained) == 1
    (path,) = (tmp_path / "judges").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100], b""):
        path.write_bytes(damaged)
        kept_picture_judge(tmp_path)
    assert len(trained) == 4 and capsys.readouterr().out.count("the judge is trained again") == 3
    monkeypatch.setattr(corpus_judge, "source_hash", lambda: "another corpus")
    kept_picture_judge(tmp_path)
    assert len(trained) == 5


def test_agreement_counts_attributes_and_takes_the_others_for_chance():
    red, blue = {"hair": "red", "skin": "tan"}, {"hair": "blue", "skin": "tan"}
    assert identity_agreement([red, blue], [red, blue]) == (1.0, 0.5)
    assert identity_agreement([blue, red], [red, blue]) == (0.5, 1.0)
    with pytest.raises(ValueError, match="1 persons seen and 1 asked for"):
        identity_agreement([red], [red])
