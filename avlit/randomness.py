"""Every random number of a training step, as a pure function of (seed, step, slot, name): nothing to save or restore.

A slot is a clip's place in the step's global batch, so noise, times and dropout do not depend on the number of
ranks, of loader workers or of accumulated micro-batches, and a resumed run draws what the uninterrupted one drew.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avlit.turns import turn_block


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A counter-based generator keyed by all of `key`; 128 bits, so distinct keys do not collide in practice."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def seed_dropout(seed: int, step: int, slots: Sequence[int], device: torch.device) -> None:
    """Set torch's generator of `device`, which dropout layers draw from, for the micro-batch that starts at slots[0].

    `torch.manual_seed` would set those of all kinds of devices, which takes dozens of times as long.
    """
    key = int(numpy_generator(seed, step, slots[0], "dropout").integers(2**63))
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
    else:
        torch.default_generator.manual_seed(key)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch: one independent stream per clip and name.

    slots: place of each clip in the global batch of `step`. `is_training` False marks a held-out measurement:
    conditions are never dropped and noise levels are spread evenly, so that two measurements differ by the model only.
    """

    seed: int
    step: int
    slots: Sequence[int]
    is_training: bool = True

    def _generator(self, name: str, slot: int) -> np.random.Generator:
        return numpy_generator(self.seed, self.step if self.is_training else "heldout", slot, name)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal noise of the shape, device and dtype of `like` [B, ...]."""
        rows = [self._generator(name, slot).standard_normal(like.shape[1:], dtype=np.float32) for slot in self.slots]
        return torch.from_numpy(np.stack(rows)).to(device=like.device, dtype=like.dtype, non_blocking=True)

    def uniform(self, name: str, count: int | None = None) -> np.ndarray:
        """Numbers in [0, 1) for each clip, [B] or [B, count], on the host: a decision on them waits for nothing."""
        return np.array([self._generator(name, slot).random(count) for slot in self.slots])

    def times(self, name: str = "time") -> np.ndarray:
        """Noise levels in [0, 1) for each clip [B]; evenly spread over the slots of a held-out measurement."""
        if self.is_training:
            return self.uniform(name)
        golden = 0.6180339887498949  # the additive sequence with the lowest discrepancy: any number of slots is even
        return np.array([(0.5 + slot * golden) % 1.0 for slot in self.slots])

    def turns(self, name: str, weights: Mapping[str, float]) -> list[str]:
        """One of the names for each clip [B], in exact proportion to their weights over the steps of every slot.

        The steps of a slot are cut into blocks in which each name has its share, in an order drawn for that slot and
        block: the proportions are exact after every block whatever the number of ranks, and a resume goes on in the
        middle of one. In a held-out measurement the slots take turns instead. ValueError: see `turn_block`.
        """
        block = turn_block(weights)
        length = len(block)
        if not self.is_training:
            order = numpy_generator(self.seed, "heldout", name).permutation(length)
            return [block[order[slot % length]] for slot in self.slots]
        number, place = divmod(self.step, length)
        orders = [numpy_generator(self.seed, slot, number, name).permutation(length) for slot in self.slots]
        return [block[order[place]] for order in orders]

    def happens(self, name: str, probability: float) -> np.ndarray:
        """True for each clip [B] with `probability`; never in a held-out measurement (conditions are kept)."""
        if not self.is_training or probability == 0:
            return np.zeros(len(self.slots), dtype=bool)
        return self.uniform(name) < probability
