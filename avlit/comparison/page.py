"""The comparison as one page of HTML that opens without a server: styles, script and numbers in it, clips beside it."""

from __future__ import annotations

import math
from base64 import b64encode
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from avlit.comparison.comparison import Comparison
from avlit.comparison.measures import ARROWS, Row, number
from avlit.durable import write_atomically

MEDIA = "media"
MOST_INSIDE = 24 << 20
"""Bytes of clips that are put into a page of its own; it then needs nothing beside it."""
TYPES = {".mp4": "video/mp4", ".wav": "audio/wav", ".png": "image/png"}
DOTS_WIDTH, DOTS_HEIGHT, DOTS_STEP = 150, 18, 9


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page to `path`; its clips are in the folder `media` beside it."""
    write_atomically(path, render(comparison, media=None))


def write_single_file(comparison: Comparison, path: Path, *, media: Path) -> bool:
    """Write the page with its clips inside, for where no folder goes along, such as MLflow's viewer.

    Returns False where the clips are more than fits into a page: it then says where they are.
    """
    clips = [clip for row in comparison.clips for clip in row.clips if clip]
    names = [name for clip in clips for name in (clip.file, clip.picture) if name]
    is_small = sum((media / name).stat().st_size for name in names) <= MOST_INSIDE
    write_atomically(path, render(comparison, media=media if is_small else Path()))
    return is_small


def render(comparison: Comparison, *, media: Path | None) -> str:
    """The page's HTML. media: None where clips stand beside it; their folder, to put them inside; Path() for none."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names and captions come from folders that may come from anywhere
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    data = {
        "runs": [
            {"letter": each.letter, "name": each.name, "variant": variant.number}
            for each in comparison.subjects
            for variant in comparison.variants
            if each in variant.subjects
        ],
        "panels": [
            asdict(panel) | {"reference": line and asdict(line)}
            for panel in comparison.panels
            for line in [comparison.yardstick and comparison.yardstick.line(panel.metric)]
        ],
    }
    return environment.get_template("page.html").render(
        comparison=comparison,
        subjects=comparison.subjects,
        variants=comparison.variants,
        color={each.letter: variant.number % 8 for variant in comparison.variants for each in variant.subjects},
        data=data,
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        arrows=ARROWS,
        dots=dots,
        source=partial(source, media=media),
        has_clips=media != Path(),
        has_intervals=any(cell.intervals for row in comparison.rows for cell in row.cells),
        style=_part("page.css"),
        script=_part("page.js"),
    )


def source(name: str, *, media: Path | None) -> str:
    """Where a page finds a clip or a picture: beside it, or in itself."""
    if media is None:
        return f"{MEDIA}/{name}"
    kind = TYPES[Path(name).suffix]
    return f"data:{kind};base64,{b64encode((media / name).read_bytes()).decode()}"


def dots(row: Row) -> str:
    """A small drawing of a metric, as SVG: a dot for each run, from the least to the greatest value.

    Where runs have intervals over clips each has a line of its own, so that one can see which overlap.
    """
    runs = [(index, each) for index, cell in enumerate(row.cells) for each in cell.values if math.isfinite(each.value)]
    ends = [end for _, each in runs for end in (each.value, *(each.interval or ()))]
    if len(runs) < 2 or min(ends) == max(ends):
        return ""
    low, span = min(ends), max(ends) - min(ends)
    has_intervals = any(each.interval for _, each in runs)
    height = max(DOTS_HEIGHT, DOTS_STEP * (len(runs) + 1)) if has_intervals else DOTS_HEIGHT

    def x(value: float) -> str:
        return f"{6 + (value - low) / span * (DOTS_WIDTH - 12):.1f}"

    drawn = [] if has_intervals else [f'<line x1="6" y1="9" x2="{DOTS_WIDTH - 6}" y2="9"/>']
    for place, (index, each) in enumerate(runs):
        y, color = (DOTS_STEP * (place + 1) if has_intervals else 9), f"v{index % 8}"
        if each.interval:
            first, last = map(x, each.interval)
            drawn.append(f'<line class="interval {color}" x1="{first}" y1="{y}" x2="{last}" y2="{y}"/>')
        drawn.append(f'<circle class="{color}" cx="{x(each.value)}" cy="{y}" r="{3 if has_intervals else 4}"/>')
    return (
        f'<svg class="dots" viewBox="0 0 {DOTS_WIDTH} {height}" width="{DOTS_WIDTH}" height="{height}" '
        f'role="img" aria-label="from {number(low)} to {number(low + span)}">{"".join(drawn)}</svg>'
    )


def _part(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
