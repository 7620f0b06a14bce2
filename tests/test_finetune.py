"""From a plain folder of clips to an adapter: what is read, prepared once, planned, trained, and shown."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from avlit.adapters import is_adapter_name
from avlit.batch import AVBatch
from avlit.commands import custom_clips, export, finetune, resume
from avlit.commands.finetune import read_request, refuse_export
from avlit.commands.train import train
from avlit.config import ConfigError, load_config
from avlit.errors import UserError
from avlit.inherit import resolve_weights
from avlit.media import read_audio, read_clip, write_mp4, write_sound
from avlit.module import AVModule
from avlit.runs import find_run, list_runs
from data.prepare.sources import CLIP_SUFFIXES
from data.prepare.tables import digest_of, lay_out, read_rows
from data.replay import REPLAY
from data.shards import ShardSet
from tests import kill_fuzz
from tests.kill_fuzz import tiny

RATE_HZ = 16000


def tone(seconds: float, hertz: float) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE_HZ)) / RATE_HZ)).astype(np.float32)


def write_clip(path: Path, *, frames: int = 26, level: int = 90, hertz: float = 220.0) -> None:
    picture = np.full((frames, 64, 64, 3), level, np.uint8)
    picture[:, 20:40, 20:40] = (np.arange(frames) * 9 % 255)[:, None, None, None]
    write_mp4(path, picture, fps=12, waveform=tone(frames / 12, hertz), rate_hz=RATE_HZ)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two clips with their captions beside them."""
    folder = tmp_path / "my_clips"
    folder.mkdir()
    for number, name in enumerate(("red", "blue")):
        write_clip(folder / f"{name}.mp4", level=60 + 90 * number, hertz=220.0 * (1 + number))
        (folder / f"{name}.txt").write_text(f"A {name} room with a changing square.")
    return folder


# What is read.


def test_captions_beside_clips_and_in_tables_come_to_the_same(clips: Path, tmp_path: Path):
    rows = read_rows(clips, suffixes=CLIP_SUFFIXES)
    assert [row.name for row in rows] == ["blue", "red"]
    for text in clips.glob("*.txt"):
        text.unlink()
    with pytest.raises(UserError, match=r"blue.mp4 has no blue.txt or blue.json beside it; write one"):
        read_rows(clips, suffixes=CLIP_SUFFIXES)
    with open(clips / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["video", "caption"], ["red.mp4", "A red room, with a square."], ["blue.mp4", "A blue room."]])
    of_csv = read_rows(clips, suffixes=CLIP_SUFFIXES)
    (clips / "table.csv").unlink()
    lines = [
        {"video": "red.mp4", "caption": "A red room, with a square."},
        {"file": "blue.mp4", "caption": "A blue room."},
    ]
    (clips / "table.jsonl").write_text("\n".join(map(json.dumps, lines)))
    of_jsonl = read_rows(clips, suffixes=CLIP_SUFFIXES)
    assert of_csv == of_jsonl and of_csv[1].record == {"caption": "A red room, with a square."}
    assert digest_of(of_csv) == digest_of(of_jsonl)
    moved = tmp_path / "moved"
    shutil.copytree(clips, moved)
    assert digest_of(read_rows(moved, suffixes=CLIP_SUFFIXES)) == digest_of(of_jsonl)
    write_clip(moved / "red.mp4", level=200)
    assert digest_of(read_rows(moved, suffixes=CLIP_SUFFIXES)) != digest_of(of_jsonl)
    (clips / "second.csv").write_text("video,caption\n")
    with pytest.raises(UserError, match=r"second.csv, table.jsonl: keep one of these tables"):
        read_rows(clips, suffixes=CLIP_SUFFIXES)


