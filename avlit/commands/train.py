"""`just train`: one recipe from its config to a trained, tracked, sampled run."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from avlit.commands.assembly import build_datamodule, build_encoders, build_module, shard_roots
from avlit.config import Config, load_config, to_yaml
from avlit.runs import Run, create_run, find_run, hold

if TYPE_CHECKING:
    from avlit.module import AVModule

RUN_VARIABLE = "AVLIT_RUN"
"""Lightning starts further processes by running the command again; this tells them which run they belong to."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended. exit_status: 128 + its number where a signal ended the run, else 0."""

    run: Run
    metrics: dict[str, float]
    exit_status: int = 0


def main(words: Sequence[str]) -> int:
    """Train the recipe that the words name; see `just config recipe=…` for all keys."""
    return train(load_config(words)).exit_status


def train(config: Config, *, parent: str | None = None) -> Outcome:
    """Train one stage in a run folder of its own. parent: id of the run that this one is a stage of."""
    started = time.perf_counter()
    roots = shard_roots(config)  # first, so that the corpus is written while torch is imported
    is_first_process = RUN_VARIABLE not in os.environ
    if is_first_process:
        run = create_run(Path(config.runs_dir), config.recipe, parent=parent)
        run.write_config(to_yaml(config))
        os.environ[RUN_VARIABLE] = str(run.path)
        print(f"{config.recipe}: {config.about} Size {config.size}, seed {config.seed}.\nRun {run.id} in {run.path}")
    else:
        run = find_run(Path(config.runs_dir), os.environ[RUN_VARIABLE])
    try:
        # Further processes of the run say nothing: all that they would say is said by the first.
        with hold(run) if is_first_process else redirect_stdout(StringIO()):
            return _train(config, run, roots, started, is_first_process=is_first_process)
    except BaseException:
        if is_first_process:
            run.update(status="failed")
        raise
    finally:
        if is_first_process:
            del os.environ[RUN_VARIABLE]


def _train(config: Config, run: Run, roots: list[Path], started: float, *, is_first_process: bool) -> Outcome:
    import lightning.pytorch as pl
    import torch

    from avlit.checkpoints import CheckpointState, CheckpointWriter
    from avlit.commands.clips import measure_lip_sync, write_clips
    from avlit.sampling import build_scheduler
    from avlit.tracking import Tracker, config_hash
    from callbacks.checkpointing import Checkpointing
    from callbacks.ema import EMA
    from callbacks.heldout import HeldoutLoss
    from callbacks.samples import Samples
    from callbacks.training_log import TrainingLog

    quieten_lightning()
    build_scheduler(config.sample.scheduler, {}, steps=config.sample.steps)  # a wrong name must not surface at the end
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    encoders = build_encoders(config)
    module = build_module(config)
    lineage = start_weights(module, config, run)
    datamodule = build_datamodule(config, roots, encoders)
    subsets = list(datamodule.weights)
    tracker = Tracker(
        run,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        run_name=config.run_name,
        tags={"size": config.size, "data": datamodule.data_fingerprint, "lineage": str(list(lineage))},
        is_active=is_first_process,
    )
    tracker.log_config(to_yaml(config))

    ema = EMA(decay=config.ema.decay, every=config.ema.every)
    heldout = HeldoutLoss(
        tracker.log_metrics,
        batches=lambda: datamodule.heldout_batches(config.validation.clips, config.data.batch_size),
        every=config.validation.every,
        subsets=subsets,
        ema=ema,
    )

    def write_samples(step: int, is_last: bool) -> dict[str, float]:
        folder = run.samples_dir / f"step-{step:08d}"
        if clips := datamodule.heldout_samples(config.sample.count):
            paths = write_clips(
                module, clips, codec=encoders.video, settings=config.sample, seed=config.seed, folder=folder
            )
            for path in paths:
                tracker.log_artifact(path, folder=f"samples/{folder.name}")
        if not is_last or not config.sample.sync_clips:
            return {}
        measured = datamodule.heldout_samples(config.sample.sync_clips)
        return measure_lip_sync(module, measured, codec=encoders.video, settings=config.sample, seed=config.seed)

    def checkpoint_state(step: int) -> CheckpointState:
        return CheckpointState(
            step=step,
            position=step,
            seed=config.seed,
            recipe=config.recipe,
            run=run.id,
            config_hash=config_hash(to_yaml(config)),
            data_hash=datamodule.data_fingerprint,
            base_model=module.base_model,
            lineage=(*lineage, (run.id, step)),
            counters={"skipped": float(module.skipped), "ema_updates": ema.num_updates},
        )

    samples = Samples(write_samples, every=config.sample.every, ema=ema, report=tracker.log_metrics)
    saving = Checkpointing(
        CheckpointWriter(run.checkpoints_dir, keep=config.checkpoint.keep),
        every=config.checkpoint.every,
        ema=ema,
        state=checkpoint_state,
        keep=config.checkpoint.keep,
    )
    log = TrainingLog(
        tracker.log_metrics,
        every=config.train.log_every,
        subsets=subsets,
        tokens_per_sample=module.tokens_per_sample,
        waited_s=lambda: datamodule.wait_s,
        max_nonfinite=config.train.max_nonfinite,
    )
    trainer = pl.Trainer(
        accelerator=config.train.accelerator,
        devices=config.train.devices,
        strategy=config.train.strategy,
        precision="bf16-mixed" if config.train.precision == "bf16" else "32-true",
        max_steps=config.train.steps,
        max_epochs=-1,
        accumulate_grad_batches=config.train.accumulate,
        # The average is brought up to date first; a checkpoint is saved before the slow sampling.
        callbacks=[ema, log, heldout, saving, samples],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.path,
    )
    print(f"Ready after {time.perf_counter() - started:.1f} s; {describe(module)}")
    try:
        trainer.fit(module, datamodule=datamodule)
    except BaseException:
        tracker.finish("failed")
        raise
    if saving.stopped_by is not None:
        tracker.finish("stopped")
        if is_first_process:
            run.update(status="stopped")
        print(
            f"Stopped by {saving.stopped_by.name} after step {saving.saved_step}, which is saved: "
            f"`init={run.id}` starts another run from its weights"
        )
        return Outcome(run, {}, exit_status=128 + saving.stopped_by)
    tracker.finish("finished")
    if is_first_process:
        run.update(status="finished")
    metrics = summarise(heldout.history, samples.last, run)
    return Outcome(run, metrics)


