"""The evaluation of one checkpoint of a run: held-out clips sampled, measured and logged to the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from avlit.checkpoints import Checkpoint
from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
from avlit.commands.clips import SAMPLING_BATCH, sample_clips
from avlit.commands.generation import load_trained
from avlit.commands.measured_clips import of_heldout
from avlit.commands.measuring import corpus_tools, device, keep, opened, progress
from avlit.commit import MANIFEST_NAME
from avlit.config import Config
from avlit.evaluation.published import published_numbers
from avlit.evaluation.readings import Readings, meter_ids
from avlit.evaluation.report import FOLDER, TABLE, Report
from avlit.metrics.metric import Meter
from avlit.metrics.registry import chosen, meters
from avlit.runs import Run, RunBusyError, hold
from avlit.tracking import Tracker
from avlit.tracking.history import read_end, read_session, read_tags
from data.datamodule import HeldoutClip


class RunEvaluation:
    """Samples and measures held-out clips of one checkpoint; what was measured before is not sampled again."""

    def __init__(
        self,
        run: Run,
        config: Config,
        checkpoint: Checkpoint,
        *,
        names: Sequence[str],
        is_first_given: bool,
        weights: Mapping[str, Path],
    ) -> None:
        on = "cpu" if config.train.accelerator == "cpu" else device()
        judges = Path(config.data.cache_dir) if config.data.root is None else None
        self.tools = corpus_tools(weights, device=on, judges=judges)
        self.metrics = chosen(names, self.tools)
        self.run, self.config, self.checkpoint, self.is_first_given = run, config, checkpoint, is_first_given
        self.encoders = build_encoders(config)
        self.data = build_datamodule(config, shard_roots(config), self.encoders)
        settings = {
            "checkpoint": str(checkpoint.path),
            "weights": checkpoint_identity(checkpoint),
            "sample": {name: getattr(config.sample, name) for name in config.sample.of_one_clip},
            "seed": config.seed,
            "first_frame": is_first_given,
            "data": self.data.data_fingerprint,
            "subsets": self.data.weights,
        }
        self.readings = Readings.open(run.path / FOLDER, settings)

    def measure(self, *, num_clips: int, place: str) -> Report:
        """Measure what is left, and report. place: what the names of logged metrics begin with."""
        ids = meter_ids(meters(self.metrics), self.tools)
        clips = self.data.heldout_samples(num_clips)
        groups = [range(at, min(at + SAMPLING_BATCH, len(clips))) for at in range(0, len(clips), SAMPLING_BATCH)]
        left = [group for group in groups if any(self.readings.lacks(number, ids) for number in group)]
        if left:
            self._measure_groups(clips, left, ids)
        paper = self.config.recipe.partition("_")[0]
        note = (
            f"{len(clips)} held-out clips, sampled from {self.run.id} at step {self.checkpoint.step} with "
            f"{self.config.sample.steps} steps and seed {self.config.seed}, "
            f"{'the first frame given' if self.is_first_given else 'no frame given'}. 95 %: bootstrap over clips."
        )
        sampling = {f"sample.{name}": str(getattr(self.config.sample, name)) for name in self.config.sample.of_one_clip}
        first_frame = "given" if self.is_first_given else "not given"
        return Report.of(
            self.metrics,
            self.readings,
            ids=ids,
            count=len(clips),
            published=published_numbers(paper),
            note=note,
            place=place,
            made_with={"clips": str(len(clips)), **sampling, "first frame": first_frame},
        )

    def _measure_groups(self, clips: list[HeldoutClip], groups: Sequence[range], ids: Mapping[str, Meter]) -> None:
        module = load_trained(self.config, self.checkpoint)
        shapes = [len({clips[number].annotation.shape for number in group}) for group in groups]
        measures = opened(ids, self.tools, needed=set().union(*(self._lacking(group, ids) for group in groups)))
        total = sum(count * self.config.sample.steps for count in shapes) + sum(map(len, groups))
        with progress(total) as bar:

            def on_step() -> None:
                bar.update()

            for group in groups:
                made = sample_clips(
                    module,
                    [clips[number] for number in group],
                    encoders=self.encoders,
                    settings=self.config.sample,
                    seed=self.config.seed + group.start,
                    gives_first_frame=self.is_first_given,
                    on_step=on_step,
                )
                for number, each in zip(group, made, strict=True):
                    shown, true = of_heldout(
                        clips[number], each, encoders=self.encoders, is_first_given=self.is_first_given
                    )
                    keep(self.readings, number, shown, true, ids=ids, measures=measures)
                    bar.update()

    def _lacking(self, group: range, ids: Mapping[str, Meter]) -> set[str]:
        return {name for number in group for name in self.readings.lacks(number, ids)}


def log(run: Run, report: Report, readings: Readings, *, step: int) -> None:
    """Send the values to the run's own MLflow run, as `eval/NAME`; of other data as `eval/DATA/NAME`."""
    session = read_session(run)
    if session is None:
        print("Not logged: the run was never tracked")
        return
    try:
        with hold(run):
            status = run.record().status
            tags, ended_ms = read_tags(run), read_end(run)
            tracker = Tracker(
                run,
                uri=session.store,
                experiment=session.experiment,
                run_name=session.name,
                tags={key: tags[key] for key in ("git_revision", "git_dirty") if key in tags},  # of its training
            )
            tracker.log_metrics(report.values(), step)
            tracker.log_artifact(readings.folder / TABLE, FOLDER)
            tracker.finish("stopped" if status == "running" else status, ended_ms=ended_ms)
    except RunBusyError:
        print("Not logged: the run is being trained; the same words again, once it has ended, log what is measured")


def checkpoint_identity(checkpoint: Checkpoint) -> str:
    """The checksums of a checkpoint's files."""
    return (checkpoint.path / MANIFEST_NAME).read_text(encoding="utf-8")
