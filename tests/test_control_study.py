"""MMControl's decoupled study as one command: a run of each seed, sampled with others' controls under each setting."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avlit.__main__ import USER_MISTAKE
from avlit.__main__ import main as avlit
from avlit.batch import AVBatch
from avlit.codecs.embedded_video import EmbeddedVideoCodec
from avlit.commands import clips, control_study
from avlit.commands.corpus_judge import ATTRIBUTES
from avlit.config import from_yaml
from avlit.control_grid import Column, control_grid
from avlit.metrics.picture_judge import PictureJudge, Seer
from avlit.runs import list_runs
from avlit.tracking import Tracker
from data.datamodule import HeldoutClip
from data.embedded import embedded_encoders
from data.sample import Annotation
from tests import kill_fuzz

WORDS = (
    "table=mmcontrol_decoupled", "quick=true", "train.steps=1", "model.num_layers=2", "model.num_heads=2",
    "model.video_head_dim=12", "model.audio_head_dim=8", "data.num_frames=9", "data.height=32",
    "data.width=32", "data.num_clips=16",
    "data.batch_size=4", "validation.clips=2", "sample.steps=2", "sample.count=0", "train.threads=1",
    "train.accelerator=cpu", "clips=4",
)  # fmt: skip
ROWS = ["none", "visual", "acoustic", "both", "both and depth"]


@pytest.fixture(autouse=True)
def _quick_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent, and the judge has learnt nothing: both take longer than the runs."""
    monkeypatch.setattr(Tracker, "_start_sender", Tracker._start_sender)  # put back after the test
    kill_fuzz.keep_in_spool()
    judge = PictureJudge(Seer(ATTRIBUTES).eval(), ATTRIBUTES)
    monkeypatch.setattr("avlit.commands.corpus_judge.kept_picture_judge", lambda kept_in: judge)


def words(folder: Path, *more: str) -> list[str]:
    place = [f"runs_dir={folder}/runs", "tracking.uri=offline", f"data.cache_dir={folder}/cache"]
    return ["reproduce", *place, *WORDS, *more]


def test_one_command_trains_a_seed_once_and_samples_every_setting_from_one_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    seen = []

    def sample_clips(module, given, *, settings, seed, **others):
        seen.append(([each.batch for each in given], settings, seed))
        return clips.sample_clips(module, given, settings=settings, seed=seed, **others)

    monkeypatch.setattr(control_study, "sample_clips", sample_clips)
    assert avlit(words(tmp_path)) == 0
    parent, *runs = list_runs(tmp_path / "runs")
    names = [from_yaml(run.read_config()).run_name for run in runs]
    assert names == ["mmcontrol_backbone, seed 0", "mmcontrol, seed 0"]
    assert runs[1].record().init_run == runs[0].id and {run.parent for run in runs} == {parent.id}

    scales = [(settings.visual_scale, settings.acoustic_scale) for _, settings, _ in seen]
    assert scales == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 1)] and {seed for *_, seed in seen} == {0}
    for batches, _, _ in seen:
        assert all(b.has_reference_image == b.has_reference == (True,) and b.has_pose == (False,) for b in batches)
    assert [batches[0].has_depth[0] for batches, *_ in seen] == [False] * 4 + [True]
    assert len({batch.keys[0] for batch in seen[0][0]}) == 4

    values = json.loads((parent.path / "table.json").read_text())
    assert list(values["seeds"]) == [*ROWS, "true clips"]
    measured = [values["seeds"][row]["0"] for row in ROWS]
    assert all({"identity", "identity_shuffled", "voiced", "depth_error"} <= set(each) for each in measured)
    ratio = measured[4]["depth_error"] / measured[3]["depth_error"]
    assert measured[4]["depth_ratio"] == pytest.approx(ratio) and "depth_ratio" not in measured[3]
    assert Image.open(parent.path / "grid-seed-0.png").size == (6 * 134, 20 + 4 * 148)
    sent = (parent.path / "spool" / "artifacts.jsonl").read_text()
    assert "grid-seed-0.png" in sent and "table.md" in sent
    assert '"row both and depth/depth_ratio"' in (parent.path / "spool" / "metrics.jsonl").read_text()
    printed = capsys.readouterr().out
    assert "Of the true clips the same judges say: identity" in printed and "paper" not in printed.split("# ")[1][60:]

    assert avlit(words(tmp_path)) == 0  # all is there: it is printed again
    assert len(seen) == 5 and "Measures" not in capsys.readouterr().out


