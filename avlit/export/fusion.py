"""Updates of layers that another program keeps as one, whose rows are theirs in order: queries, keys and values, say.

The whole's matrix down stacks the parts', and its matrix up is block-diagonal: up @ down has each part's product in
that part's rows, exactly. Its rank is the sum of theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from avlit.export.updates import Update


def fuse(parts: Sequence[Update | None], weights: Sequence[Tensor]) -> Update:
    """One update of the layer whose weight [sum of out, in] is `weights` [out, in] on top of each other.

    parts: None for what has no update; not all of them. Where one is DoRA's, rows of the others keep their length.
    """
    there = [part for part in parts if part is not None]
    scalings = {part.scaling for part in there}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    down = torch.cat([part.down for part in there])
    up = down.new_zeros(sum(len(weight) for weight in weights), len(down))
    row = column = 0
    for part, weight in zip(parts, weights, strict=True):
        if part is not None:
            up[row : row + len(weight), column : column + part.rank] = part.up * (part.scaling / scaling)
            column += part.rank
        row += len(weight)
    magnitude = None
    if any(part.magnitude is not None for part in there):
        magnitude = torch.cat([_lengths(part, weight) for part, weight in zip(parts, weights, strict=True)])
    return Update(down, up, scaling, magnitude)


def _lengths(part: Update | None, weight: Tensor) -> Tensor:
    if part is None:
        return weight.float().norm(dim=1)
    return part.on(weight).norm(dim=1) if part.magnitude is None else part.magnitude


def take_apart(whole: Update, sizes: Sequence[int]) -> list[Update | None]:
    """The updates of the parts, whose rows [out] are so many; together they are the whole, exactly.

    None where a part's rows are zero and nothing of DoRA's is on them. What `fuse` made of parts of one rank comes
    apart again; of any other update each part has the whole's matrix down.
    """
    ups = whole.up.split(list(sizes))
    lengths = [None] * len(ups) if whole.magnitude is None else whole.magnitude.split(list(sizes))
    blocks = _blocks(ups, whole.rank)
    some = next(block for block in blocks if block is not None)
    found: list[Update | None] = []
    for up, length, block in zip(ups, lengths, blocks, strict=True):
        if block is None and length is None:
            found.append(None)
            continue
        columns = block or some  # of a part with DoRA's lengths alone they are zero
        found.append(Update(whole.down[columns].clone(), up[:, columns].clone(), whole.scaling, length))
    return found


def _blocks(ups: Sequence[Tensor], rank: int) -> list[slice | None]:
    """Columns of each part [out, R]: its own where the whole is block-diagonal, else all; None for one that is zero."""
    moved = [bool(up.any()) for up in ups]
    if not any(moved):  # as before training: nothing tells them apart
        return [slice(0, rank)] * len(ups)
    shared = [slice(0, rank) if each else None for each in moved]
    if rank % sum(moved):
        return shared
    size, start, own = rank // sum(moved), 0, []
    for up, is_moved in zip(ups, moved, strict=True):
        own.append(slice(start, start + size) if is_moved else None)
        if is_moved and (up[:, :start].any() or up[:, start + size :].any()):
            return shared
        start += size if is_moved else 0
    return own
