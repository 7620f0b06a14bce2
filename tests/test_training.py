"""A run from words to checkpoint, clips and MLflow, through the real commands at a size of seconds."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from avlit.checkpoints import newest_valid
from avlit.commands import curriculum, sample
from avlit.commands.reference import write_references
from avlit.commands.train import Outcome, train
from avlit.config import Config, load_config, to_yaml
from avlit.reference import Reference, ReferenceCurve, settings_of
from avlit.runs import create_run, list_runs
from avlit.tracking import replay
from avlit.tracking.spool import pending_bytes
from recipes.mtv.config import MTVConfig

ROOT = Path(__file__).parents[1]
SMALL = (
    "model.num_layers=2", "model.num_heads=2", "model.num_interaction_blocks=1", "model.audio_hidden=32",
    "data.num_frames=9", "data.num_clips=16", "data.batch_size=4", "validation.clips=4", "sample.steps=2",
    "sample.count=2", "sample.sync_clips=3", "train.threads=1", "train.log_every=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def words(tmp_path: Path, cache: Path, *more: str) -> list[str]:
    folders = [f"runs_dir={tmp_path / 'runs'}", f"data.cache_dir={cache}", "tracking.uri=offline"]
    given = {word.split("=")[0]: word for word in (*SMALL, *folders, *more)}
    return list(given.values())


def run_stage(tmp_path: Path, cache: Path, *more: str) -> Outcome:
    return train(load_config(words(tmp_path, cache, *more)))


def weights_of(outcome: Outcome, *, ema: bool = False) -> Mapping[str, torch.Tensor]:
    checkpoint, _ = newest_valid(outcome.run.checkpoints_dir)
    assert checkpoint is not None
    return checkpoint.ema() if ema else checkpoint.weights()


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def query(tmp_path: Path, text: str) -> list[tuple]:
    """Rows of the MLflow store, once all that the runs logged is there: a busy machine leaves some to be sent again."""
    assert not [message for run in list_runs(tmp_path / "runs") if pending_bytes(run) and (message := replay(run))]
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        return store.execute(text).fetchall()


def test_a_stage_leaves_checkpoint_clips_and_an_mlflow_run(tmp_path, cache, capsys, monkeypatch):
    config = load_config(
        words(
            tmp_path, cache, "recipe=mtv_stage3", "train.steps=4", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
            "validation.every=2",
        )
    )  # fmt: skip
    path = give_reference(tmp_path, config, {0: (9.0, 0.1), 2: (9.0, 0.1), 4: (9.0, 90.0)})
    monkeypatch.setattr("avlit.reference.reference_path", lambda recipe, root: path)
    outcome = train(config)
    run, printed = outcome.run, capsys.readouterr().out
    told = [line.partition(" at step ")[2] for line in printed.splitlines() if line.startswith("val/loss/video ")]
    assert [line.partition(",")[0].partition(" (")[0] for line in told] == [
        "0: lower than normal", "2: lower than normal", "4: normal",
    ]  # fmt: skip
    assert run.record().status == "finished"
    assert "Starts from scratch" in printed and "val/loss/video" in printed
    checkpoint, skipped = newest_valid(run.checkpoints_dir)
    assert checkpoint is not None and not skipped and checkpoint.step == 4 and checkpoint.has_ema
    assert checkpoint.state.recipe == "mtv_stage3"
    clips = sorted((run.samples_dir / "step-00000004").glob("*.mp4"))
    assert len(clips) == 2
    assert all(has_picture_and_sound(clip) for clip in clips)
    assert (run.samples_dir / "step-00000004" / "contact_sheet.png").stat().st_size > 1000
    assert {"val/loss/video", "val/lip_sync", "val/lip_sync_shuffled"} <= outcome.metrics.keys()

    metrics = {name for (name,) in query(tmp_path, "select distinct key from metrics")}
    assert {"train/loss/video", "train/loss/video/subset/multiple_characters", "val/loss/video", "train/lr"} <= metrics
    assert {"throughput/samples_per_s", "throughput/tokens_per_s", "throughput/data_wait_share"} <= metrics
    params = dict(query(tmp_path, "select key, value from params"))
    assert params["optimizer.lr"] == "0.001" and params["recipe"] == "mtv_stage3"
    tags = dict(query(tmp_path, "select key, value from tags"))
    assert tags["recipe"] == "mtv_stage3" and len(tags["data"]) >= 16


def give_reference(tmp_path: Path, config: Config, losses: dict[int, tuple[float, float]]) -> Path:
    """A file with a reference of just this config: step -> mean and spread."""
    settings = settings_of(create_run(tmp_path / "planned", config.recipe, config=to_yaml(config)))
    means, spreads = zip(*losses.values(), strict=True)
    curve = ReferenceCurve(tuple(losses), means, spreads)
    path = tmp_path / "reference.json"
    write_references(path, {config.recipe: Reference((0, 1, 2), settings, "", {}, {"val/loss/video": curve})})
    return path


def has_picture_and_sound(path: Path) -> bool:
    import av

    with av.open(str(path)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    with av.open(str(path)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    return frames == 9 and samples > 0


def test_the_same_words_train_the_same_weights_with_and_without_worker_processes(tmp_path, cache):
    first = run_stage(tmp_path, cache, "recipe=mtv_stage1", "train.steps=3", "sample.count=0", "sample.sync_clips=0")
    again = run_stage(
        tmp_path, cache, "recipe=mtv_stage1", "train.steps=3", "sample.count=0", "sample.sync_clips=0", "data.workers=1"
    )
    other = run_stage(
        tmp_path, cache, "recipe=mtv_stage1", "train.steps=3", "sample.count=0", "sample.sync_clips=0", "seed=1"
    )
    assert same(weights_of(first), weights_of(again))
    assert not same(weights_of(first), weights_of(other))


def test_accumulated_micro_batches_give_the_weights_of_the_whole_batch(tmp_path, cache):
    settings = ("recipe=mtv_stage1", "train.steps=2", "sample.count=0", "sample.sync_clips=0", "optimizer.eps=1e-4")
    whole, halves = (weights_of(run_stage(tmp_path, cache, *settings, f"train.accumulate={n}")) for n in (1, 2))
    for name in whole:
        torch.testing.assert_close(whole[name], halves[name], rtol=1e-3, atol=2e-5)


def test_a_curriculum_passes_each_stages_weights_to_the_next_under_one_parent(tmp_path, cache, capsys):
    status = curriculum.main(
        words(
            tmp_path, cache, "recipe=mtv", "train.steps=1", "sample.count=0", "sample.sync_clips=0",
            f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        )
    )  # fmt: skip
    assert status == 0
    runs = list_runs(tmp_path / "runs")
    parent = next(run for run in runs if run.recipe == "mtv_curriculum")
    stages = [run for run in runs if run.parent == parent.id]
    assert [run.recipe for run in stages] == [f"mtv_stage{n}" for n in range(1, 6)]
    assert all(later.record().init_run == earlier.id for earlier, later in pairwise(stages))
    last, _ = newest_valid(stages[-1].checkpoints_dir)
    assert last is not None and [run for run, _ in last.state.lineage] == [run.id for run in stages]
    assert "a new run from weights, not a resume" in capsys.readouterr().out
    parents = query(tmp_path, "select value from tags where key = 'mlflow.parentRunId'")
    assert len(parents) == 5 and len(set(parents)) == 1


def test_a_stage_that_starts_from_another_has_its_averaged_weights_before_the_first_step(tmp_path, cache):
    first = run_stage(tmp_path, cache, "recipe=mtv_stage1", "train.steps=2", "sample.count=0", "sample.sync_clips=0")
    second = run_stage(
        tmp_path, cache, "recipe=mtv_stage2", f"init={first.run.path}", "train.steps=1", "optimizer.lr=1e-30",
        "sample.count=0", "sample.sync_clips=0",
    )  # fmt: skip
    assert same(
        weights_of(first, ema=True), {n: w for n, w in weights_of(second).items() if n in weights_of(first, ema=True)}
    )


def test_sigterm_saves_within_a_step_and_exits_143(tmp_path, cache):
    command = [sys.executable, "-m", "avlit", "train"]
    given = words(tmp_path, cache, "recipe=mtv_stage1", "train.steps=100000", "sample.count=0", "sample.sync_clips=0")
    process = subprocess.Popen(
        [*command, *given], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    try:
        metrics = wait_for_a_log_point(tmp_path / "runs", process)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode == 143, printed
    run = list_runs(tmp_path / "runs")[-1]
    assert run.record().status == "stopped"
    checkpoint, _ = newest_valid(run.checkpoints_dir)
    assert checkpoint is not None and checkpoint.step >= metrics
    assert f"after step {checkpoint.step}" in printed


def wait_for_a_log_point(runs_dir: Path, process: subprocess.Popen) -> int:
    """The last step in the spool, once there is one."""
    while process.poll() is None:
        for path in runs_dir.glob("*/spool/*.jsonl"):
            records = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            steps = [record["s"] for record in records if "s" in record]
            if steps and max(steps) > 0:
                return max(steps)
        time.sleep(0.1)
    raise AssertionError("training ended before its first log point")


def test_sample_writes_the_same_clips_for_the_same_seed(tmp_path, cache, capsys):
    run_stage(tmp_path, cache, "recipe=mtv_stage1", "train.steps=1", "sample.count=0", "sample.sync_clips=0")
    runs = f"runs_dir={tmp_path / 'runs'}"
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert sample.main(["run=last", runs, f"out={tmp_path / name}", f"seed={seed}", "sample.count=1"]) == 0
    clips = {name: next((tmp_path / name).glob("*.mp4")).read_bytes() for name in "abc"}
    assert clips["a"] == clips["b"]
    assert clips["a"] != clips["c"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("init=nowhere", "nowhere"),
        ("sample.scheduler=NoScheduler", "sample.scheduler=NoScheduler"),
        ("data.root=nowhere", "nowhere"),
        ("data.subsets={no_such_subset: 1}", "no_such_subset"),
        ("model.weights=nowhere", "nowhere"),
    ],
)
def test_a_mistake_is_one_message_before_the_first_step(tmp_path, cache, word, message, capsys):
    from avlit.__main__ import USER_MISTAKE, main

    status = main(["train", *words(tmp_path, cache, "recipe=mtv_stage1", "train.steps=1", word)])
    captured = capsys.readouterr()
    assert status == USER_MISTAKE
    assert message in captured.err and "Traceback" not in captured.err
    assert not list((tmp_path / "runs").glob("*/checkpoints/step-*"))


def test_distributed_environment_is_left_as_it_was(tmp_path, cache):
    run_stage(tmp_path, cache, "recipe=mtv_stage1", "train.steps=1", "sample.count=0", "sample.sync_clips=0")
    assert "AVLIT_RUN" not in os.environ


def write_raw_clips(folder: Path) -> Path:
    """Three captioned MP4s of two seconds."""
    from avlit.media import write_mp4
    from data.corpus import CorpusSettings, make_clip

    folder.mkdir()
    for index in range(3):
        clip = make_clip("single_character", index, CorpusSettings())
        assert clip.frames is not None
        write_mp4(folder / f"{index}.mp4", clip.frames, fps=12, waveform=clip.mix, rate_hz=16000, scale=1)
        (folder / f"{index}.txt").write_text(clip.caption)
    return folder


def test_clips_of_two_sizes_train_and_are_sampled_in_one_run(tmp_path, cache):
    from avlit.commands import prepare

    clips = write_raw_clips(tmp_path / "clips")
    for width in (32, 48):
        settings = ["data.num_frames=9", "data.height=32", f"data.width={width}", "heldout=0.3"]
        assert prepare.main([f"source={clips}", f"out={tmp_path / str(width)}", *settings]) == 0
    roots = f"data.root={tmp_path / '32'},{tmp_path / '48'}"
    given = [
        word
        for word in words(tmp_path, cache, "recipe=mtv_stage1", roots, "data.subsets={single_character: 1}")
        if not word.startswith(("data.num_clips", "data.cache_dir"))
    ]
    given = [word for word in given if not word.startswith("sample.count")]
    outcome = train(load_config([*given, "data.buckets={9x32x48: 2}", "train.steps=4", "sample.count=8"]))
    assert outcome.run.record().status == "finished"
    sizes = {frame_size(path) for path in outcome.run.samples_dir.glob("*/*.mp4")}
    assert sizes == {1.0, 1.5}


def frame_size(path: Path) -> float:
    """Width over height."""
    from avlit.media import probe

    info = probe(path)
    assert info.width and info.height
    return info.width / info.height


def test_paper_settings_train_released_weights_on_prepared_clips(tmp_path, cogvideox_folder, wav2vec2_folder, capsys):
    """The paper size's own path, at tiny sizes: real codecs, released backbone, frozen parts, bf16, accumulation."""
    from avlit.commands import prepare
    from avlit.models.mst_controlnet import build_backbone

    clips = write_raw_clips(tmp_path / "clips")
    codecs = [
        f"codecs.video_weights={cogvideox_folder}",
        f"codecs.text_weights={cogvideox_folder}",
        f"codecs.tracks_weights={wav2vec2_folder}",
    ]
    shape = ["data.num_frames=9", "data.height=32", "data.width=32", "data.fps=12"]
    shards = tmp_path / "shards"
    status = prepare.main(
        [f"source={clips}", f"out={shards}", "recipe=mtv_stage2", "size=paper", "heldout=0.3", *codecs, *shape]
    )
    assert status == 0
    model = [
        "model.num_layers=2", "model.num_heads=2", "model.head_dim=16", "model.in_channels=8", "model.out_channels=4",
        "model.text_dim=16", "model.time_embed_dim=16", "model.sample_height=4", "model.sample_width=4",
        "model.sample_frames=9", "model.audio_layers=3", "model.audio_dim=16", "model.audio_hidden=8",
        "model.audio_tokens=2", "model.control_dim=16", "model.interaction_heads=2",
    ]  # fmt: skip
    released = tmp_path / "CogVideoX"
    given = [
        "recipe=mtv_stage2", "size=paper", f"data.root={shards}", f"model.weights={released}", *codecs, *shape, *model,
        "data.batch_size=2", "train.accumulate=2", "train.steps=2", "sample.count=1", "sample.steps=2",
        "optimizer.lr=1e-2", f"runs_dir={tmp_path / 'runs'}", "tracking.uri=offline",
    ]  # fmt: skip
    config = load_config(given)
    assert isinstance(config, MTVConfig)
    backbone = build_backbone(config.model)
    backbone.save_pretrained(released / "transformer")
    outcome = train(config)
    assert "new (control, injections)" in capsys.readouterr().out
    saved = weights_of(outcome)
    stock = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    trained = {name for name in saved if name in stock}
    assert trained and all(".attn1." in name or ".norm2.norm." in name for name in trained)  # frozen ones are not saved
    assert any(not torch.equal(saved[name], stock[name]) for name in trained)
    assert any(name.startswith("injections.") for name in saved)
    checkpoint, _ = newest_valid(outcome.run.checkpoints_dir)
    assert checkpoint is not None and checkpoint.state.base_model
    assert sample.main(["run=last", f"runs_dir={tmp_path / 'runs'}", f"out={tmp_path / 'clips_out'}"]) == 0