def quieten_lightning() -> None:
    """Keep Lightning's advertisements and notes about its own parts, which are not used here, off the screen."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=r".*(isinstance\(treespec, LeafSpec\)|does not have many workers|LeafSpec).*"
    )


def start_weights(module: AVModule, config: Config, run: Run) -> tuple[tuple[str, int], ...]:
    """Load released weights and another run's, freeze, and say what came from where; returns the lineage of `init`."""
    from avlit.inherit import load_weights_into, resolve_weights

    lineage: tuple[tuple[str, int], ...] = ()
    if config.model.weights:
        print(f"model.weights: {module.load_released(config.model.weights)}")
    if config.init:
        checkpoint = resolve_weights(config.init, runs_dir=Path(config.runs_dir))
        report = load_weights_into(module.model, checkpoint, ema=True, base_model=module.base_model)
        lineage = checkpoint.state.lineage
        run.update(init_run=checkpoint.state.run or None, init_checkpoint=str(checkpoint.path))
        print(f"init={config.init} (a new run from weights, not a resume): {report}")
    elif not config.model.weights:
        print("Starts from scratch: no `init=` and no `model.weights=` given.")
    module.freeze()
    frozen = [name for name, parameter in module.model.named_parameters() if not parameter.requires_grad]
    if frozen:
        print(f"{len(frozen)} parameters are frozen (e.g. {frozen[0]})")
    return lineage


def describe(module: AVModule) -> str:
    """Sizes of the model in words."""
    total = sum(parameter.numel() for parameter in module.model.parameters())
    trained = sum(parameter.numel() for parameter in module.trained_parameters.values())
    return f"{total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained, {module.tokens_per_sample} tokens a clip."


def summarise(history: dict[int, dict[str, float]], sampled: dict[str, float], run: Run) -> dict[str, float]:
    """The run's last metrics, printed with the first held-out loss beside the last."""
    metrics = dict(sampled)
    if history:
        first, last = history[min(history)], history[max(history)]
        metrics |= last
        for name in sorted(last):
            if name.count("/") == 2:
                fall = 1 - last[name] / first[name]
                print(f"{name}: {first[name]:.4f} before the first step, {last[name]:.4f} at the end ({-fall:+.0%})")
    for name, value in sorted(sampled.items()):
        print(f"{name}: {value:.3f}")
    print(f"Checkpoint in {run.checkpoints_dir}, clips in {run.samples_dir}; `just ui` shows the curves")
    return metrics
