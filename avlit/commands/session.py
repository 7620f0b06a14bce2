"""One session of a run: from its config, and the checkpoint that it goes on from, to the end of training.

A run has one session, or one more for each time that it is resumed. `train`, `resume` and `curriculum` all end here.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avlit.commands.assembly import build_datamodule, build_encoders, build_module, shard_roots
from avlit.commands.first_weights import newest_checkpoint, start_weights
from avlit.config import Config, ConfigError, from_yaml, recipe_folder, to_yaml
from avlit.errors import UserError
from avlit.launch import cluster_environment, connect, dismiss, find_launch, runs_told, tell
from avlit.provenance import Provenance, check_unchanged
from avlit.runs import Run, find_run, hold

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy

    from avlit.checkpoints import Checkpoint
    from avlit.module import AVModule
    from avlit.reference import Standing
    from data.datamodule import AVDataModule
    from data.encode import Encoders

RUN_VARIABLE = "AVLIT_RUN"
"""Lightning starts further processes by running the command again; this tells them which run they belong to."""

LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
"""Lightning sets these to start further processes and leaves them set; it starts none where it finds them."""

INTERRUPTED, STOPPED = 130, 143
"""Exit statuses. A scheduler's warning (SIGUSR1) ends a run as its SIGTERM does: saved, to be started again."""


@dataclass(frozen=True)
class Outcome:
    """How a session ended. exit_status: 0 at its end, 130 after a Ctrl-C, 143 where another signal stopped it."""

    run: Run
    metrics: dict[str, float]
    exit_status: int = 0


@dataclass(frozen=True)
class Prepared:
    """A session before anything of the run has changed: what is wrong with it has been refused by now.

    checkpoint: what it goes on from. now: what the run is made from. changes: lines on what differs from before.
    """

    config: Config
    run: Run
    module: AVModule
    datamodule: AVDataModule
    encoders: Encoders
    trainer: pl.Trainer
    checkpoint: Checkpoint | None
    lineage: tuple[tuple[str, int], ...]
    now: Provenance
    changes: tuple[str, ...]

    @property
    def start_step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def join_session() -> int | None:
    """In a further process of a run, be one of its ranks and return the exit status; None in the first process.

    The status is 0 also where a signal, or an error of the user's, ended the run: Lightning kills the first process,
    which may still have something to say, when another one fails.
    """
    if (launch := find_launch()) is not None:
        connect(launch)
        if launch.rank == 0:
            return None
        for path in runs_told():
            _join(path)
        dismiss()
        return 0
    path = os.environ.get(RUN_VARIABLE)
    if path is None:
        return None
    try:
        _join(Path(path))
    except UserError as error:
        print(error, file=sys.stderr)
    return 0


def _join(path: Path) -> None:
    """Be a rank, not the first, of the session of the run in `path` that begins now."""
    run = find_run(path.parent, path)
    config = from_yaml(run.read_config(), source=str(run.config_path))
    with redirect_stdout(StringIO()):  # it says nothing but errors: all else that it would say is said by the first
        _train(_prepare(config, run, shard_roots(config), is_resumed=False), is_first_process=False)


def run_session(config: Config, run: Run, *, is_resumed: bool, allow_change: bool = False) -> Outcome:
    """Train `run` as its first process, from its newest valid checkpoint or from the beginning, to the end.

    is_resumed: the run was trained before; what it was made from is then compared, see `avlit.provenance`, and a
    refusal leaves the run as it was.
    """
    began = time.perf_counter()
    with hold(run):
        roots = shard_roots(config)  # first, so that the corpus is written while torch is imported
        status = run.record().status if is_resumed else "failed"
        launched = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
        os.environ[RUN_VARIABLE] = str(run.path)
        launch = find_launch()
        try:
            prepared = _prepare(config, run, roots, is_resumed=is_resumed, allow_change=allow_change)
            status = "failed"
            run.update(status="running")
            prepared.now.write(run.provenance_path)
            run.write_config(prepared.now.config)
            if launch is not None:
                tell(str(run.path))
            print(f"Ready after {time.perf_counter() - began:.1f} s; {describe(prepared.module)}")
            outcome = _train(prepared, is_first_process=True, is_resumed=is_resumed)
            status = "stopped" if outcome.exit_status else "finished"
            return outcome
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            run.update(status=status)
            del os.environ[RUN_VARIABLE]
            if launch is None:  # else they go on together to the next session
                leave_ranks(launched)


