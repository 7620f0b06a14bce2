"""What the processes of one training run tell each other besides gradients, and who holds what of a sharded tensor."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of several ranks, which know each other."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this process is the first rank, or the only one."""
    return not is_distributed() or dist.get_rank() == 0


def gather(value: T) -> list[T]:
    """The values of all ranks in their order, on all of them; every rank must call it. Small host values only."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# Sharded tensors: each rank holds a part. What is not sharded is whole on every rank.


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is spread over the ranks, so that all must run it together."""
    return isinstance(model, FSDPModule)


def gather_parts_again(model: nn.Module) -> None:
    """Give up whole weights that a forward pass left behind, for the parts that may have changed since."""
    if is_sharded(model):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor alone."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, of which it is a view."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def place_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Where in the whole tensor this rank's part begins, for each dimension.

    None where it has none to save: its part is empty, or a copy of what another rank holds.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim if is_first() else None
    here = tensor.device_mesh.get_coordinate()
    assert here is not None  # every rank is in the mesh
    copies = [at for at, placement in zip(here, tensor.placements, strict=True) if not isinstance(placement, Shard)]
    shape, place = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return None if any(copies) or not math.prod(shape) else tuple(place)


def like_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, as `like` is: on its device, and this rank's part where it is sharded."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def as_part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a tensor as a part of the whole, which is spread over the ranks as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    size = torch.Size((len(like), *tensor.shape[1:]))
    stride = tuple(math.prod(size[place + 1 :]) for place in range(len(size)))
    part = DTensor.from_local(tensor, like.device_mesh, like.placements, run_check=False, shape=size, stride=stride)
    return part.to(like.device)  # the mesh's device is another one where parts are in the host's memory


@torch.no_grad()
def fill(target: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, which every rank has, into one that may be sharded."""
    local(target).copy_(local(like_sharded(tensor, target)))


def norm_over_parts(norm: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients from that of this rank's parts of them; every rank must call it."""
    first: Any = next((each for each in parameters if isinstance(each, DTensor)), None)
    if first is None or first.device_mesh.size() == 1:
        return norm
    (dimension,) = (place for place, placement in enumerate(first.placements) if isinstance(placement, Shard))
    square = norm.square()
    dist.all_reduce(square, group=first.device_mesh.get_group(dimension))
    return square.sqrt()