def test_each_clip_has_the_image_of_the_next_and_the_voice_of_the_one_after_it():
    encoders = embedded_encoders()
    given = [heldout_clip(number) for number in range(4)]
    found = control_study.with_controls_of_others(given, encoders)
    for number, each in enumerate(found):
        image, voice = (number + 1) % 4, (number + 2) % 4
        batch = each.clip.batch
        assert batch.keys == (str(number),) and torch.equal(batch.text, given[number].batch.text)
        assert batch.reference_image is not None and (batch.reference_image == image).all()
        assert batch.reference is not None and (batch.reference == voice).all()
        assert each.person == {"skin": "tan", "hair_colour": str(image)} and each.voice_hz == 100 + voice
        assert each.depth is not None and each.depth.shape == (5, 16, 16)
        assert float(each.depth.mean()) == pytest.approx(number / 4, abs=0.01)


def heldout_clip(number: int) -> HeldoutClip:
    """A clip whose every control says its number."""
    grey = EmbeddedVideoCodec().encode(torch.full((1, 3, 5, 16, 16), number / 2 - 1))
    batch = AVBatch(
        keys=(str(number),),
        subsets=("basic_face",),
        captions=("",),
        duration_s=0.4,
        step=0,
        slots=(0,),
        text=torch.full((1, 2, 64), float(number)),
        text_lengths=(2,),
        reference=torch.full((1, 8, 64), float(number)),
        has_reference=(True,),
        reference_image=torch.full((1, 48, 1, 2, 2), float(number)),
        has_reference_image=(True,),
        depth=grey,
        has_depth=(True,),
    )
    truth: dict[str, object] = {
        "identity": [{"skin": "tan", "hair_colour": str(number), "garment": "shirt"}],
        "timbre": [{"f0_hz": 100 + number}],
    }
    about = Annotation("", "", "basic_face", fps=12, rate_hz=16000, num_frames=5, height=16, width=16, truth=truth)
    return HeldoutClip(batch, about, np.zeros(6400, np.float32), 16000)


def test_controls_that_no_run_would_know_and_too_few_clips_are_refused_before_anything_trains(tmp_path: Path, capsys):
    assert avlit(words(tmp_path, "mmcontrol.tasks.depth=0")) == USER_MISTAKE
    assert "row both and depth gives depth, and with these words mmcontrol takes prompt, " in capsys.readouterr().err
    assert avlit([*words(tmp_path)[:-1], "clips=2"]) == USER_MISTAKE
    assert "clips=2: must be at least 3, as each has controls of two others" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_grid_has_a_cell_for_each_clip_and_setting(tmp_path: Path):
    red, wide = np.full((64, 64, 3), (255, 0, 0), np.uint8), np.full((64, 128, 3), (0, 0, 255), np.uint8)
    control_grid(tmp_path / "grid.png", [Column("a", [red, red], ["1", "2"]), Column("b", [wide, wide], ["3", "4"])])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (20 + 2 * 148, 134 + 262, 3)
    assert (grid[20:148, :128] == (255, 0, 0)).all() and (grid[168:296, 134:390] == (0, 0, 255)).all()
    with pytest.raises(ValueError, match=r"columns of \[1, 2\] clips"):
        control_grid(tmp_path / "grid.png", [Column("a", [red], ["1", "2"])])
