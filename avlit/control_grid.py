"""A grid of clips under several settings: a clip in each row, its references and what each setting makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, LINE, GAP = 128, 20, 6
"""Pixels: a picture's height, a line of text, and what lies between pictures."""


@dataclass(frozen=True)
class Column:
    """One setting: its name, and for each clip a picture uint8 [H, W, 3] and a line of text under it."""

    name: str
    pictures: Sequence[np.ndarray]
    notes: Sequence[str]


def control_grid(path: Path, columns: Sequence[Column]) -> None:
    """A PNG. ValueError: there is no column, or they have different numbers of clips."""
    counts = {len(each) for column in columns for each in (column.pictures, column.notes)}
    if len(counts) != 1:
        raise ValueError(f"control_grid: columns of {sorted(counts)} clips; give each the same clips")
    (count,), font = counts, ImageFont.load_default(size=13)
    widths = [
        max([CELL, *(round(p.shape[1] * CELL / p.shape[0]) for p in column.pictures)]) + GAP for column in columns
    ]
    sheet = Image.new("RGB", (sum(widths), LINE + count * (CELL + LINE)), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for column, width in zip(columns, widths, strict=True):
        draw.text((left + 3, 2), column.name, fill="black", font=font)
        for number, (picture, note) in enumerate(zip(column.pictures, column.notes, strict=True)):
            top = LINE + number * (CELL + LINE)
            smooth = Image.Resampling.NEAREST if picture.shape[0] < CELL else Image.Resampling.LANCZOS
            size = (round(picture.shape[1] * CELL / picture.shape[0]), CELL)
            sheet.paste(Image.fromarray(picture).resize(size, smooth), (left, top))
            draw.text((left + 3, top + CELL + 2), note, fill="black", font=font)
        left += width
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    sheet.save(part, format="PNG")
    part.replace(path)