def test_the_files_of_a_row_lie_where_prepare_looks_for_them(tmp_path: Path):
    folder, out = tmp_path / "clips", tmp_path / "laid"
    folder.mkdir()
    write_clip(folder / "a.mp4")
    write_sound(folder / "other.wav", tone(26 / 12, 880.0), rate_hz=RATE_HZ)
    for name in ("speech.wav", "music.wav", "voice.wav", "depth.mp4", "face.png"):
        (folder / name).write_bytes(b"kept as it is")
    row = {
        "video": "a.mp4", "audio": "other.wav", "caption": "A square.", "speech": "speech.wav", "music": "music.wav",
        "reference_audio": "voice.wav", "depth": "depth.mp4", "reference_image": "face.png",
    }  # fmt: skip
    (folder / "rows.jsonl").write_text(json.dumps(row))
    lay_out(read_rows(folder, suffixes=(".mp4",))[:1], out)
    assert {path.name for path in out.iterdir()} == {
        "a.mkv", "a.json", "a.speech.wav", "a.music.wav", "a.reference.wav", "a.depth.mp4", "a.reference.png",
    }  # fmt: skip
    assert json.loads((out / "a.json").read_text()) == {"caption": "A square."}
    picture = read_clip(folder / "a.mp4", rate_hz=None, duration_s=1.0).frames
    assert np.array_equal(read_clip(out / "a.mkv", rate_hz=None, duration_s=1.0).frames, picture)
    spectrum = np.abs(np.fft.rfft(read_audio(out / "a.mkv", RATE_HZ)[:RATE_HZ]))
    assert abs(int(spectrum.argmax()) - 880) <= 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4", "capton": "x"}, r"rows.jsonl, line 1: no such column as capton; did you mean caption"),
        ({"video": "b.mp4", "caption": "x"}, r"line 1: video=b.mp4: no such file beside the table"),
        ({"video": "a.mp4", "caption": "x", "depth": "d.mp4"}, r"line 1: depth=d.mp4: no such file"),
        ({"caption": "x"}, r"line 1: needs one of video and audio"),
        ({"video": "a.mp4"}, r"line 1: says nothing of a.mp4; give it a caption"),
    ],
)
def test_a_wrong_row_is_named_by_line_and_column(tmp_path: Path, row: dict[str, str], message: str):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path, suffixes=CLIP_SUFFIXES)


