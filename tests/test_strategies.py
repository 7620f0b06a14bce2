"""A run on several ranks, sharded or copied, computes what one process computes, wherever it is stopped and resumed."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from avlit.checkpoints import Checkpoint, newest_valid
from avlit.runs import Run, list_runs
from tests.kill_fuzz import read_points, tiny
from tests.ranks import Ranks, as_torchrun
from tests.strategy_worker import POISON, TERMINATE

STEPS = 20


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def session(folder: Path, cache: Path, ranks: int, *more: str, **disturbances: str) -> list[int | None]:
    """Train in `folder`, or go on with the run there, on that many ranks; their exit statuses."""
    environments = [each | disturbances for each in as_torchrun(ranks)]
    if (folder / "runs").exists():
        words = ["resume", "run=last", f"runs_dir={folder}/runs", "allow_change=true", f"train.devices={ranks}", *more]
    else:
        given = [
            *tiny(more), f"runs_dir={folder}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"data.cache_dir={cache}", "train.accelerator=cpu", f"train.steps={STEPS}", "checkpoint.every=1000",
            "validation.every=1000", f"train.devices={ranks}", *more,
        ]  # fmt: skip
        words = ["train", *{word.partition("=")[0]: word for word in given}.values()]
    started = Ranks(folder, words, environments)
    statuses = started.end()
    assert set(statuses) <= {0, 143}, started.printed()[-5000:]
    return statuses


def saved(folder: Path) -> tuple[Run, Checkpoint]:
    run = list_runs(folder / "runs")[-1]
    checkpoint, _ = newest_valid(run.checkpoints_dir)
    assert checkpoint is not None
    return run, checkpoint


def assert_equal(one: Path, other: Path) -> None:
    """The same run: the same clips, losses, skipped updates, weights, average and moments to 1e-5."""
    (run_a, a), (run_b, b) = saved(one), saved(other)
    assert a.step == b.step == STEPS
    assert a.state.counters == b.state.counters
    points_a, points_b = (read_points(run.spool_dir / "metrics.jsonl") for run in (run_a, run_b))
    losses = [place for place in points_a if place[0].startswith(("train/loss/", "val/loss/"))]
    assert len({step for _, step in losses}) == STEPS + 1
    for place in losses:
        assert max(points_b[place]) == pytest.approx(max(points_a[place]), rel=1e-5, abs=1e-6, nan_ok=True), place
    for place in [place for place in points_a if place[0] == "data/key_hash"]:
        assert points_a[place] == points_b[place]
    for part in ("weights", "ema", "optimizer"):
        of_a, of_b = getattr(a, part)(), getattr(b, part)()
        assert of_a.keys() == of_b.keys() and of_a
        for name, tensor in of_a.items():
            torch.testing.assert_close(
                of_b[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_full_training_on_two_ranks_equals_one_and_is_resumed_on_the_other_number(tmp_path: Path, cache: Path):
    words = ["recipe=mtv_stage1", "optimizer.clip=0.05"]
    one, two_one, one_two = tmp_path / "one", tmp_path / "two-one", tmp_path / "one-two"
    nan = {POISON: "5:3"}
    assert session(one, cache, 1, *words, **nan) == [0]
    assert session(two_one, cache, 2, *words, "strategy=fsdp2", **nan, **{TERMINATE: "9:1"}) == [143, 0]
    assert session(one_two, cache, 1, *words, "strategy=fsdp2", **nan, **{TERMINATE: "9:0"}) == [143]
    for folder in (two_one, one_two):
        assert saved(folder)[1].step == 10
    assert session(two_one, cache, 1) == [0]
    assert session(one_two, cache, 2, "train.accumulate=2") == [0, 0]
    assert saved(one)[1].state.counters["skipped"] == 1
    assert_equal(one, two_one)
    assert_equal(one, one_two)
