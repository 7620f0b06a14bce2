"""A non-finite update changes nothing, EMA is exchanged bit for bit, logs are means, the schedule is as told."""

import lightning.pytorch as pl
import pytest
import torch
from torch.multiprocessing.spawn import spawn

from avlit.config import OptimizerConfig
from avlit.module import build_optimizer, lr_factor
from benchmarks.loop import SmallModule, loader_of, make_batches
from callbacks.ema import EMA
from callbacks.training_log import LossSums, TrainingLog

STEPS = 6


class Poisoned(SmallModule):
    """Its loss is not finite at the given steps."""

    def __init__(self, *, steps: int, at: tuple[int, ...] = ()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(steps=steps, depth=2)
        self.at = at
        self.seen: list[list[torch.Tensor]] = []

    def step(self, batch, draws):
        self.seen.append([p.detach().clone() for p in self.model.parameters()])
        losses = super().step(batch, draws)
        if batch.step in self.at:
            losses.parts["video"] = losses.parts["video"] * float("nan")
        return losses


def fit(module: SmallModule, tmp_path, *callbacks: pl.Callback, batches=None, accumulate: int = 1) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=module.total_steps,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, train_dataloaders=loader_of(batches or make_batches(STEPS)))
    return trainer


def test_a_non_finite_update_leaves_weights_and_moments_bit_unchanged(tmp_path):
    module = Poisoned(steps=STEPS, at=(2,))
    moments: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state
            moments.append(torch.cat([s["exp_avg"].flatten() for s in state.values()]).clone())

    fit(module, tmp_path, Watch())
    assert all(torch.equal(a, b) for a, b in zip(module.seen[2], module.seen[3], strict=True))
    assert torch.equal(moments[1], moments[2])
    assert not torch.equal(moments[2], moments[3])
    assert not any(torch.equal(a, b) for a, b in zip(module.seen[3], module.seen[4], strict=True))
    assert module.skipped == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


def training_log(written: list[tuple[int, dict[str, float]]]) -> TrainingLog:
    return TrainingLog(
        lambda metrics, step: written.append((step, metrics)),
        every=2,
        subsets=["basic_face"],
        tokens_per_sample=1,
        waited_s=lambda: 0.0,
        shows_progress=False,
    )


def test_losses_are_logged_by_modality_subset_and_noise_level_with_their_means(tmp_path):
    written: list[tuple[int, dict[str, float]]] = []
    module = Poisoned(steps=STEPS)
    losses: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert isinstance(outputs, dict)
            losses.append(float(outputs["loss"]))

    fit(module, tmp_path, Watch(), training_log(written))
    assert [step for step, _ in written] == [2, 4, 6]
    for (_, metrics), pair in zip(written, zip(losses[::2], losses[1::2], strict=True), strict=True):
        assert metrics["train/loss/video"] == pytest.approx(sum(pair) / 2, rel=1e-5)
        assert metrics["train/loss/video/subset/basic_face"] == pytest.approx(metrics["train/loss/video"], rel=1e-5)
        assert any(name.startswith("train/loss/video/noise/") for name in metrics)
        assert metrics["train/lr"] > 0 and metrics["train/grad_norm"] > 0


def test_loss_sums_group_by_subset_and_noise_level():
    from avlit.objectives import Losses

    sums = LossSums(["a", "b"], torch.device("cpu"))
    losses = Losses(parts={"video": torch.tensor([1.0, 2.0, 6.0])}, noise_level=torch.tensor([0.1, 0.9, 1.0]))
    sums.add(losses, ("a", "b", "b"))
    metrics = sums.read("train")
    assert metrics["train/loss/video"] == pytest.approx(3.0)
    assert metrics["train/loss/video/subset/a"] == 1.0
    assert metrics["train/loss/video/subset/b"] == 4.0
    assert metrics["train/loss/video/noise/0"] == 1.0
    assert metrics["train/loss/video/noise/3"] == 4.0
    assert "train/loss/video/noise/1" not in metrics
    assert sums.read("train") == {}


def test_two_accumulated_halves_give_the_update_of_the_whole_batch(tmp_path):
    from dataclasses import replace

    whole = Poisoned(steps=1)
    fit(whole, tmp_path, batches=make_batches(1))
    halves = Poisoned(steps=1)
    batch = make_batches(1)[0]
    parts = [
        replace(batch, keys=batch.keys[i : i + 1], subsets=("basic_face",), slots=(i,), text=batch.text[i : i + 1])
        for i in range(2)
    ]
    fit(halves, tmp_path, batches=parts, accumulate=2)
    for a, b in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_average_is_that_of_the_weights_and_the_exchange_is_bit_exact(tmp_path):
    module, ema = Poisoned(steps=STEPS), EMA(decay=0.9)
    fit(module, tmp_path, ema)
    trained = [p.detach().clone() for p in module.model.parameters()]
    expected = [p.double() for p in module.seen[0]]
    for update, weights in enumerate([*module.seen[1:], trained]):
        decay = min(0.9, (1 + update) / (10 + update))
        expected = [decay * e + (1 - decay) * w.double() for e, w in zip(expected, weights, strict=True)]
    with ema.applied(module):
        inside = [p.detach().clone() for p in module.model.parameters()]
    for value, wanted in zip(inside, expected, strict=True):
        torch.testing.assert_close(value, wanted.float(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, t) for p, t in zip(module.model.parameters(), trained, strict=True))


def skip_on_both_ranks(rank: int, folder: str) -> None:
    """One of two processes: a NaN gradient on rank 1 only."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    module = Poisoned(steps=1)
    optimizer = build_optimizer(module.model.parameters(), OptimizerConfig())
    before = [p.detach().clone() for p in module.model.parameters()]
    module.loss_is_finite = torch.tensor(True)
    for parameter in module.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan") if rank else 1.0)
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.model.parameters(), strict=True))
    for parameter in module.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, module.model.parameters(), strict=True))
    assert module.skipped == 1 and module.skipped_in_a_row == 0
    torch.distributed.destroy_process_group()


def test_a_non_finite_gradient_on_one_rank_is_left_out_on_all(tmp_path):
    spawn(skip_on_both_ranks, (str(tmp_path),), nprocs=2)  # raises what a rank asserts


def test_schedule_warms_up_and_ends_where_it_was_told():
    settings = {"steps": 1000, "warmup": 0.01, "final": 0.1}
    assert lr_factor(0, kind="linear", **settings) == pytest.approx(0.1)
    assert lr_factor(10, kind="linear", **settings) == 1.0
    assert lr_factor(505, kind="linear", **settings) == pytest.approx(0.55)
    assert lr_factor(1000, kind="linear", **settings) == pytest.approx(0.1)
    assert lr_factor(505, kind="cosine", **settings) == pytest.approx(0.55)
    assert lr_factor(1000, kind="cosine", **settings) == pytest.approx(0.1)
    assert lr_factor(700, kind="constant", **settings) == 1.0


def test_the_optimizer_is_fused_so_that_updates_can_be_left_out_on_the_device():
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], OptimizerConfig())
    assert optimizer.defaults["fused"] is True
