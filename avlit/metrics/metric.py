"""What a metric is: its name, direction, range, unit, source, what it needs, and the meter that reads it off a clip."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading, Summary, mean

if TYPE_CHECKING:
    from avlit.metrics.picture_judge import PictureJudge
    from avlit.metrics.word_judge import WordJudge

Better = Literal["higher", "lower", "none"]

Measure = Callable[[Clip], Mapping[str, Reading]]
"""A clip that has what the meter needs -> metric -> what is read off it; a metric that does not apply is left out."""


@dataclass(frozen=True)
class Tools:
    """What meters are opened with.

    weights: key -> file or folder on this machine. word_judge, picture_judge: of the embedded corpus, made when asked
    for; None on other clips. mouth_opening: frames uint8 [F, H, W, 3] -> how far the mouth of the only face is open in
    each, as a share of the face's height, [F] with NaN where no face is found; None without a face finder.
    device: of networks.
    """

    weights: Mapping[str, Path] = field(default_factory=dict)
    word_judge: Callable[[], WordJudge] | None = None
    picture_judge: Callable[[], PictureJudge] | None = None
    mouth_opening: Callable[[Any], Any] | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Package:
    """An optional package. install: what to type."""

    module: str
    install: str

    def lack(self, tools: Tools) -> str | None:
        """What is missing, and how to get it; None where it is there."""
        if importlib.util.find_spec(self.module) is not None:
            return None
        return f"the package {self.module}: `{self.install}`"


@dataclass(frozen=True)
class Weights:
    """A local file or folder of released weights, given as weights.KEY=PATH. about: which, and in what layout."""

    key: str
    about: str

    def lack(self, tools: Tools) -> str | None:
        """What is missing, and how to give it; None where a path was given."""
        return None if self.key in tools.weights else f"weights.{self.key}=PATH, {self.about}"


@dataclass(frozen=True)
class Tool:
    """Something that the command brings along. name: a field of Tools. about: what it is and where it comes from."""

    name: str
    about: str

    def lack(self, tools: Tools) -> str | None:
        """What is missing; None where the command has it."""
        return None if getattr(tools, self.name) is not None else self.about


@dataclass(frozen=True)
class Absent:
    """A network that no library here knows, so that no weights could be read. about: what would have to be there."""

    about: str

    def lack(self, tools: Tools) -> str | None:
        """What is missing, always."""
        return self.about


Need = Package | Weights | Tool | Absent


@dataclass(frozen=True)
class Meter:
    """Reads one or several metrics off a clip at once.

    open: makes it ready, once for all clips. clip: attributes of a Clip without which it has nothing to measure.
    version: changes whenever the same clip gives another reading, so that stored ones are not mixed with new ones.
    """

    name: str
    open: Callable[[Tools], Measure]
    clip: tuple[str, ...]
    needs: tuple[Need, ...] = ()
    version: int = 1

    def lacks(self, tools: Tools) -> list[str]:
        """What is missing on this machine, in words with the remedy."""
        return [lack for need in self.needs if (lack := need.lack(tools))]

    def applies(self, clip: Clip) -> bool:
        """Whether a clip has what there is to measure."""
        return all(getattr(clip, name) is not None for name in self.clip)


@dataclass(frozen=True)
class Metric:
    """One number over clips.

    name: as the field uses it; a stand-in has a name of its own. low, high: its range. source: paper and section, or
    what defines it. beside: names of published metrics that a stand-in is set beside, and never called. summary: how
    readings of clips become one value. is_resampled: whether resampled clips give an interval; a Fréchet distance
    grows when clips recur.
    """

    name: str
    about: str
    better: Better
    low: float
    high: float
    unit: str
    source: str
    meter: Meter
    beside: tuple[str, ...] = ()
    summary: Summary = mean
    is_resampled: bool = True
