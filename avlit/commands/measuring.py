"""How clips are measured: what meters are opened with, the bar meanwhile, and that every reading is kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

from avlit.commands.corpus_judge import kept_picture_judge, kept_word_judge
from avlit.commands.mouth_opening import mouth_opening_finder
from avlit.evaluation.readings import SAMPLED, TRUE, Readings
from avlit.metrics.clip import Clip
from avlit.metrics.metric import Meter, Tools


def corpus_tools(weights: Mapping[str, Path], *, device: str, judges: Path | None) -> Tools:
    """What meters are opened with. judges: the cache that keeps them; None for clips that are not of the corpus."""
    return Tools(
        weights=weights,
        word_judge=None if judges is None else cache(partial(kept_word_judge, judges)),
        picture_judge=None if judges is None else cache(partial(kept_picture_judge, judges)),
        mouth_opening=None if judges is not None else mouth_opening_finder(),  # it knows no drawn faces
        device=device,
    )


def device() -> str:
    """Where networks run: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep(
    readings: Readings, number: int, clip: Clip, true: Clip | None, *, ids: Mapping[str, Meter], measures: Mapping
) -> None:
    """Measure one clip and, where it is known, its true clip."""
    both = {SAMPLED: clip} if true is None else {SAMPLED: clip, TRUE: true}
    readings.measure(number, both, meters=ids, measures=measures)


def opened(ids: Mapping[str, Meter], tools: Tools, *, needed: set[str]) -> dict:
    """Those meters that have something to measure, opened."""
    return {name: ids[name].open(tools) for name in sorted(needed)}


def progress(total: int) -> tqdm:
    """A bar with the time that is left."""
    return tqdm(total=total, desc="evaluating", unit="step", disable=not total)
