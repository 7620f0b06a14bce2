"""The callbacks of a session, joined to its run, data and tracker, and what of them a checkpoint keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from avlit.checkpoint_writer import CheckpointWriter
from avlit.checkpoints import Checkpoint, CheckpointState, load_state
from avlit.commands.clips import measure_lip_sync, write_clips
from avlit.commit import CheckpointError, step_dir
from avlit.config import Config
from avlit.durable import write_atomically
from avlit.module import AVModule
from avlit.ranks import gather, is_first
from avlit.reference import Standing
from avlit.runs import Run
from avlit.tracking import Tracker
from callbacks.adapters import Adapter
from callbacks.checkpointing import Checkpointing
from callbacks.ema import EMA
from callbacks.finite_guard import FiniteGuard, RollBack, is_sound
from callbacks.heldout import HeldoutLoss
from callbacks.samples import Samples
from callbacks.stopping import Stopping
from callbacks.training_log import TrainingLog
from data.account import Account
from data.datamodule import AVDataModule
from data.encode import Encoders

Lineage = tuple[tuple[str, int], ...]


class CallbackSet:
    """All callbacks of one session. lineage: (run id, step) of the checkpoints that the run's first weights come from.

    checkpoint: what the session goes on from; the callbacks then go on with what they had counted and measured.
    standing: where held-out losses stand against the recipe's reference, None where there is none.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        module: AVModule,
        *,
        datamodule: AVDataModule,
        encoders: Encoders,
        tracker: Tracker,
        lineage: Lineage,
        checkpoint: Checkpoint | None,
        standing: Standing | None = None,
    ):
        self.config, self.run, self.module, self.lineage = config, run, module, lineage
        self.datamodule, self.encoders, self.tracker = datamodule, encoders, tracker
        self.standing = standing
        subsets = list(datamodule.weights)
        train, retention = config.train, config.checkpoint
        self.ema = EMA(decay=config.ema.decay, every=config.ema.every)
        self.log = TrainingLog(
            tracker.log_metrics,
            every=train.log_every,
            subsets=subsets,
            tokens_per_sample=module.tokens_per_sample,
            waited_s=lambda: datamodule.wait_s,
            num_damaged=lambda: datamodule.damaged_count,
        )
        self.stopping = Stopping(self._save)
        self.heldout = HeldoutLoss(
            self._report_heldout,
            batches=lambda: datamodule.heldout_batches(
                config.validation.clips, config.data.batch_size // (train.accumulate * train.devices)
            ),
            every=config.validation.every,
            subsets=subsets,
            ema=self.ema,
            check=self.stopping.check,
            required=retention.best,
        )
        self.samples = Samples(
            self._write_samples,
            every=config.sample.every,
            ema=self.ema,
            written=self._written_samples,
            meet=self.stopping.meet,
        )
        self.saving = Checkpointing(
            CheckpointWriter(run.checkpoints_dir, keep=retention.keep, protect=self._protected_steps),
            every=retention.every,
            ema=self.ema,
            state=self._state,
            num_kept=retention.keep + bool(retention.best) + (config.train.on_nonfinite == "roll_back"),
        )
        self.guard = FiniteGuard(
            every=train.log_every,
            max_in_a_row=train.max_nonfinite,
            roll_back=RollBack(self.saving, self.ema) if train.on_nonfinite == "roll_back" else None,
            max_roll_backs=train.max_roll_backs,
        )
        parts, own = config.adapter_parts, config.own_modules
        adapter = Adapter(config.adapter, parts=parts, own_modules=own, report=tracker.log_metrics)
        self.adapter = [adapter] if config.adapter.is_on else []
        if checkpoint:
            kept: Any = checkpoint.state.extra
            self.ema.restore(checkpoint)
            self.log.restore(kept["log"])
            self.heldout.restore(kept["heldout"])
            self.guard.num_roll_backs = int(checkpoint.state.counters["roll_backs"])

    def in_order(self) -> list[pl.Callback]:
        """As Lightning calls them: the average is brought up to date first; saving comes before the slow sampling."""
        return [self.ema, self.log, self.guard, self.heldout, self.saving, self.samples, self.stopping, *self.adapter]

    def finish(self, trainer: pl.Trainer) -> None:
        """What comes after the last step, for a run that was stopped between the two."""
        self.module.to(trainer.strategy.root_device)
        self.ema.attach(self.module)
        self.saving.saved_step = self.module.start_step
        self.heldout.measure_if_due(trainer, self.module, self.module.start_step)
        self.samples.make_if_due(trainer, self.module, self.module.start_step)
        self.stopping.finish()

    def _report_heldout(self, metrics: dict[str, float], step: int) -> None:
        self.tracker.log_metrics(metrics, step)
        if self.standing and step < self.module.total_steps:  # at the end all is said, normal or not
            for line in self.standing.warnings(metrics, step):
                tqdm.write(line)

    def _save(self, trainer: pl.Trainer, module: AVModule, step: int) -> None:
        self.saving.save(trainer, module, step)

    def _state(self, step: int) -> CheckpointState:
        self.guard.name()  # now: a session that goes on from here does not know the samples of the steps before
        return CheckpointState(
            step=step,
            seed=self.config.seed,
            recipe=self.config.recipe,
            run=self.run.id,
            base_model=self.module.base_model,
            adapter=self.module.adapter,
            lineage=(*self.lineage, (self.run.id, step)),
            counters={
                "skipped": float(self.module.skipped),
                "skipped_in_a_row": float(self.module.skipped_in_a_row),
                "roll_backs": self.guard.num_roll_backs,
                "ema_updates": self.ema.num_updates,
            },
            extra={
                "log": self.log.state(),
                "heldout": self.heldout.state(),
                "data": gather(self.datamodule.state()),
            },
        )

    def _protected_steps(self, steps: list[int]) -> Iterable[int]:
        """Which of the saved steps are kept besides the newest: every n-th, the best one, the one to roll back to.

        The last also while `train.on_nonfinite` is stop: a run that stopped may be resumed with roll_back.
        """
        retention, history = self.config.checkpoint, self.heldout.history
        kept = {step for step in steps if retention.keep_every and step % retention.keep_every == 0}
        if retention.best:
            losses = {step: history.get(step, {}).get(retention.best, math.nan) for step in steps}
            measured = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
            kept |= set(sorted(measured, key=lambda step: (measured[step], step))[:1])
        sound = (step for step in steps if step % retention.every == 0 and self._is_sound(step))
        return kept | set(islice(sound, 1))

    def _is_sound(self, step: int) -> bool:
        try:
            state = load_state(step_dir(self.run.checkpoints_dir, step))
        except CheckpointError:  # its size is right and its content is not: nothing can go back to it
            return False
        return is_sound(state, every=self.config.checkpoint.every)

    def _samples_folder(self, step: int) -> Path:
        return self.run.samples_dir / f"step-{step:08d}"

    def _written_samples(self, step: int) -> dict[str, float] | None:
        if step > self.module.start_step:  # of a session that went further than its last save: made again
            return None
        return read_metrics(self._samples_folder(step) / "metrics.json")

    def _write_samples(self, step: int, is_last: bool) -> dict[str, float]:
        """Sample held-out clips; at the end measure lip sync on some. The metrics' file says that all is there."""
        settings, seed, check = self.config.sample, self.config.seed, self.stopping.check
        folder, encoders = self._samples_folder(step), self.encoders
        if clips := self.datamodule.heldout_samples(settings.count):
            paths = write_clips(
                self.module,
                clips,
                encoders=encoders,
                settings=settings,
                seed=seed,
                folder=folder if is_first() else None,
                on_step=check,
            )
            for path in paths:
                self.tracker.log_artifact(path, folder=f"samples/{folder.name}")
        metrics: dict[str, float] = {}
        if is_last and settings.sync_clips:
            measured = self.datamodule.heldout_samples(settings.sync_clips)
            metrics = measure_lip_sync(
                self.module, measured, encoders=encoders, settings=settings, seed=seed, on_step=check
            )
        if is_first():
            self.tracker.log_metrics(metrics, step)
            write_metrics(folder / "metrics.json", metrics)
        return metrics


def is_resumable(state: CheckpointState) -> bool:
    """True for a state that a session can go on from; CheckpointError says what it lacks."""
    kept: Any = state.extra
    try:
        _ = [Account(state) for state in kept["data"]]
        counts = [state.counters[name] for name in ("skipped", "skipped_in_a_row", "roll_backs", "ema_updates")]
        sums = [number for rows in kept["log"]["sums"].values() for pair in rows.values() for number in pair]
        measured = [number for metrics in kept["heldout"].values() for number in metrics.values()]
        steps = [int(step) for step in kept["heldout"]]
        if min([*counts, *steps, kept["log"]["key_hash"]]) < 0:
            raise ValueError("a count is negative")
        # They may be NaN: losses of updates that were left out, and of a model that diverged.
        if not all(isinstance(number, int | float) for number in (*sums, *measured)):
            raise TypeError("a sum of the log or a held-out loss is not a number")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"state.json is not of a run that can be resumed: {error!r}") from error
    return True


def write_metrics(path: Path, metrics: dict[str, float]) -> None:
    """Store metrics as JSON; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(metrics, indent=1) + "\n")


def read_metrics(path: Path) -> dict[str, float] | None:
    """What `write_metrics` stored, None where it did not come to that."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
