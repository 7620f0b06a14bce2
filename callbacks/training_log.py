"""Losses by modality, subset and noise level, learning rate and throughput, read from the device at log points only."""

import time
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from avlit.batch import AVBatch
from avlit.module import AVModule
from avlit.objectives import Losses

NOISE_BINS = 4
"""Noise levels are logged in quarters: 0 is the least noisy."""


class NonFiniteTrainingError(RuntimeError):
    """Too many updates in a row were left out because the loss or a gradient was not finite."""


class LossSums:
    """Running sums of per-sample losses on the device: one row for each subset, noise level and the whole."""

    def __init__(self, subsets: list[str], device: torch.device):
        self.names = ["", *(f"subset/{name}" for name in subsets), *(f"noise/{i}" for i in range(NOISE_BINS))]
        self.rows = {name: 1 + index for index, name in enumerate(subsets)}
        self.first_bin = 1 + len(subsets)
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, losses: Losses, subsets: tuple[str, ...]) -> None:
        """Add one micro-batch; nothing is read back."""
        rows = torch.tensor([self.rows[name] for name in subsets]).to(self.device, non_blocking=True)
        bins = self.first_bin + (losses.noise_level * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
        for part, loss in losses.parts.items():
            loss = loss.detach().float()
            if part not in self.sums:
                self.sums[part] = torch.zeros(2, len(self.names), device=self.device)
            pair = torch.stack([loss, torch.ones_like(loss)])  # [2, B]: loss and count
            self.sums[part][:, 0] += pair.sum(1)
            self.sums[part].index_add_(1, rows, pair).index_add_(1, bins, pair)

    def read(self, prefix: str) -> dict[str, float]:
        """Means since the last reading, as metric name -> value; the one synchronisation."""
        metrics: dict[str, float] = {}
        for part, sums in self.sums.items():
            totals, counts = sums.tolist()
            for name, total, count in zip(self.names, totals, counts, strict=True):
                if count:
                    metrics[f"{prefix}/{part}" + (f"/{name}" if name else "")] = total / count
        self.sums.clear()
        return metrics


class TrainingLog(pl.Callback):
    """Writes the training metrics every `every` steps and moves the progress bar.

    report: takes metrics and a step (the tracker's). tokens_per_sample: what one clip is to the model.
    waited_s: seconds the training loop has waited for data so far. max_nonfinite: stop after as many updates left
    out in a row.
    """

    def __init__(
        self,
        report: Callable[[dict[str, float], int], None],
        *,
        every: int,
        subsets: list[str],
        tokens_per_sample: int,
        waited_s: Callable[[], float],
        max_nonfinite: int,
        shows_progress: bool = True,
    ):
        self.report = report
        self.every = every
        self.subsets = subsets
        self.tokens_per_sample = tokens_per_sample
        self.waited_s = waited_s
        self.max_nonfinite = max_nonfinite
        self.shows_progress = shows_progress
        self.samples = 0
        self.keys: list[tuple[int, tuple[str, ...]]] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        self.sums = LossSums(self.subsets, module.device)
        self.skipped = 0.0
        self.bar = tqdm(
            total=module.total_steps,
            initial=module.start_step,
            desc="training",
            unit="step",
            disable=not (self.shows_progress and trainer.is_global_zero),
            dynamic_ncols=True,
            mininterval=0.5,
        )
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.samples, self.started, self.waited_before = 0, time.perf_counter(), self.waited_s()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule) and isinstance(outputs, dict) and isinstance(batch, AVBatch)
        self.sums.add(outputs["losses"], batch.subsets)
        self.samples += len(batch) * trainer.world_size
        self.keys.append((batch.step, batch.keys))
        if not module.has_stepped(trainer, batch_idx):
            return
        self.bar.update(1)
        step = module.steps_done(trainer)
        if step % self.every == 0 or step == module.total_steps:
            self._write(trainer, module, step)

    def _write(self, trainer: pl.Trainer, module: AVModule, step: int) -> None:
        metrics = self.sums.read("train/loss")  # waits for the device: the clock is read after it
        seconds, waited = time.perf_counter() - self.started, self.waited_s() - self.waited_before
        metrics |= {
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "throughput/samples_per_s": self.samples / seconds,
            "throughput/tokens_per_s": self.samples * self.tokens_per_sample / seconds,
            "throughput/data_wait_share": waited / seconds,
        }
        if module.grad_norm is not None:
            metrics["train/grad_norm"] = float(module.grad_norm)
        self._check_finite(module, step, metrics)
        if trainer.is_global_zero:
            self.report(metrics, step)
        shown = {name.removeprefix("train/loss/"): f"{metrics[name]:.3f}" for name in metrics if name.count("/") == 2}
        self.bar.set_postfix(shown | {"wait": f"{metrics['throughput/data_wait_share']:.1%}"}, refresh=False)
        self.keys.clear()
        self._restart_clock()

    def _check_finite(self, module: AVModule, step: int, metrics: dict[str, float]) -> None:
        skipped, in_a_row = float(module.skipped), float(module.skipped_in_a_row)
        metrics["train/skipped_updates"] = skipped
        if skipped > self.skipped:
            keys = ", ".join(key for _, names in self.keys for key in names)
            self.bar.write(
                f"{skipped - self.skipped:.0f} update(s) up to step {step} were left out: the loss or a gradient was "
                f"not finite. Weights are unchanged by them. Samples since the last log point: {keys[:2000]}"
            )
        self.skipped = skipped
        if in_a_row >= self.max_nonfinite:
            self.bar.close()
            raise NonFiniteTrainingError(
                f"the last {in_a_row:.0f} updates were not finite (train.max_nonfinite={self.max_nonfinite}); stopped "
                f"at step {step}. The last checkpoint holds finite weights: lower optimizer.lr or look at those samples"
            )

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.close()
