"""What the processes of one training run tell each other besides gradients."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized()


def gather(value: T) -> list[T]:
    """The values of all ranks in their order, on all of them; every rank must call it. Small host values only."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