# Words.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=mtv_stage5"], r"data.root=… is missing"),
        (["data.root=x"], r"recipe=… is missing"),
        (["recipe=mtv_stage5", "data.root=x"], r"adapter=lora: needs trained weights to stand on; give init=RUN"),
        (["recipe=mtv_stage5", "data.root=x", "format=diffuser"], r"format=diffuser: .*did you mean diffusers"),
        (["recipe=mtv_stage5", "data.root=x", "plan=yes"], r"plan=yes: must be one of true, false"),
        (["recipe=mtv_stage5", "data.root=x", "prepare.out=y"], r"prepare.out=y: comes from the other words"),
        (["recipe=mtv_stage5", "data.root=x", "model.weights=w", "replay=1"], r"replay=1: must be a share"),
    ],
)
def test_a_wrong_word_is_answered_before_anything_is_read(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        read_request(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=diffusers"], r"are not of .* format=peft or adapter\.modality=video"),
        (["format=comfyui", "adapter.modality=controlnet"], r"are not of .* format=peft"),
        (["format=peft", "adapter=own"], r"adapter=own .* take format=none"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_anything_is_trained(words: list[str], message: str):
    given = ["recipe=mtv_stage5", "data.root=x", "model.weights=w"]
    wanted = read_request([*given, *words])
    with pytest.raises(ConfigError, match=message):
        refuse_export(wanted.config, wanted.format)
    for others in (["format=diffusers", "adapter.modality=video"], ["adapter=own"]):
        allowed = read_request([*given, *others])
        refuse_export(allowed.config, allowed.format)


# All of it.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def words(folder: Path) -> list[str]:
    kill_fuzz.keep_in_spool()
    given = [*tiny(["recipe=mtv_stage5"]), "recipe=mtv_stage5", f"runs_dir={folder}/runs", "train.accelerator=cpu",
             "tracking.uri=offline", "sample.every=0", "data.num_frames=9"]  # fmt: skip
    given = list({word.partition("=")[0]: word for word in given}.values())
    base = [*given, f"data.cache_dir={folder}/cache", "data.subsets={basic_face: 1}", "sample.count=0"]
    outcome = train(load_config([*(word for word in base if not word.startswith("sample.count=1")), "train.steps=1"]))
    left = [word for word in given if not word.startswith(("data.num_clips", "train.steps"))]
    return [*left, f"init={outcome.run.path}", f"data.cache_dir={folder}/cache", "train.steps=2"]


def test_a_plan_counts_and_leaves_nothing_behind(
    words: list[str], folder: Path, clips: Path, capsys: pytest.CaptureFixture[str]
):
    before = {*(folder / "runs").iterdir(), *(folder / "cache").glob("clips-*")}
    assert finetune.main([*words, f"data.root={clips}", "plan=true", "adapter.rank=2"]) == 0
    said = capsys.readouterr().out
    assert "prepare: 2 clips of 4.3 s to about 4 windows of 0.75 s" in said
    assert "train: 2 steps of 4 clips" in said and "adapter=lora:" in said and "memory: about" in said
    assert "time: about" in said and "Nothing was prepared or trained" in said
    assert {*(folder / "runs").iterdir(), *(folder / "cache").glob("clips-*")} == before


def test_finetuning_prepares_once_trains_an_adapter_shows_and_exports_it(
    words: list[str], folder: Path, clips: Path, capsys: pytest.CaptureFixture[str]
):
    given = [*words, f"data.root={clips}", "prepare.heldout=0.25"]
    assert finetune.main(given) == 0
    said = capsys.readouterr().out
    run = find_run(folder / "runs", "last")
    assert all(is_adapter_name(name) for name in resolve_weights(run.path).weights())
    losses = json.loads((run.path / "finetune.json").read_text())
    assert losses.keys() == {"own", "heldout", "unrelated"}
    assert all(each["before"] > 0 and each["before"] != each["after"] for each in losses.values())
    for when in ("before", "after"):
        assert list((run.samples_dir / when).glob("*.mp4")) and (run.samples_dir / when / "contact_sheet.png").exists()
    assert (run.path / "export" / "peft" / "adapter_config.json").exists() and "Read again by peft" in said

    own, replay = (Path(part) for part in load_config_root(run.read_config()).split(","))
    assert ShardSet.open(replay).subsets == (REPLAY,) and REPLAY not in ShardSet.open(own).subsets
    config = read_request(given).config
    rows = custom_clips.clip_rows(config)
    asked = read_request(given).prepare
    assert custom_clips.prepared(config, rows, asked, cache=folder / "cache") == own
    assert "prepared before from the same clips" in capsys.readouterr().out
    other = custom_clips.prepared(config, rows, {**asked, "stride": "0.5"}, cache=folder / "cache")
    assert other != own and other is not None

    continued = read_request([word for word in given if not word.startswith("init=")] + [f"init={run.path}"])
    assert continued.config.adapter.kind == "lora" and continued.config.adapter.rank == config.adapter.rank
    assert len(list_runs(folder / "runs")) == 2


def test_a_finetuning_that_was_stopped_is_shown_and_exported_by_its_resume(
    words: list[str], folder: Path, clips: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    train_step = AVModule.training_step

    def terminated(self: AVModule, batch: AVBatch, batch_index: int) -> dict[str, object]:
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(AVModule, "training_step", terminated)
        given = [
            *words,
            f"data.root={clips}",
            "sample.count=0",
            "validation.clips=0",
            "format=diffusers",
            "adapter.modality=video",
        ]
        assert finetune.main(list({word.partition("=")[0]: word for word in given}.values())) == 143
    run = find_run(folder / "runs", "last")
    exported = run.path / "export" / "diffusers"
    assert not (run.path / "finetune.json").exists() and not exported.exists()
    resumed = [f"run={run.path}"]
    with monkeypatch.context() as patch:

        def killed(_: list[str]) -> None:
            exported.mkdir(parents=True)
            (exported / "pytorch_lora_weights.safetensors").touch()
            raise KeyboardInterrupt

        patch.setattr(export, "main", killed)
        with pytest.raises(KeyboardInterrupt):
            resume.main(resumed)
    losses = (run.path / "finetune.json").read_text()
    capsys.readouterr()
    assert resume.main(resumed) == 0
    said = capsys.readouterr().out
    assert "Read again by diffusers" in said and "loss on" not in said
    assert (run.path / "finetune.json").read_text() == losses and (exported / "README.md").exists()
    with pytest.raises(ConfigError, match="has finished its 2 steps"):
        resume.main(resumed)
    (run.path / "finetuning.json").write_text('{"format": "zip"}')
    with pytest.raises(UserError, match=r"finetuning\.json cannot be read \(format=zip\)"):
        resume.main(resumed)


def load_config_root(text: str) -> str:
    from avlit.config import from_yaml

    return str(from_yaml(text).data.root)