def _prepare(config: Config, run: Run, roots: list[Path], *, is_resumed: bool, allow_change: bool = False) -> Prepared:
    import torch

    from avlit.sampling import build_scheduler
    from avlit.strategies import lower_frozen, plan_strategy

    if config.train.threads:
        torch.set_num_threads(config.train.threads)
        os.environ["OMP_NUM_THREADS"] = str(config.train.threads)  # Lightning would set both, where there are ranks
    checkpoint = newest_checkpoint(run)
    start_step = checkpoint.step if checkpoint else 0
    if is_resumed and checkpoint is None:
        print("It had saved nothing yet: begins again at step 0, in the same run")
    plan = plan_strategy(config)
    trainer = build_trainer(config, run, strategy=plan.lightning, start_step=start_step)
    encoders = build_encoders(config)
    counted: Any = checkpoint.state.extra["data"] if checkpoint else ()
    datamodule = build_datamodule(config, roots, encoders, start_step=start_step, counted=counted)
    now = made_from(config, datamodule)
    before = Provenance.read(run.provenance_path, is_damage_allowed=allow_change) if is_resumed else None
    changes = check_unchanged(before, now, run=run.id, is_allowed=allow_change) if before else []
    for line in changes:
        print(f"changed from step {start_step} on (allow_change=true): {line}")
    module = build_module(config, start_step=start_step)
    plan.apply(module)
    module.check_encoders(encoders)
    # An unsuited sampler must not surface at the end.
    build_scheduler(config.sample.scheduler, module.scheduler_settings, steps=config.sample.steps)
    lineage = start_weights(module, config, run, checkpoint)
    if config.precision == "bf16":
        lower_frozen(module)
    return Prepared(
        config=config,
        run=run,
        module=module,
        datamodule=datamodule,
        encoders=encoders,
        trainer=trainer,
        checkpoint=checkpoint,
        lineage=lineage,
        now=now,
        changes=tuple(changes),
    )


def _train(prepared: Prepared, *, is_first_process: bool, is_resumed: bool = False) -> Outcome:
    from avlit.commands.callback_set import CallbackSet, write_metrics
    from avlit.reference import standing
    from avlit.tracking import Tracker, store_uri

    config, run, module, trainer = prepared.config, prepared.run, prepared.module, prepared.trainer
    stands = standing(run)
    tracker = Tracker(
        run,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        run_name=config.run_name,
        tags={
            "size": config.size,
            "data": prepared.datamodule.data_fingerprint,
            "lineage": str(list(prepared.lineage)),
        },
        is_resumed=is_resumed,
        redone_from=prepared.start_step if prepared.changes else None,
        is_active=is_first_process,
    )
    status, patience_s = "failed", 30.0
    try:
        tracker.log_config(prepared.now.config)
        callbacks = CallbackSet(
            config,
            run,
            module,
            datamodule=prepared.datamodule,
            encoders=prepared.encoders,
            tracker=tracker,
            lineage=prepared.lineage,
            checkpoint=prepared.checkpoint,
            standing=stands,
        )
        trainer.callbacks.extend(callbacks.in_order())  # pyright: ignore[reportAttributeAccessIssue] a list, at runtime
        with callbacks.stopping.handling_signals():
            if prepared.start_step < config.train.steps:
                trainer.fit(module, datamodule=prepared.datamodule)
            else:
                callbacks.finish(trainer)
        number = callbacks.stopping.stopped_by
        status = "finished" if number is None else "stopped"
    except (SystemExit, KeyboardInterrupt) as error:  # the former is Lightning's answer to a second Ctrl-C
        status, patience_s = "stopped", 1.0
        raise KeyboardInterrupt from error
    except BaseException:
        if is_first_process:
            run.update(status="failed")  # before the tracker is waited for, which may take long
        raise
    finally:
        tracker.finish(status, timeout_s=patience_s)
    if number is not None:
        saved = (
            f"after step {callbacks.saving.saved_step}, which is saved" if callbacks.saving.saved_step else "at step 0"
        )
        print(f"Stopped by {number.name} {saved}. `just resume run={run.id}` goes on with it")
        return Outcome(run, {}, exit_status=INTERRUPTED if number == signal.SIGINT else STOPPED)
    metrics = summarise(
        callbacks.heldout.history,
        callbacks.samples.last,
        run,
        store=store_uri(config.tracking.uri),
        stands=stands,
    )
    if is_first_process:
        write_metrics(run.metrics_path, metrics)
    return Outcome(run, metrics)


