"""Losses by modality, subset and noise level, learning rate and throughput, read from the device at log points only."""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from avlit.batch import AVBatch
from avlit.module import AVModule
from avlit.objectives import Losses
from avlit.ranks import gather, is_distributed

NOISE_BINS = 4
"""Noise levels are logged in quarters: 0 is the least noisy."""

Totals = dict[str, dict[str, tuple[float, float]]]
"""Part of the loss -> row (a subset, a noise level, "" for all) -> sum and count."""

MEASURE = "measure/"
"""Before the names of what is logged and is no part of the loss."""


class LossSums:
    """Running sums of per-sample losses on the device: a row for each subset, task, noise level and the whole.

    tasks: the names that `Losses.tasks` can have.
    """

    def __init__(self, subsets: list[str], device: torch.device, *, tasks: Sequence[str] = ()):
        groups = [*(f"subset/{name}" for name in subsets), *(f"task/{name}" for name in tasks)]
        self.names = ["", *groups, *(f"noise/{i}" for i in range(NOISE_BINS))]
        self.rows = {name: 1 + index for index, name in enumerate(groups)}
        self.first_bin = 1 + len(groups)
        self.device = device
        self.sums: dict[str, Tensor] = {}  # of each part of the loss, [2, rows]: sum and count

    def add(self, losses: Losses, subsets: tuple[str, ...]) -> None:
        """Add one micro-batch; nothing is read back."""
        groups = [[self.rows[f"subset/{name}"] for name in subsets]]
        if losses.tasks:
            groups.append([self.rows[f"task/{name}"] for name in losses.tasks])
        rows = torch.tensor(groups).to(self.device, non_blocking=True)  # [1 or 2, B]
        bins = self.first_bin + (losses.noise_level * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
        for part, loss in (losses.parts | {f"{MEASURE}{name}": each for name, each in losses.measures.items()}).items():
            loss = loss.detach().float()
            if part not in self.sums:
                self.sums[part] = torch.zeros(2, len(self.names), device=self.device)
            count = torch.ones_like(loss)
            if part in losses.applies:
                count = torch.tensor(losses.applies[part], dtype=loss.dtype).to(self.device, non_blocking=True)
            pair = torch.stack([loss, count])  # [2, B]
            self.sums[part][:, 0] += pair.sum(1)
            for row in (*rows, bins):
                self.sums[part].index_add_(1, row, pair)

    def take(self, other: "LossSums") -> None:
        """Add what another has counted, and empty it."""
        for part, sums in other.sums.items():
            self.sums[part] = self.sums[part].add_(sums) if part in self.sums else sums
        other.sums = {}

    def totals(self, *, over_ranks: bool) -> Totals:
        """Sum and count of each part and row on the host; the one synchronisation.

        over_ranks: of all ranks, and called on all of them.
        """
        tables = {part: list(zip(*sums.tolist(), strict=True)) for part, sums in self.sums.items()}
        totals = {part: dict(zip(self.names, table, strict=True)) for part, table in tables.items()}
        if not (over_ranks and is_distributed()):
            return totals
        joined: Totals = {}
        for rank in gather(totals):  # one may not have met all parts
            for part, rows in rank.items():
                before = joined.setdefault(part, dict.fromkeys(rows, (0.0, 0.0)))
                joined[part] = {name: (before[name][0] + sum_, before[name][1] + n) for name, (sum_, n) in rows.items()}
        return joined

    def restore(self, totals: Totals) -> None:
        """Go on from what `totals` gave; rows that there are no more are dropped."""
        for part, rows in totals.items():
            table = [rows.get(name, (0.0, 0.0)) for name in self.names]
            self.sums[part] = torch.tensor(table, device=self.device).T.contiguous()

    def read(self, prefix: str, *, over_ranks: bool = False) -> dict[str, float]:
        """Means since the last reading: `PREFIX/loss/PART`, `PREFIX/MEASURE`, and either by row, name -> value."""
        metrics: dict[str, float] = {}
        for part, rows in self.totals(over_ranks=over_ranks).items():
            of = part.removeprefix(MEASURE) if part.startswith(MEASURE) else f"loss/{part}"
            for name, (total, count) in rows.items():
                if count:
                    metrics[f"{prefix}/{of}" + (f"/{name}" if name else "")] = total / count
        self.sums.clear()
        return metrics


class TrainingLog(pl.Callback):
    """Writes the training metrics every `every` steps and moves the progress bar.

    report: takes metrics and a step (the tracker's). tokens_per_sample: what one clip is to the model.
    waited_s: seconds the training loop has waited for data so far. num_damaged: samples replaced so far.
    """

    def __init__(
        self,
        report: Callable[[dict[str, float], int], None],
        *,
        every: int,
        subsets: list[str],
        tokens_per_sample: int,
        waited_s: Callable[[], float],
        num_damaged: Callable[[], int] = lambda: 0,
        shows_progress: bool = True,
    ):
        self.report = report
        self.every = every
        self.subsets = subsets
        self.tokens_per_sample = tokens_per_sample
        self.waited_s = waited_s
        self.num_damaged = num_damaged
        self.shows_progress = shows_progress
        self.num_samples = 0
        self.key_hash = self.key_hash_of_step = 0
        self.restored: Mapping[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What the next log point needs of the steps before: their losses and keys. Called on all ranks."""
        return {"sums": self.sums.totals(over_ranks=True), "key_hash": self._key_hash_of_all_ranks()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave, before training starts."""
        self.restored = state

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        self.sums, self.sums_of_step = (LossSums(self.subsets, module.device, tasks=module.tasks) for _ in range(2))
        if self.restored and trainer.is_global_zero:  # it is the sum over all ranks
            self.sums.restore(self.restored["sums"])
            self.key_hash = self.restored["key_hash"]
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
        self.num_samples, self.started, self.waited_before = 0, time.perf_counter(), self.waited_s()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule) and isinstance(outputs, dict) and isinstance(batch, AVBatch)
        # Counted by step: a run that breaks off between two micro-batches is saved as it was after the last step.
        self.sums_of_step.add(outputs["losses"], batch.subsets)
        for slot, key in zip(batch.slots, batch.keys, strict=True):
            self.key_hash_of_step += zlib.crc32(f"{batch.step}|{slot}|{key}".encode())
        self.num_samples += len(batch) * trainer.world_size
        if not module.has_stepped(trainer, batch_idx):
            return
        self.sums.take(self.sums_of_step)
        self.key_hash, self.key_hash_of_step = self.key_hash + self.key_hash_of_step, 0
        self.bar.update(1)
        step = module.steps_done(trainer)
        if step % self.every == 0 or step == module.total_steps:
            self._write(trainer, module, step)

    def _write(self, trainer: pl.Trainer, module: AVModule, step: int) -> None:
        metrics = self.sums.read("train", over_ranks=True)  # waits for the device: the clock is read after it
        seconds, waited = time.perf_counter() - self.started, self.waited_s() - self.waited_before
        metrics |= {
            "train/lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "train/skipped_updates": float(module.skipped),
            "data/key_hash": float(self._key_hash_of_all_ranks()),
            "data/damaged": float(self.num_damaged()),
            "throughput/samples_per_s": self.num_samples / seconds,
            "throughput/tokens_per_s": self.num_samples * self.tokens_per_sample / seconds,
            "throughput/data_wait_share": waited / seconds,
        }
        if module.grad_norm is not None:
            metrics["train/grad_norm"] = float(module.grad_norm)
        if trainer.is_global_zero:
            self.report(metrics, step)
        shown = {name.removeprefix("train/loss/"): f"{metrics[name]:.3f}" for name in metrics if name.count("/") == 2}
        self.bar.set_postfix(shown | {"wait": f"{metrics['throughput/data_wait_share']:.1%}"}, refresh=False)
        self.key_hash = 0
        self._restart_clock()

    def _key_hash_of_all_ranks(self) -> int:
        """32 bits that stand for which sample was in which slot of which step since the last log point.

        A sum, so that it is the same however slots fall to ranks and micro-batches.
        """
        return sum(gather(self.key_hash)) % 2**32

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()
