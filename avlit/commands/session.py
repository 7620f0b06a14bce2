"""One session of a run: from its config, and the checkpoint that it goes on from, to the end of training.

A run has one session, or one more for each time that it is resumed. `train`, `resume` and `curriculum` all end here.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avlit.commands.assembly import build_datamodule, build_encoders, build_module, shard_roots
from avlit.config import Config, from_yaml, recipe_folder, to_yaml
from avlit.provenance import Provenance, check_unchanged
from avlit.runs import Run, find_run, hold

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from avlit.checkpoints import Checkpoint
    from avlit.module import AVModule
    from data.datamodule import AVDataModule

RUN_VARIABLE = "AVLIT_RUN"
"""Lightning starts further processes by running the command again; this tells them which run they belong to."""

INTERRUPTED, STOPPED = 130, 143
"""Exit statuses. A scheduler's warning (SIGUSR1) ends a run as its SIGTERM does: saved, to be started again."""


@dataclass(frozen=True)
class Outcome:
    """How a session ended. exit_status: 0 at its end, 130 after a Ctrl-C, 143 where another signal stopped it."""

    run: Run
    metrics: dict[str, float]
    exit_status: int = 0


def join_session() -> int | None:
    """In a further process of a run, be one of its ranks and return the exit status; None in the first process.

    The status is 0 also where a signal ended the run: Lightning kills the first process when another one fails.
    """
    path = os.environ.get(RUN_VARIABLE)
    if path is None:
        return None
    run = find_run(Path(path).parent, path)
    config = from_yaml(run.read_config(), source=str(run.config_path))
    # It says nothing: all that it would say is said by the first.
    with redirect_stdout(StringIO()):
        _session(config, run, shard_roots(config), time.perf_counter(), is_first_process=False)
    return 0


def run_session(config: Config, run: Run, *, is_resumed: bool, allow_change: bool = False) -> Outcome:
    """Train `run` as its first process, from its newest valid checkpoint or from the beginning, to the end.

    is_resumed: the run was trained before; what it was made from is then compared, see `avlit.provenance`.
    """
    started = time.perf_counter()
    with hold(run):
        roots = shard_roots(config)  # first, so that the corpus is written while torch is imported
        run.update(status="running")
        os.environ[RUN_VARIABLE] = str(run.path)
        try:
            return _session(
                config, run, roots, started, is_first_process=True, is_resumed=is_resumed, allow_change=allow_change
            )
        except KeyboardInterrupt:
            run.update(status="stopped")
            raise
        except BaseException:
            run.update(status="failed")
            raise
        finally:
            del os.environ[RUN_VARIABLE]


