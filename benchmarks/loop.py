"""What the training loop itself costs over a hand-written loop: same model, same batches, paired in one run.

Both do the same work a step: the recipe's `step`, backward, clipping, fused AdamW, learning rate, EMA. The recipe run
adds Lightning, the non-finite guard, per-subset and per-noise loss sums, logging through the tracker's spool and the
progress bar. A model of almost no size is used, so that the loop and not the network is measured.
"""

import argparse
import contextlib
import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from avlit.batch import AVBatch
from avlit.config import OptimizerConfig
from avlit.module import AVModule, build_optimizer, lr_factor
from avlit.objectives import Losses, mean_squared_error
from avlit.randomness import Draws
from avlit.runs import create_run
from avlit.sampling import Latents
from avlit.tracking import Tracker
from avlit.tracking.tracker import delivery
from callbacks.ema import EMA
from callbacks.finite_guard import FiniteGuard
from callbacks.stopping import Stopping
from callbacks.training_log import TrainingLog

OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="linear", warmup=0.01, final=0.1)
EMA_DECAY = 0.999
WIDTH = 64


class SmallModule(AVModule):
    """A network with as many tensors as a tiny recipe (about 150) and next to no arithmetic."""

    def __init__(self, *, steps: int, depth: int = 75):
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(depth)]
        super().__init__(nn.Sequential(*layers), optimizer=OPTIMIZER, steps=steps, seed=0)

    def step(self, batch: AVBatch, draws: Draws) -> Losses:
        noise = draws.normal("noise", batch.text[:, 0])  # [B, D]
        loss = mean_squared_error(self.model(batch.text[:, 0]), noise)
        return Losses(parts={"video": loss}, noise_level=torch.from_numpy(draws.times()))

    def freeze(self) -> None:
        """Everything trains."""

    def load_released(self, folder: str) -> str:
        return ""

    @property
    def tokens_per_sample(self) -> int:
        return 1

    def sample(self, batch: AVBatch, **settings: object) -> Latents:
        return Latents(video=batch.video_latents)


def make_batches(steps: int) -> list[AVBatch]:
    """One batch of two clips, numbered for each step."""
    features = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    one = AVBatch(
        keys=("a", "b"),
        subsets=("basic_face", "basic_face"),
        captions=("", ""),
        step=0,
        slots=(0, 1),
        duration_s=1.0,
        text=features,
        text_lengths=(1, 1),
        video_latents=features,
    )
    return [replace(one, step=step) for step in range(steps)]


def loader_of(batches: list[AVBatch]) -> DataLoader:
    """The batches as they are, for Lightning (a bare list would be taken for a list of loaders)."""
    return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]


def hand_written(steps: int) -> float:
    """Seconds of a plain loop with the same arithmetic; nothing is logged."""
    module, batches = SmallModule(steps=steps), make_batches(steps)
    parameters = list(module.model.parameters())
    optimizer = build_optimizer(parameters, OPTIMIZER)
    average = [p.detach().clone() for p in parameters]
    began = time.perf_counter()
    for step, batch in enumerate(batches):
        loss = module.step(batch, Draws(0, batch.step, batch.slots)).total
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip)
        factor = lr_factor(step, kind="linear", steps=steps, warmup=0.01, final=0.1)
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * factor
        optimizer.step()
        with torch.no_grad():
            get_ema_multi_avg_fn(EMA_DECAY)(tuple(average), tuple(p.detach() for p in parameters), step)
    return time.perf_counter() - began


class _Clock(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.began


def recipe_loop(steps: int, folder: Path, *, every: int) -> float:
    """Seconds of the loop that `just train` runs, with logging every `every` steps, EMA, clipping and the guard."""
    run = create_run(folder, "bench")
    tracker = Tracker(run, uri=f"sqlite:///{folder}/mlflow.db", experiment="bench")
    for _ in range(300):  # MLflow's import in the sending process is over long before a real run's first log point
        if not delivery(run):
            break
        time.sleep(0.1)
    log = TrainingLog(
        tracker.log_metrics,
        every=every,
        subsets=["basic_face"],
        tokens_per_sample=1,
        waited_s=lambda: 0.0,
    )
    guard = FiniteGuard(every=every, max_in_a_row=10)
    stopping = Stopping(lambda trainer, module, step: None)
    clock = _Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[EMA(decay=EMA_DECAY), log, guard, stopping, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        trainer.fit(SmallModule(steps=steps), train_dataloaders=loader_of(make_batches(steps)))
    tracker.finish("finished")
    return clock.seconds


def main(words: list[str] | None = None) -> None:
    """Rounds of both in turn; the median of the differences, pair by pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", type=int, default=10, help="steps between log points")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            plain = hand_written(options.steps) / options.steps * 1e3
            ours = recipe_loop(options.steps, Path(folder), every=options.every) / options.steps * 1e3
            if number:  # the first round warms both up
                pairs.append((plain, ours))
    differences = [ours - plain for plain, ours in pairs]
    print(f"hand-written loop      {median(plain for plain, _ in pairs):.3f} ms a step")
    print(f"recipe's training loop {median(ours for _, ours in pairs):.3f} ms a step")
    print(
        f"its own cost           {median(differences):.3f} ms a step "
        f"(pairs from {min(differences):.3f} to {max(differences):.3f}; goal: at most 1)"
    )


if __name__ == "__main__":
    main()
