"""How near a generated picture is to the true one in places, motion and pixels; exact, and without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot, inf

import numpy as np
import torch

from avlit.metrics.clip import Box, Clip
from avlit.metrics.estimate import Reading, share
from avlit.metrics.metric import Measure, Meter, Metric, Tools
from avlit.metrics.picture import psnr


def head_distance(frame: np.ndarray, true: np.ndarray, mouth: Box) -> float | None:
    """Pixels from where a head is in the true frame to where it is most alike in a frame, uint8 [H, W, 3] each.

    Eyes and nose, the part above the true clip's mouth box, are looked for within half a face by normalised
    correlation of brightness, so that another skin or light does not matter. None where that part is not in the frame.
    """
    x1, y1, x2, y2 = mouth
    half = (x2 - x1) / 2
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, right = round(x - 1.3 * half), round(x + 1.3 * half)
    top, bottom = round(y - 2.3 * half), round(y - 0.7 * half)
    height, width = true.shape[:2]
    reach = max(2, round(half))
    if left < 0 or top < 0 or right > width or bottom > height or bottom - top < 3:
        return None
    grey = np.pad(frame.astype(np.float64).mean(-1), reach, mode="edge")
    part = true.astype(np.float64).mean(-1)[top:bottom, left:right]
    part = part - part.mean()
    around = grey[top : bottom + 2 * reach, left : right + 2 * reach]
    windows = np.lib.stride_tricks.sliding_window_view(around, part.shape)  # [2 R + 1, 2 R + 1, h, w]
    windows = windows - windows.mean((2, 3), keepdims=True)
    likeness = (windows * part).sum((2, 3)) / (np.sqrt(np.square(windows).sum((2, 3))) + 1e-6)
    row, column = np.unravel_index(int(likeness.argmax()), likeness.shape)
    return hypot(float(row) - reach, float(column) - reach)


def pose_error(frames: np.ndarray, true: np.ndarray, boxes: Sequence[Sequence[Box]]) -> float | None:
    """Mean distance in pixels of all heads in all frames, uint8 [F, H, W, 3] each; None where no head is seen whole."""
    found = [
        distance
        for frame, real, mouths in zip(frames, true, boxes, strict=True)
        for mouth in mouths
        if (distance := head_distance(frame, real, mouth)) is not None
    ]
    return float(np.mean(found)) if found else None


def mean_change(frames: np.ndarray) -> float:
    """Mean absolute difference of brightness between frames, in levels of 255. frames: uint8 [F, H, W, 3]."""
    return float(np.abs(np.diff(frames.astype(np.float32).mean(-1), axis=0)).mean()) if len(frames) > 1 else 0.0


def _open_pose(tools: Tools) -> Measure:
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.real is not None and clip.frames is not None and clip.pose_boxes is not None
        if clip.real.frames is None or clip.real.frames.shape != clip.frames.shape:
            return {}
        first = clip.num_given
        error = pose_error(clip.frames[first:], clip.real.frames[first:], clip.pose_boxes[first:])
        return {} if error is None else {"pose_error": error}

    return measure


def _open_picture(tools: Tools) -> Measure:
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.real is not None and clip.frames is not None
        if clip.real.frames is None:
            return {}
        readings: dict[str, Reading] = {"motion_ratio": (mean_change(clip.frames), mean_change(clip.real.frames))}
        if clip.num_given and clip.mouth_boxes is not None and clip.frames.shape == clip.real.frames.shape:
            readings["picture_psnr"] = _psnr(clip.frames, clip.real.frames, clip.mouth_boxes, first=clip.num_given)
        return readings

    return measure


def _psnr(frames: np.ndarray, true: np.ndarray, boxes: Sequence[Sequence[Box]], *, first: int) -> float:
    counted = torch.ones(frames.shape[:3], dtype=torch.bool)
    counted[:first] = False
    for number, mouths in enumerate(boxes):
        for x1, y1, x2, y2 in mouths:
            counted[number, int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = False
    made, real = (torch.from_numpy(each).permute(3, 0, 1, 2).float() / 127.5 - 1 for each in (frames, true))
    return psnr(made, real, counted=counted)


SOURCE = "exact where the true clip is known"
PICTURE = Meter("picture", _open_picture, ("frames", "real"))

METRICS = (
    Metric(
        "pose_error", "distance of heads from where they are in the clip whose pose was given", "lower", 0, inf,
        "pixels", SOURCE, Meter("pose", _open_pose, ("frames", "real", "pose_boxes")),
    ),
    Metric(
        "motion_ratio", "change between frames, as a share of the true clips'; 1 is theirs", "none", 0, inf, "",
        SOURCE, PICTURE, summary=share,
    ),
    Metric(
        "picture_psnr", "likeness to the true clip outside the mouths, where its first frame was given", "higher", 0,
        100, "dB", SOURCE, PICTURE,
    ),
)  # fmt: skip
