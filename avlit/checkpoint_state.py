"""What state.json of a checkpoint holds, and what is taken for it: a file from elsewhere may hold anything."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

MAX_NUMBER = 2.0**63


@dataclass(frozen=True)
class CheckpointState:
    """state.json: what a run needs besides tensors, JSON values only.

    step: optimizer steps done, which is the state of data, schedule and random numbers as well: all are functions of
    it. optimizer: `flatten_optimizer`'s meta. lineage: (run id, step) of the checkpoints it descends from, oldest
    first, itself last. base_model: fingerprint of the released weights under it ("" for none), or of all that an
    adapter stands on. adapter: which (`avlit.adapters.AdapterState`), the tensors being its own alone; {} for a model.
    counters: e.g. updates left out because they were not finite. extra: what callbacks keep.
    """

    step: int
    seed: int
    recipe: str
    run: str = ""
    base_model: str = ""
    adapter: dict[str, object] = field(default_factory=dict)
    lineage: tuple[tuple[str, int], ...] = ()
    optimizer: dict[str, object] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def read_state(values: Any) -> CheckpointState:
    """The state that JSON values make; ValueError or TypeError where a field is missing or of another kind."""
    if not isinstance(values, dict):
        raise TypeError("it holds no fields")
    known = {item.name: values[item.name] for item in fields(CheckpointState) if item.name in values}
    for name, value in known.items():
        if not _IS_VALID[name](value):
            raise ValueError(f"{name}={str(value)[:80]} is not what a checkpoint holds there")
    lineage = tuple((run, step) for run, step in known.pop("lineage", ()))
    return CheckpointState(**known, lineage=lineage)


def _is_number(value: object) -> bool:
    """Whether a JSON value is a number that is finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER <= value <= MAX_NUMBER


def _is_count(value: object) -> bool:
    """Whether a JSON value is a whole number that counts something."""
    return _is_number(value) and isinstance(value, int) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_mapping(value: object, is_item: Callable[[Any], bool] = lambda item: True) -> bool:
    return isinstance(value, dict) and all(map(is_item, value.values()))


def _is_lineage(value: object) -> bool:
    pairs = value if isinstance(value, list) else [()]
    return all(isinstance(p, list) and len(p) == 2 and _is_text(p[0]) and _is_count(p[1]) for p in pairs)


def _is_optimizer(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    groups, scalars = value.get("groups", []), value.get("scalars", {})
    return (
        isinstance(groups, list)
        and all(isinstance(group, list) and all(map(_is_text, group)) for group in groups)
        and _is_mapping(scalars, lambda slots: _is_mapping(slots, _is_number))
    )


_IS_VALID: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "seed": lambda value: _is_number(value) and isinstance(value, int),
    "recipe": _is_text,
    "run": _is_text,
    "base_model": _is_text,
    "adapter": _is_mapping,
    "lineage": _is_lineage,
    "optimizer": _is_optimizer,
    "counters": lambda value: _is_mapping(value, _is_number),
    "extra": _is_mapping,
    "versions": lambda value: _is_mapping(value, _is_text),
}
