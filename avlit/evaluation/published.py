"""The numbers that a recipe's paper reports, from `published.json` in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from avlit.discovery import RECIPES
from avlit.errors import ConfigError


@dataclass(frozen=True)
class PublishedNumber:
    """A paper's value of a metric. source: paper, table and, where it is not the only one, the row."""

    metric: str
    value: float
    source: str


def published_numbers(paper: str, root: Path = RECIPES) -> list[PublishedNumber]:
    """All numbers of a paper, by its folder's name; none where it has no file of them.

    ConfigError: the file does not hold SOURCE -> METRIC -> NUMBER.
    """
    path = root / paper / "published.json"
    if not path.exists():
        return []
    source = str(path.relative_to(root.parent))
    try:
        tables: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        items = list(tables.items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from error
    found = []
    for table, values in items:
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {table}: must hold metrics and numbers")
        for metric, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
                raise ConfigError(f"{source}: {table}.{metric}: {value!r} is no number")
            found.append(PublishedNumber(str(metric), float(value), table))
    return found
