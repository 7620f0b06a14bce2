"""Values laid over a schema of dataclasses, layer by layer; errors name key, value, source and what is allowed.

It knows nothing of recipes: `avlit/config.py` tells it which layers there are.
"""

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from avlit.errors import ConfigError

COMMAND_LINE = "command line"
NAMING = ("name", "kind")
"""Leaves that a section's own word stands for."""

UNREADABLE = (
    yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, AttributeError, TypeError, AssertionError,
    RecursionError,
)  # fmt: skip
"""What the readers raise for a text that is no yaml; all but the first two for values such as `!!bool perhaps`."""


def setting(
    default: Any = None,
    about: str = "",
    *,
    factory: Any = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    fixed: bool = False,
    only_with: tuple[str, object] | None = None,
    not_with: tuple[str, object] | None = None,
) -> Any:
    """A field of a config dataclass: its default, and one line on what it is, with the unit.

    low, above, high: bounds of a number, or of each number of a list or mapping; `above` is exclusive.
    fixed: the recipe or the loader sets it, the command line may not.
    only_with, not_with (key, value): it has an effect only while that other key has, or has not, that value, or one of
    several in a tuple.
    """
    metadata = {
        "about": about,
        "low": low,
        "above": above,
        "high": high,
        "fixed": fixed,
        "only_with": only_with,
        "not_with": not_with,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Leaf:
    """One key of a schema: its type and what `setting` recorded."""

    type: Any
    about: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    fixed: bool = False
    only_with: tuple[str, object] | None = None
    not_with: tuple[str, object] | None = None

    @property
    def plain_type(self) -> Any:
        """The type without `| None`."""
        if typing.get_origin(self.type) in (Union, types.UnionType):
            return next(part for part in typing.get_args(self.type) if part is not type(None))
        return self.type

    @property
    def is_optional(self) -> bool:
        """Whether null is allowed."""
        return self.plain_type is not self.type

    @property
    def is_mapping(self) -> bool:
        """Whether the key holds names and values that the user chooses."""
        return typing.get_origin(self.plain_type) is dict


@cache
def leaves(schema: type) -> dict[str, Leaf]:
    """Every key of a schema that holds a value, dotted, in the order of the fields."""
    found: dict[str, Leaf] = {}
    hints = typing.get_type_hints(schema)
    for each in fields(schema):
        hint = hints[each.name]
        if is_dataclass(hint) and isinstance(hint, type):
            found |= {f"{each.name}.{key}": leaf for key, leaf in leaves(hint).items()}
        else:
            found[each.name] = Leaf(hint, **each.metadata)
    return found


class Settings:
    """A config in the making: a schema's defaults under the layers put on so far."""

    def __init__(self, schema: type):
        self.leaves = leaves(schema)
        self.node: DictConfig = OmegaConf.structured(schema)

    def put(self, values: Mapping[Any, Any], source: str, *, prefix: str = "") -> None:
        """Lay a nested mapping, as a yaml file holds it, over what is there. A mapping-valued key is replaced whole.

        A section that has a `name` can be given as that alone: `strategy: ddp` is `strategy: {name: ddp}`.
        """
        for name, value in values.items():
            key = f"{prefix}{name}"
            if f"{key}.name" in self.leaves and not isinstance(value, Mapping):
                key = f"{key}.name"
            if key in self.leaves:
                self._set(key, key, value, source)
            elif self._is_section(key):
                if not isinstance(value, Mapping):
                    raise ConfigError(self._section_message(key, value, source))
                self.put(value, source, prefix=f"{key}.")
            else:
                raise ConfigError(f"{key} ({source}): no such key{self._nearest(key)}")

    def put_words(self, words: Mapping[str, str]) -> None:
        """Lay `a.b -> text` pairs from the command line over what is there."""
        for key, text in self.named(words).items():
            parent = key.rpartition(".")[0]
            if key in self.leaves:
                leaf_key = key
            elif parent in self.leaves and self.leaves[parent].is_mapping:
                leaf_key = parent  # one entry of a mapping, for example data.subsets.basic_face=0.5
            elif self._is_section(key):
                raise ConfigError(self._section_message(key, text, COMMAND_LINE))
            else:
                raise ConfigError(f"{key}: no such key{self._nearest(key)}")
            leaf = self.leaves[leaf_key]
            if leaf.fixed:
                raise ConfigError(f"{key}={text}: is set by the recipe and cannot be given on the command line")
            self._set(leaf_key, key, self._parse(leaf, key, text), COMMAND_LINE)

    def refuse_idle(self, words: Mapping[str, str]) -> None:
        """Raise ConfigError for a word that another setting leaves without an effect."""
        for key, text in self.named(words).items():
            leaf = self.leaves.get(key)
            for rule, is_wanted in ((leaf and leaf.only_with, True), (leaf and leaf.not_with, False)):
                if rule is None:
                    continue
                other, wanted = rule
                value = OmegaConf.select(self.node, other)
                if (value in wanted if isinstance(wanted, tuple) else value == wanted) is is_wanted:
                    continue
                raise ConfigError(
                    f"{key}={text}: has no effect while {other}={as_word(OmegaConf.select(self.node, other))}; "
                    f"leave it out, or {'set' if is_wanted else 'change'} {other}"
                    + (f"={as_word(wanted)}" if is_wanted else "")
                )

    def named(self, words: Mapping[str, str]) -> dict[str, str]:
        """The words with `strategy=ddp`, `adapter=lora` spelt out as `strategy.name=ddp`, `adapter.kind=lora`.

        ConfigError where both are given.
        """
        spelt: dict[str, str] = {}
        for key, text in words.items():
            named = next((each for end in NAMING if (each := f"{key}.{end}") in self.leaves), key)
            if named != key and named in words:
                raise ConfigError(f"{key}={text} and {named}={words[named]}: mean the same; keep one")
            spelt[named] = text
        return spelt

    def build(self) -> Any:
        """The dataclasses with the values laid over them; sections that have a `check()` are asked for it."""
        built = OmegaConf.to_object(self.node)
        for owner in (*(getattr(built, each.name) for each in fields(built)), built):  # type: ignore[arg-type]
            check = getattr(owner, "check", None)
            if check is None or not is_dataclass(owner):
                continue
            try:
                check()
            except ValueError as error:
                raise ConfigError(str(error)) from error
        return built

    def _is_section(self, key: str) -> bool:
        return any(leaf.startswith(f"{key}.") for leaf in self.leaves)

    def _section_message(self, key: str, value: object, source: str) -> str:
        inside = [leaf for leaf in self.leaves if leaf.startswith(f"{key}.")]
        some = ", ".join(inside[:6]) + (", …" if len(inside) > 6 else "")
        return f"{key}={value} ({source}): is a section, set the keys in it: {some}"

    def _nearest(self, key: str) -> str:
        near = nearest(key, list(self.leaves))
        return f"; did you mean {near}?" if near else "; `just config recipe=…` prints all keys"

    def _parse(self, leaf: Leaf, key: str, text: str) -> Any:
        if leaf.is_optional and text.lower() in ("null", "none", "~", ""):
            return None
        if leaf.plain_type is str or typing.get_origin(leaf.plain_type) is Literal:
            return text  # as typed: a run called 007 stays 007
        try:
            return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
        except UNREADABLE as error:
            raise ConfigError(f"{key}={text}: must be {allowed(leaf)}") from error

    def _set(self, leaf_key: str, key: str, value: Any, source: str) -> None:
        """Set one value; `key` differs from `leaf_key` for an entry of a mapping."""
        leaf = self.leaves[leaf_key]
        refuse_interpolation(value, key, source)
        message = f"{key}={as_word(value)} ({source}): must be {allowed(leaf, is_entry=key != leaf_key)}"
        try:
            OmegaConf.update(self.node, key, value, merge=False)
            stored = OmegaConf.select(self.node, leaf_key)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(message) from error
        if isinstance(stored, Mapping):
            stored = list(stored.values())
        numbers = stored if isinstance(stored, Sequence) and not isinstance(stored, str) else [stored]
        for number in numbers:
            if isinstance(number, int | float) and not isinstance(number, bool) and not _fits(number, leaf):
                raise ConfigError(message)


def _fits(number: float, leaf: Leaf) -> bool:
    return (
        math.isfinite(number)
        and (leaf.low is None or number >= leaf.low)
        and (leaf.above is None or number > leaf.above)
        and (leaf.high is None or number <= leaf.high)
    )


def refuse_interpolation(value: object, key: str, source: str) -> None:
    """Raise ConfigError where a value asks OmegaConf to look something up, such as an environment variable."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{key}={value} ({source}): ${{…}} is not evaluated here; write the value itself")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_interpolation(name, key, source)
            refuse_interpolation(inner, key, source)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_interpolation(inner, key, source)


def allowed(leaf: Leaf, *, is_entry: bool = False) -> str:
    """What a key takes, in words: `a number from 0 to 1`, `one of fp32, bf16`."""
    kind = leaf.plain_type
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    bounds = _bounds(leaf)
    nouns = {int: ("whole number", "whole numbers"), float: ("number", "numbers"), str: ("text", "texts")}
    if origin is Literal:
        text = f"one of {', '.join(map(str, parts))}"
    elif kind is bool:
        text = "true or false"
    elif origin is dict and is_entry:
        text = f"a {nouns[parts[1]][0]}{bounds}"
    elif origin is dict:
        text = f"a mapping {{name: {nouns[parts[1]][0]}, …}}, each {nouns[parts[1]][0]}{bounds or ' finite'}"
    elif origin in (list, tuple):
        count = f"{len(parts)} " if origin is tuple and ... not in parts else ""
        text = f"a list [a, b, …] of {count}{nouns[parts[0]][1]}{bounds}"
    elif kind is str:
        text = "text"
    else:
        text = f"a {nouns[kind][0]}{bounds}"
    return f"{text}, or null" if leaf.is_optional else text


def _bounds(leaf: Leaf) -> str:
    if leaf.low is not None and leaf.high is not None:
        return f" from {leaf.low:g} to {leaf.high:g}"
    least = f" above {leaf.above:g}" if leaf.above is not None else ""
    least = f" of at least {leaf.low:g}" if leaf.low is not None else least
    most = f" of at most {leaf.high:g}" if leaf.high is not None else ""
    return f"{least} and{most}" if least and most else least or most


def as_word(value: object) -> str:
    """A value as one would type it on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest(word: str, names: Sequence[str]) -> str | None:
    """The name most like `word`, by the whole of it or by its last dotted part; None where nothing is alike."""

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, word, name).ratio()
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return max(whole, 0.5 * (whole + last), last - 0.1)

    best = max(names, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """A yaml text as nested plain values; duplicated keys and interpolations are errors."""
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except UNREADABLE as error:
        raise ConfigError(f"{source}: not readable as yaml: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: must hold `key: value` lines")
    for name, value in values.items():
        refuse_interpolation(value, str(name), source)
    return {str(name): value for name, value in values.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key; an empty mapping stays one."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_words(words: Sequence[str]) -> dict[str, str]:
    """`key=value` words as a mapping in their order; ConfigError for any other word and for a key given twice."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.replace(".", "").replace("_", "").isalnum():
            hint = f"; did you mean {key.lstrip('-')}=VALUE?" if key.startswith("-") else ""
            raise ConfigError(f"{word!r}: every word must be key=value, for example train.steps=500{hint}")
        if key in found:
            raise ConfigError(f"{key}: given twice, as {found[key]!r} and as {value!r}; keep one")
        found[key] = value
    return found


def words_by_stage(words: Mapping[str, str], stages: Sequence[str]) -> dict[str, dict[str, str]]:
    """Stage -> key -> value: `STAGE.KEY=VALUE` holds for that stage alone, and there wins over `KEY=VALUE`."""
    of_all = {key: value for key, value in words.items() if key.partition(".")[0] not in stages}
    of_one: dict[str, dict[str, str]] = {stage: {} for stage in stages}
    for key, value in words.items():
        stage, _, rest = key.partition(".")
        if stage in of_one:
            of_one[stage][rest] = value
    return {stage: {**of_all, **own} for stage, own in of_one.items()}
