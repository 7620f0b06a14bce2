"""From mouth boxes in pixels to the latent cells that the mouth loss weighs more (JoVA, Section 3.2.2)."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from avlit.timing import Timing

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels, x2 and y2 exclusive; one without width or height says that a mouth is not seen."""

BOX_COLOUR = (0, 255, 0)


def mouth_mask(boxes: Sequence[Sequence[Box]], *, timing: Timing, sample: str) -> Tensor:
    """Mouth boxes of each frame and person -> the latent cells they touch, bool [T, h, w].

    Of each person, the smallest box around those of all frames of a latent frame's window ({0}, {1..4}, {5..8}, ... at
    a factor of 4; Eq. 5), divided by the spatial factor, rounded outwards. A person is a place in the frames' lists.
    Cells of several persons are united; where no mouth is seen no cell is set. What lies outside the frame is no
    mouth. Raises ValueError naming `sample` unless there is a list for every frame and every box is four finite
    numbers in order.
    """
    if len(boxes) != timing.num_frames:
        raise ValueError(f"sample {sample}: has mouth boxes of {len(boxes)} frames, but {timing.num_frames} frames")
    around: dict[tuple[int, int], Box] = {}  # (latent frame, person) -> the box around the window's boxes
    for frame, person, box in _seen(boxes, height=timing.height, width=timing.width, sample=sample):
        place = timing.latent_frame_of(frame), person
        x1, y1, x2, y2 = around.get(place, box)
        around[place] = min(x1, box[0]), min(y1, box[1]), max(x2, box[2]), max(y2, box[3])
    mask = torch.zeros(timing.latent_frames, *timing.latent_size, dtype=torch.bool)  # [T, h, w]
    factor = timing.spatial_factor
    for (latent_frame, _), (x1, y1, x2, y2) in around.items():
        rows = slice(math.floor(y1 / factor), math.ceil(y2 / factor))
        columns = slice(math.floor(x1 / factor), math.ceil(x2 / factor))
        mask[latent_frame, rows, columns] = True
    return mask


def mouth_coverage(mask: Tensor) -> Tensor:
    """The share of cells that are mouth, of masks [..., T, h, w]: [...] from 0 to 1."""
    return mask.float().mean((-3, -2, -1))


def draw_boxes(
    frames: np.ndarray, boxes: Sequence[Sequence[Box]], *, colour: tuple[int, int, int] = BOX_COLOUR
) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] -> a copy with the outline of every mouth box, a pixel wide and 2 on large frames.

    An outline lies on the outermost pixels that its box touches. ValueError unless there is a list for every frame.
    """
    if len(boxes) != len(frames):
        raise ValueError(f"mouth boxes of {len(boxes)} frames, but {len(frames)} frames")
    drawn = frames.copy()
    height, width = frames.shape[1:3]
    thick = 1 if min(height, width) < 360 else 2
    for frame, _, (x1, y1, x2, y2) in _seen(boxes, height=height, width=width, sample="to draw"):
        top, left, bottom, right = math.floor(y1), math.floor(x1), math.ceil(y2), math.ceil(x2)
        box = drawn[frame, top:bottom, left:right]
        inside = box[thick:-thick, thick:-thick].copy()
        box[:] = colour
        box[thick:-thick, thick:-thick] = inside
    return drawn


def _seen(boxes: Sequence[Sequence[Box]], *, height: int, width: int, sample: str) -> Iterator[tuple[int, int, Box]]:
    """Frame, person and box, cut to the frame, of every mouth that is seen."""
    for frame, persons in enumerate(boxes):
        for person, box in enumerate(persons):
            try:
                x1, y1, x2, y2 = map(float, box)
                is_box = x1 <= x2 and y1 <= y2 and all(map(math.isfinite, (x1, y1, x2, y2)))
            except (TypeError, ValueError):
                is_box = False
            if not is_box:
                raise ValueError(
                    f"sample {sample}: mouth box {box!r:.80} of frame {frame}, person {person}: must be four finite "
                    "numbers x1, y1, x2, y2 with x1 <= x2 and y1 <= y2"
                )
            x1, x2 = max(x1, 0.0), min(x2, float(width))
            y1, y2 = max(y1, 0.0), min(y2, float(height))
            if x1 < x2 and y1 < y2:
                yield frame, person, (x1, y1, x2, y2)
