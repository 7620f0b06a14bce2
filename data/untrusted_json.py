"""JSON out of shards and their indexes, which may come from anybody: any text gives an object or a ValueError."""

import json
from typing import Any


def parse_object(data: bytes | memoryview) -> dict[str, Any]:
    """UTF-8 JSON -> its object; ValueError for anything else, too deep nesting, numbers too long, NaN and Infinity."""
    try:
        value = _DECODER.decode(str(data, "utf-8"))
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError:
        raise ValueError("not JSON that anyone meant: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def is_count(value: object) -> bool:
    """Whether it is a whole number of 0 or more; true and false are none."""
    return type(value) is int and value >= 0


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
