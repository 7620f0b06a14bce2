"""The painter of the embedded corpus: soft-edged ellipses and boxes, all frames of a clip at once, back to front."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

PerFrame = float | np.ndarray
"""A number, or one number a frame [F]."""

Colour = tuple[float, float, float] | np.ndarray
"""RGB in 0..255: three numbers, or one triple a frame [3, F]."""

SLIM = 4.0


@dataclass(frozen=True, eq=False)
class Layer:
    """One shape: centre and half sizes in pixels, RGB colour, opacity; depth 1 is nearest, None leaves depth alone.

    "glow" is an ellipse that fades from its centre to its rim.
    """

    shape: Literal["ellipse", "box", "glow"]
    cx: PerFrame
    cy: PerFrame
    rx: PerFrame
    ry: PerFrame
    colour: Colour
    depth: float | None = None
    opacity: PerFrame = 1.0

    @property
    def is_still(self) -> bool:
        """Whether the layer looks the same in all frames."""
        numbers = (self.cx, self.cy, self.rx, self.ry, self.opacity)
        return not any(isinstance(number, np.ndarray) for number in numbers) and np.ndim(self.colour) == 1


def paint_clip(layers: Sequence[Layer], *, num_frames: int, height: int, width: int) -> np.ndarray:
    """Layers, back to front -> float32 [3, F, H, W] in 0..255."""
    return _paint_all(layers, [layer.colour for layer in layers], 3, num_frames, height, width)


def paint_depth(layers: Sequence[Layer], *, num_frames: int, height: int, width: int) -> np.ndarray:
    """Layers, back to front -> float32 [F, H, W] in 0..1, 1 nearest; layers without a depth are left out."""
    solid = [layer for layer in layers if layer.depth is not None]
    return _paint_all(solid, [(layer.depth,) for layer in solid], 1, num_frames, height, width)[0]


def to_uint8(canvas: np.ndarray) -> np.ndarray:
    """float32 [3, F, H, W] in 0..255 -> uint8 [F, H, W, 3]; works in place on the canvas."""
    np.clip(canvas, 0, 255, out=canvas)
    canvas += 0.5
    frames = np.empty((*canvas.shape[1:], len(canvas)), np.uint8)  # [F, H, W, 3]
    for channel, plane in enumerate(canvas):
        frames[..., channel] = plane
    return frames


def _paint_all(layers: Sequence[Layer], values: Sequence, channels: int, *shape: int) -> np.ndarray:
    num_frames, height, width = shape
    still = 0
    while still < len(layers) and layers[still].is_still:
        still += 1
    picture = np.zeros((channels, 1, height, width), np.float32)
    for layer, value in zip(layers[:still], values[:still], strict=True):
        _paint(picture, layer, value)
    canvas = np.repeat(picture, num_frames, axis=1)  # [C, F, H, W]
    for layer, value in zip(layers[still:], values[still:], strict=True):
        _paint(canvas, layer, value)
    return canvas


def _paint(canvas: np.ndarray, layer: Layer, values: Colour | Sequence) -> None:
    """Blend one layer into the canvas [C, F, H, W], touching only the box that holds it in all frames."""
    height, width = canvas.shape[2:]
    cx, cy, rx, ry = (
        np.asarray(number, np.float32).reshape(-1, 1, 1) for number in (layer.cx, layer.cy, layer.rx, layer.ry)
    )  # [F or 1, 1, 1]
    x0, x1 = max(0, int((cx - rx).min()) - 1), min(width, int((cx + rx).max()) + 3)
    y0, y1 = max(0, int((cy - ry).min()) - 1), min(height, int((cy + ry).max()) + 3)
    if x0 >= x1 or y0 >= y1:
        return
    dx = np.arange(x0 + 0.5, x1, dtype=np.float32) - cx  # [F, 1, w]: pixel i has its centre at i + 0.5
    dy = np.arange(y0 + 0.5, y1, dtype=np.float32)[:, None] - cy  # [F, h, 1]
    alpha = _box(dx, dy, rx, ry) if layer.shape == "box" else _ellipse(dx, dy, rx, ry, fades=layer.shape == "glow")
    if not isinstance(layer.opacity, float) or layer.opacity != 1.0:
        alpha = alpha * np.asarray(layer.opacity, np.float32).reshape(-1, 1, 1)
    for plane, value in zip(canvas, values, strict=True):
        region = plane[:, y0:y1, x0:x1]  # [F, h, w]
        change = np.asarray(value, np.float32).reshape(-1, 1, 1) - region
        change *= alpha
        region += change


def _box(dx: np.ndarray, dy: np.ndarray, rx: np.ndarray, ry: np.ndarray) -> np.ndarray:
    return np.clip(rx + 0.5 - np.abs(dx), 0, 1) * np.clip(ry + 0.5 - np.abs(dy), 0, 1)


def _ellipse(dx: np.ndarray, dy: np.ndarray, rx: np.ndarray, ry: np.ndarray, *, fades: bool) -> np.ndarray:
    inside = 1 - ((dx / rx) ** 2 + (dy / ry) ** 2)  # 1 at the centre, 0 on the rim
    if fades:
        return np.clip(inside, 0, 1)
    smaller = np.minimum(rx, ry)
    if smaller.min() < SLIM:
        # first-order distance to the rim: a nearly closed mouth must not smear sideways
        inside /= 2 * np.sqrt((dx / rx**2) ** 2 + (dy / ry**2) ** 2) + 1e-3
    else:
        inside *= smaller / 2
    inside += 0.5
    return np.clip(inside, 0, 1, out=inside)
