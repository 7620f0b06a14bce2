"""AVDataModule: shard folders to training batches and held-out clips, for Lightning and for whoever samples."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from avlit.batch import AVBatch
from avlit.errors import UserError
from data.account import Account, of_rank
from data.batches import BatchReader, Contents, ReaderSettings, collate, with_mouths
from data.loader import TrainLoader
from data.order import Mix
from data.sample import Annotation, DamagedSample, EncodedSample
from data.shards import ShardError, ShardSet

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldoutClip:
    """A held-out clip with all that metrics and sample clips need.

    batch: the encoded clip, B = 1. waveform: its mixed sound, float32 [N] in [-1, 1] at `rate_hz`.
    """

    batch: AVBatch
    annotation: Annotation
    waveform: np.ndarray
    rate_hz: int


class AVDataModule(LightningDataModule):
    """Shard folders as a LightningDataModule.

    roots: one or several shard folders of one identity. expect: the identity that the run needs (codecs, rates), see
    `ShardSet.open`. subsets: weight of each subset in the mix; None mixes all in proportion to their clips.
    batch_size: clips of an optimizer step over all devices, one number or one for each shape `FxHxW`.
    contents: what of a sample a batch holds. steps: the run's last step, None for no end.
    start_step: the step to begin with, which is the whole state of the data. accumulate: micro-batches of a step.
    devices: the number of training processes; an attached trainer's own number and rank take its place.
    max_bad, timeout_s, max_restarts: what is borne of damage and of storage and workers that fail, see `TrainLoader`.
    counted: what `state()` gave, of every process, in the run that is resumed, so that the budget of damage goes on
    where it was.
    """

    def __init__(
        self,
        roots: Path | str | Sequence[Path | str],
        *,
        batch_size: int | Mapping[str, int],
        contents: Contents,
        seed: int,
        subsets: Mapping[str, float] | None = None,
        expect: Mapping[str, object] | None = None,
        steps: int | None = None,
        start_step: int = 0,
        accumulate: int = 1,
        devices: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        max_bad: float = 0.001,
        timeout_s: float = 300.0,
        max_restarts: int = 3,
        counted: Sequence[Mapping[str, Any]] = (),
        group_shards: int = 4,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("data.workers", workers, 0),
            ("data.prefetch", prefetch, 1),
            ("data.max_restarts", max_restarts, 0),
            ("data.group_shards", group_shards, 1),
            ("train.accumulate", accumulate, 1),
            ("start_step", start_step, 0),
        ):
            if value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        if not 0 <= max_bad < 1:
            raise UserError(f"data.max_bad={max_bad}: a share of the samples, from 0 to below 1")
        if timeout_s <= 0:
            raise UserError(f"data.timeout_s={timeout_s}: must be above 0")
        self._roots = [roots] if isinstance(roots, str | Path) else list(roots)
        self._expect, self._subsets = dict(expect or {}), subsets
        self._batch_size, self._contents, self._seed = batch_size, contents, seed
        self._accumulate, self._devices, self._group_shards = accumulate, devices, group_shards
        self._workers, self._prefetch, self._max_bad, self._pin_memory = workers, prefetch, max_bad, pin_memory
        self._timeout_s, self._max_restarts = timeout_s, max_restarts
        self._counted = [Account(state).state() for state in counted]
        self.steps, self.start_step = steps, start_step
        self.loader: TrainLoader | None = None

    @cached_property
    def shards(self) -> ShardSet:
        """The opened shard folders, compared with what the run expects."""
        return ShardSet.open(self._roots, self._expect)

    @property
    def data_fingerprint(self) -> str:
        """Hash of identity and contents of the shards, for tracking and for refusing a resume on other data."""
        return self.shards.manifest_hash

    @property
    def weights(self) -> dict[str, float]:
        """The subsets' weights, those of the configuration or else their numbers of training clips."""
        if self._subsets is not None:
            return dict(self._subsets)
        counts = dict.fromkeys(self.shards.subsets, 0.0)
        for _, shard in self.shards.select("train"):
            counts[shard.subset] += shard.samples
        return {name: count for name, count in counts.items() if count}

    @property
    def wait_s(self) -> float:
        """Seconds that training has waited for data, without the first batch."""
        return self.loader.wait_s if self.loader else 0.0

    @property
    def damaged_count(self) -> int:
        """Readings of this process so far, over resumes, that met a damaged sample and were replaced."""
        return self.state()["replaced"]

    def state(self) -> dict[str, Any]:
        """This process's account of damage, as JSON values: of the steps handed out and not of what is read ahead.

        The position is no part of it: that is the step, from which a resume starts with `start_step`.
        """
        return self.loader.account.state() if self.loader else self._account_before()

    def _account_before(self) -> dict[str, Any]:
        rank, devices = self._place()
        return Account(of_rank(self._counted, rank=rank, devices=devices) if self._counted else None).state()

    def _place(self) -> tuple[int, int]:
        """This process's rank and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, self._devices)

    def setup(self, stage: str | None = None) -> None:
        """Opens the shards; Lightning calls it on every process."""
        _ = self.shards

    def reader(self) -> BatchReader:
        """The reader of this process's part of every global batch."""
        rank, devices = self._place()
        sizes = self._batch_size if isinstance(self._batch_size, int) else tuple(self._batch_size.items())
        settings = ReaderSettings(
            roots=tuple(str(root) for root in self._roots),
            subsets=tuple(self.weights.items()),
            batch_size=sizes,
            contents=self._contents,
            seed=self._seed,
            group_shards=self._group_shards,
            rank=rank,
            devices=devices,
            accumulate=self._accumulate,
        )
        return BatchReader(settings, self.shards)

    def train_dataloader(self) -> TrainLoader:
        """Batches from `start_step` on; the loader is kept as `loader` for its accounts of waiting and damage."""
        self.loader = TrainLoader(
            self.reader(),
            start_step=self.start_step,
            steps=self.steps,
            workers=self._workers,
            prefetch=self._prefetch,
            max_bad=self._max_bad,
            pin_memory=self._pin_memory,
            timeout_s=self._timeout_s,
            max_restarts=self._max_restarts,
            counted=self._account_before(),
        )
        return self.loader

    def heldout_batches(self, num_clips: int, batch_size: int, *, split: str = "heldout") -> list[AVBatch]:
        """The same held-out clips every time, spread over the subsets by weight, in batches of one shape each.

        `step` is 0 and the slots count the clips, so that their noise is the same at every measurement.
        split: `train` gives clips that are trained on instead, to see how well they are known.
        """
        clips = self._heldout(num_clips, sound=False, split=split)
        batches = []
        for shape in dict.fromkeys(sample.annotation.shape for sample in clips):
            slots = [slot for slot, sample in enumerate(clips) if sample.annotation.shape == shape]
            batches += [
                self._collate([clips[slot] for slot in part], tuple(part))
                for part in (slots[start : start + batch_size] for start in range(0, len(slots), batch_size))
            ]
        return batches

    def heldout_samples(self, num_clips: int) -> list[HeldoutClip]:
        """The first of the clips of `heldout_batches`, one by one, with annotations and sound."""
        return [
            HeldoutClip(self._collate([sample], (slot,)), sample.annotation, sample.waveform, sample.annotation.rate_hz)
            for slot, sample in enumerate(self._heldout(num_clips, sound=True))
            if sample.waveform is not None
        ]

    def _collate(self, samples: list[EncodedSample], slots: tuple[int, ...]) -> AVBatch:
        return collate(samples, step=0, slots=slots, contents=self._contents)

    def _heldout(self, num_clips: int, *, sound: bool, split: str = "heldout") -> list[EncodedSample]:
        """Reads clips by turns of the subsets; a subset that has no more, or a damaged clip, gives way to the next.

        Fewer than `num_clips` where the shards hold fewer; ShardError where they hold none.
        """
        weights = {name: weight for name, weight in self.weights.items() if weight > 0}
        places: dict[str, list[tuple[int, int]]] = {name: [] for name in weights}
        for number, shard in self.shards.select(split):
            if shard.subset in places:
                places[shard.subset] += [(number, index) for index in range(shard.samples)]
        names, mix = list(weights), Mix([Fraction(str(weight)) for weight in weights.values()])
        clips: list[EncodedSample] = []
        number = 0
        while len(clips) < num_clips and any(places.values()):
            item, _ = mix.draw(number)
            number += 1
            waiting = places[names[item]]
            while waiting:
                place = waiting.pop(0)
                try:
                    sample = self.shards.read(*place, sound=sound)
                    clips.append(with_mouths(sample, self._contents, shard=self.shards.shards[place[0]].name))
                    break
                except DamagedSample as damage:
                    _log.warning("damaged held-out clip left out: %s", damage)
        if num_clips and not clips:
            raise ShardError(
                f"the shards hold no readable held-out clip of {', '.join(names)}; make some (`just prepare` keeps a "
                "share of the clips apart), or set validation.clips=0 sample.count=0 sample.sync_clips=0"
            )
        if len(clips) < num_clips:
            _log.warning("%d held-out clips were asked for; the shards hold %d: these are used", num_clips, len(clips))
        return clips
