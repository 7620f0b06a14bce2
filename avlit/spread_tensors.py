"""Tensors that several ranks save together, each what it holds, and that are read as wholes again.

`weights.part-00002-of-00008.safetensors` is what the second of eight ranks wrote: its rows of each tensor, and in the
header where in the whole they begin, as torch's distributed checkpoints in safetensors have it (`DCP_SHARDING_INFO`).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Place = tuple[int, ...]
"""Where in a whole tensor a part begins, for each dimension."""

PART_NAME = re.compile(r"(?P<stem>\w+)\.part-\d{5}-of-\d{5}\.safetensors")
PLACES, PLACE = "DCP_SHARDING_INFO", "saved_offsets"


def part_name(name: str, number: int, *, of: int) -> str:
    """`weights.safetensors`, 2, of 8 -> `weights.part-00002-of-00008.safetensors`."""
    return f"{name.removesuffix('.safetensors')}.part-{number:05d}-of-{of:05d}.safetensors"


def whole_name(name: str) -> str:
    """The name that the file would have if it held the whole: of a part another one, else its own."""
    match = PART_NAME.fullmatch(name)
    return f"{match['stem']}.safetensors" if match else name


def save_part(path: Path, tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> None:
    """Write this rank's parts of tensors by name, each beginning at its place in the whole; there may be none."""
    info = {name: {PLACE: list(places[name])} for name in tensors}
    save_file(dict(tensors), path, metadata={"format": "pt", PLACES: json.dumps(info)})


class SpreadTensors(Mapping[str, Tensor]):
    """Whole tensors by name, each put together from the files' parts when it is asked for, so that none is kept.

    ValueError, OSError or SafetensorError: the files are no parts, or do not make wholes.
    """

    def __init__(self, paths: Sequence[Path]):
        self._parts: dict[str, list[tuple[Place, Place, Any]]] = {}  # begins at, shape, the open file
        for path in paths:
            self._take(path, safe_open(path, framework="pt"))
        for name, parts in self._parts.items():
            parts.sort(key=lambda part: part[0])
            _check(name, parts)

    def _take(self, path: Path, file: Any) -> None:
        try:
            info: dict[str, dict[str, list[int]]] = json.loads((file.metadata() or {})[PLACES])
            for name in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                place, shape = tuple(map(int, info[name][PLACE])), tuple(file.get_slice(name).get_shape())
                if len(place) != len(shape):
                    raise ValueError(f"{path.name}: {name} of {list(shape)} cannot begin at {list(place)}")
                self._parts.setdefault(name, []).append((place, shape, file))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} does not say where its parts begin: {error!r}") from error

    def __getitem__(self, name: str) -> Tensor:
        found = [file.get_tensor(name) for _, _, file in self._parts[name]]
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _check(name: str, parts: Sequence[tuple[Place, Place, Any]]) -> None:
    """Rows of one part end where those of the next begin; other dimensions are whole."""
    ends = 0
    for place, shape, _ in parts:
        if place[:1] != (ends,)[: len(place)] or any(place[1:]) or shape[1:] != parts[0][1][1:]:
            raise ValueError(f"the parts of {name} make no whole: one begins at {list(place)}, after {ends} rows")
        ends += shape[0] if shape else 0
