"""How clips are measured: what meters are opened with, the bar meanwhile, and that every reading is kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from avlit.commands.corpus_judge import corpus_judge, corpus_picture_judge
from avlit.commands.mouth_opening import mouth_opening_finder
from avlit.evaluation.readings import SAMPLED, TRUE, Readings
from avlit.metrics.clip import Clip
from avlit.metrics.metric import Meter, Tools


def corpus_tools(weights: Mapping[str, Path], *, device: str, has_judges: bool) -> Tools:
    """What meters are opened with. has_judges: the clips are of the embedded corpus, on which judges can be trained."""
    return Tools(
        weights=weights,
        word_judge=cache(corpus_judge) if has_judges else None,
        picture_judge=cache(corpus_picture_judge) if has_judges else None,
        mouth_opening=None if has_judges else mouth_opening_finder(),  # it knows no drawn faces
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
    """Those meters that have something to measure, opened; a judge that has to be trained first says so."""
    found = {}
    for name in sorted(needed):
        if any(getattr(need, "name", "").endswith("_judge") for need in ids[name].needs):
            print(f"Trains the judge that {ids[name].name} is measured with", flush=True)
        found[name] = ids[name].open(tools)
    return found


def progress(total: int) -> tqdm:
    """A bar with the time that is left."""
    return tqdm(total=total, desc="evaluating", unit="step", disable=not total)
