"""All metrics by name, and what of them can be measured with what is at hand.

To add one: a module with `METRICS`, listed in MODULES.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from avlit.errors import ConfigError
from avlit.metrics import (
    absent,
    aesthetics,
    av_align,
    cnn14,
    controls,
    embeddings,
    events,
    i3d,
    mood,
    mouths,
    moving_picture,
    passt,
    places,
    speaker,
    speech,
    spoken_words,
    syncnet,
)
from avlit.metrics.metric import Meter, Metric, Tools
from avlit.settings import nearest

MODULES = (
    mouths, events, av_align, mood, places, spoken_words, controls, speech, speaker, moving_picture, syncnet, i3d,
    embeddings, cnn14, passt, aesthetics, absent,
)  # fmt: skip
"""Of this package, in the order of the table."""


@cache
def metrics() -> dict[str, Metric]:
    """Name -> metric. ValueError: two have one name."""
    found: dict[str, Metric] = {}
    for module in MODULES:
        for metric in module.METRICS:
            if metric.name in found:
                raise ValueError(f"metric {metric.name} of {module.__name__}: there is one of that name already")
            found[metric.name] = metric
    return found


def chosen(names: Sequence[str], tools: Tools) -> list[Metric]:
    """The metrics of these names; of none, all that can be measured.

    ConfigError: one does not exist, or something it needs is not at hand.
    """
    known = metrics()
    if not names:
        return [metric for metric in known.values() if not metric.meter.lacks(tools)]
    found = []
    for name in dict.fromkeys(names):
        if name not in known:
            near = nearest(name, list(known))
            hint = f"did you mean {near}?" if near else "`just evaluate metrics=list` shows all"
            raise ConfigError(f"metrics={name}: no such metric; {hint}")
        if lacks := known[name].meter.lacks(tools):
            raise ConfigError(f"metrics={name}: needs {'; and '.join(lacks)}")
        found.append(known[name])
    return found


def meters(of: Sequence[Metric]) -> list[Meter]:
    """The meters that read these metrics, each once."""
    return list({metric.meter.name: metric.meter for metric in of}.values())
