"""The account of damage: how many samples a run has read, which were damaged, and when that is too many."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data.batches import Reading
from data.sample import DamagedSample
from data.shard_index import ShardError

ALWAYS_ALLOWED = 8
"""Damaged samples that a run forgives before `max_bad`, a share, can be judged; none if `max_bad` is 0."""

_NAMED = 10
_log = logging.getLogger(__name__)


class Account:
    """What one process has read, in the order of the steps; a run then stops at the same step however it was read.

    Every process of a run on several devices keeps its own and judges `max_bad` by it: damage lies in shards, which
    all of them read in turn, so that the share is the same for all but for chance, and no step waits for a count.
    The budget of the whole run is therefore `max_bad` of all its samples, or ALWAYS_ALLOWED for each process.

    samples: those of whole steps handed out. replaced: readings that met a damaged sample; a sample counts at each pass
    that meets it. damaged: (shard, key) -> reason, each once. num_processes: whose accounts it has taken over, itself
    included.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """state: what `state()` gave, to go on from; ValueError if it is something else."""
        self.samples = self.replaced = 0
        self.num_processes = 1
        self.damaged: dict[tuple[str, str], str] = {}
        self._of_step: list[tuple[int, tuple[DamagedSample, ...]]] = []  # a step that is not whole is read again
        if state:
            try:
                self.samples, self.replaced = int(state["samples"]), int(state["replaced"])
                self.num_processes = int(state["num_processes"])
                self.damaged = {(str(shard), str(key)): str(why) for shard, key, why in state["damaged"]}
            except (KeyError, TypeError) as error:
                raise ValueError(f"an account of damage lacks or mistypes {error}") from error

    def state(self) -> dict[str, Any]:
        """The account as JSON values, up to the last whole step."""
        named = [[shard, key, why] for (shard, key), why in self.damaged.items()]
        counts = {"samples": self.samples, "replaced": self.replaced, "num_processes": self.num_processes}
        return {**counts, "damaged": named}

    def settle(self) -> None:
        """The step whose readings were added is whole."""
        for samples, damaged in self._of_step:
            self.samples += samples
            self.replaced += len(damaged)
            for damage in damaged:
                self.damaged.setdefault((damage.shard, damage.key), damage.reason)
        self._of_step.clear()

    def add(self, reading: Reading, *, max_bad: float) -> None:
        """Counts a reading that is about to be handed out and logs what is damaged for the first time.

        max_bad: the share of all readings that may be damaged; beyond it, and beyond ALWAYS_ALLOWED for each process, a
        ShardError names the latest. What is not handed out is not counted: a resume reads it again.
        """
        known = self.damaged.keys() | {(d.shard, d.key) for _, damaged in self._of_step for d in damaged}
        new: dict[tuple[str, str], str] = {}
        for damage in reading.damaged:
            if (damage.shard, damage.key) not in known and (damage.shard, damage.key) not in new:
                new[damage.shard, damage.key] = damage.reason
                _log.warning("damaged sample replaced at step %d: %s", reading.batch.step, damage)
        samples = self.samples + sum(count for count, _ in self._of_step) + len(reading.batch)
        replaced = self.replaced + sum(len(damaged) for _, damaged in self._of_step) + len(reading.damaged)
        allowed = max(ALWAYS_ALLOWED * self.num_processes, max_bad * (samples + replaced)) if max_bad else 0
        if replaced > allowed:
            named = list((self.damaged | new).items())[-_NAMED:]
            raise ShardError(
                f"{replaced} of {samples + replaced} samples read were damaged by step {reading.batch.step}; "
                f"data.max_bad={max_bad} allows fewer:\n"
                + "\n".join(f"  {DamagedSample(shard, key, why)}" for (shard, key), why in named)
                + "\nPrepare these shards again, or raise data.max_bad to train on the rest"
            )
        self._of_step.append((len(reading.batch), reading.damaged))


def of_rank(states: Sequence[Mapping[str, Any]], *, rank: int, devices: int) -> Mapping[str, Any] | None:
    """What a process goes on from, given all accounts: its own; or the first has all, if there were more or fewer."""
    if len(states) == devices:
        return states[rank]
    return merged(states) if rank == 0 else None


def merged(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One account for all processes of a run: sums, and every name once."""
    total = Account()
    total.num_processes = 0
    for account in map(Account, states):
        total.samples += account.samples
        total.replaced += account.replaced
        total.num_processes += account.num_processes
        total.damaged = {**account.damaged, **total.damaged}
    return total.state()