def leave_ranks(launched: dict[str, str | None]) -> None:
    """Part from the session's ranks, so that the process's next session starts its own; launched: variables before."""
    import torch.distributed as dist

    from avlit.ranks import is_distributed

    for name, value in launched.items():
        os.environ.pop(name, None)
        if value is not None:  # from whoever started this process
            os.environ[name] = value
    if is_distributed():
        dist.destroy_process_group()


def build_trainer(config: Config, run: Run, *, strategy: Strategy | str, start_step: int) -> pl.Trainer:
    """Lightning's trainer for the steps that are left; its own logging, saving and progress bar are off.

    ConfigError: this machine does not have what the config asks for.
    """
    import lightning.pytorch as pl
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    quieten_lightning()  # after the import, which makes it talk
    launch = find_launch()
    try:
        trainer = pl.Trainer(
            accelerator=config.train.accelerator,
            devices=launch.local_size if launch else config.train.devices,
            num_nodes=launch.nodes if launch else 1,
            plugins=[cluster_environment(launch)],
            strategy=strategy,
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
            max_steps=config.train.steps - start_step,
            max_epochs=-1,
            accumulate_grad_batches=config.train.accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run.path,
        )
        # It would tell all ranks of a signal before every micro-batch, and wait for the device: `Stopping` does that.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        return trainer
    except MisconfigurationException as error:
        raise ConfigError(
            f"train.accelerator={config.train.accelerator} train.devices={config.train.devices} "
            f"strategy={config.strategy.name}: not possible on this machine: {error}"
        ) from error


def made_from(config: Config, datamodule: AVDataModule) -> Provenance:
    """What a run of this config is made from now."""
    from avlit.tracking import git_revision

    return Provenance.now(
        to_yaml(config),
        recipe_folder=recipe_folder(config.recipe),
        revision=git_revision().revision,
        data={**datamodule.shards.identity, "fingerprint": datamodule.data_fingerprint},
    )


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


def summarise(
    history: dict[int, dict[str, float]],
    sampled: dict[str, float],
    run: Run,
    *,
    store: str,
    stands: Standing | None = None,
) -> dict[str, float]:
    """The run's last metrics, printed with the first held-out loss beside the last, and with what is normal."""
    from avlit.tracking import OFFLINE

    metrics = dict(sampled)
    if history:
        first, last = history[min(history)], history[max(history)]
        metrics |= last
        for name in sorted(last):
            if name.count("/") == 2 and first.get(name):
                change = last[name] / first[name] - 1
                print(f"{name}: {first[name]:.4f} before the first step, {last[name]:.4f} at the end ({change:+.0%})")
        for line in stands.lines(last, max(history)) if stands else ():
            print(line)
    for name, value in sorted(sampled.items()):
        print(f"{name}: {value:.3f}")
    curves = f"points of the curves in {run.spool_dir}" if store == OFFLINE else "`just ui` shows the curves"
    print(f"Checkpoint in {run.checkpoints_dir}, clips in {run.samples_dir}; {curves}")
    return metrics