def _session(
    config: Config,
    run: Run,
    roots: list[Path],
    started: float,
    *,
    is_first_process: bool,
    is_resumed: bool = True,
    allow_change: bool = False,
) -> Outcome:
    import torch

    from avlit.commands.callback_set import CallbackSet, write_metrics
    from avlit.sampling import build_scheduler
    from avlit.tracking import Tracker

    quieten_lightning()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    checkpoint = newest_checkpoint(run)
    start_step = checkpoint.step if checkpoint else 0
    encoders = build_encoders(config)
    # The account of damage is kept for all ranks together; the first goes on with it.
    counted: Any = checkpoint.state.extra["data"] if checkpoint and is_first_process else None
    datamodule = build_datamodule(config, roots, encoders, start_step=start_step, counted=counted)
    if is_first_process:
        settle_changes(config, run, datamodule, step=start_step, is_resumed=is_resumed, is_allowed=allow_change)
    module = build_module(config, start_step=start_step)
    build_scheduler(
        config.sample.scheduler, module.scheduler_settings, steps=config.sample.steps
    )  # not first at the end
    lineage = start_weights(module, config, run, checkpoint)
    tracker = Tracker(
        run,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        run_name=config.run_name,
        tags={"size": config.size, "data": datamodule.data_fingerprint, "lineage": str(list(lineage))},
        is_resumed=is_resumed,
        is_active=is_first_process,
    )
    tracker.log_config(to_yaml(config))
    callbacks = CallbackSet(
        config,
        run,
        module,
        datamodule=datamodule,
        encoders=encoders,
        tracker=tracker,
        lineage=lineage,
        checkpoint=checkpoint,
    )
    trainer = build_trainer(config, run, callbacks.in_order(), start_step=start_step)
    print(f"Ready after {time.perf_counter() - started:.1f} s; {describe(module)}")
    try:
        if start_step < config.train.steps:
            trainer.fit(module, datamodule=datamodule)
        else:
            module.to("cuda" if config.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
            callbacks.finish(trainer)
    except SystemExit as error:  # Lightning's answer to a second Ctrl-C: nothing is waited for
        tracker.finish("stopped", timeout_s=1)
        raise KeyboardInterrupt from error
    except BaseException:
        tracker.finish("failed")
        raise
    if (number := callbacks.stopping.stopped_by) is not None:
        tracker.finish("stopped")
        if is_first_process:
            run.update(status="stopped")
        print(
            f"Stopped by {number.name} after step {callbacks.saving.saved_step}, which is saved. "
            f"`just resume run={run.id}` goes on with it"
        )
        return Outcome(run, {}, exit_status=INTERRUPTED if number == signal.SIGINT else STOPPED)
    metrics = summarise(callbacks.heldout.history, callbacks.samples.last, run)
    if is_first_process:
        write_metrics(run.metrics_path, metrics)
        tracker.finish("finished")
        run.update(status="finished")  # last: whoever kills the run before finds something left to do
    return Outcome(run, metrics)


def build_trainer(config: Config, run: Run, callbacks: list[pl.Callback], *, start_step: int) -> pl.Trainer:
    """Lightning's trainer for the steps that are left; its own logging, saving and progress bar are off."""
    import lightning.pytorch as pl

    return pl.Trainer(
        accelerator=config.train.accelerator,
        devices=config.train.devices,
        strategy=config.train.strategy,
        precision="bf16-mixed" if config.train.precision == "bf16" else "32-true",
        max_steps=config.train.steps - start_step,
        max_epochs=-1,
        accumulate_grad_batches=config.train.accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.path,
    )


def newest_checkpoint(run: Run) -> Checkpoint | None:
    """What a session goes on from, None before the first save; says which newer ones are damaged.

    CheckpointError: there are checkpoints, and none that verifies.
    """
    from avlit.checkpoints import newest_valid
    from avlit.commands.callback_set import is_resumable
    from avlit.commit import CheckpointError, sweep

    sweep(run.checkpoints_dir)
    checkpoint, skipped = newest_valid(run.checkpoints_dir, accept=is_resumable)
    for reason in skipped:
        print(f"checkpoint left out: {reason}")
    if checkpoint is None and skipped:
        raise CheckpointError(
            f"run={run.id}: none of its {len(skipped)} checkpoints can be read; "
            f"remove {run.checkpoints_dir} to train it from the beginning"
        )
    return checkpoint


def settle_changes(
    config: Config, run: Run, datamodule: AVDataModule, *, step: int, is_resumed: bool, is_allowed: bool
) -> None:
    """Refuse or announce what a resumed run would do differently, and store what it is made from now."""
    from avlit.tracking import git_revision

    now = Provenance.now(
        to_yaml(config),
        recipe_folder=recipe_folder(config.recipe),
        revision=git_revision().revision,
        data={**datamodule.shards.identity, "fingerprint": datamodule.data_fingerprint},
    )
    before = Provenance.read(run.provenance_path, is_damage_allowed=is_allowed) if is_resumed else None
    for line in check_unchanged(before, now, run=run.id, is_allowed=is_allowed) if before else ():
        print(f"changed from step {step} on (allow_change=true): {line}")
    now.write(run.provenance_path)
    run.write_config(now.config)


def start_weights(
    module: AVModule, config: Config, run: Run, checkpoint: Checkpoint | None
) -> tuple[tuple[str, int], ...]:
    """Load released weights, then the run's own checkpoint or those of `init=`; freeze; say what came from where.

    Returns the lineage before this run: (run id, step) of the checkpoints that its first weights descend from.
    """
    from avlit.inherit import load_weights_into, resolve_weights

    if config.model.weights:
        print(f"model.weights: {module.load_released(config.model.weights)}")
    if checkpoint:
        module.freeze()
        module.resume(checkpoint)
        print(
            f"Goes on from step {checkpoint.step} of {config.train.steps} (a resume: weights, moments, average, "
            "schedule, data and random numbers as they were)"
        )
        return checkpoint.state.lineage[:-1]
    lineage: tuple[tuple[str, int], ...] = ()
    if config.init:
        # What it began with, if this is not the first session: a run named by `init=` may have moved on since.
        source = resolve_weights(run.record().init_checkpoint or config.init, runs_dir=Path(config.runs_dir))
        report = load_weights_into(module.model, source, ema=True, base_model=module.base_model)
        lineage = source.state.lineage
        run.update(init_run=source.state.run or None, init_checkpoint=str(source.path))
        print(f"init={config.init} (a new run from weights, not a resume): {report}")
    elif not config.model.weights:
        print("Starts from scratch: no `init=` and no `model.weights=` given.")
    module.freeze()
    frozen = [name for name, parameter in module.model.named_parameters() if not parameter.requires_grad]
    if frozen:
        print(f"{len(frozen)} parameters are frozen (e.g. {frozen[0]})")
    return lineage


def quieten_lightning() -> None:
    """Keep Lightning's advertisements and notes about its own parts, which are not used here, off the screen."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=r".*(isinstance\(treespec, LeafSpec\)|does not have many workers|LeafSpec).*"
    )


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
