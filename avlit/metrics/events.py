"""Are things seen to happen when they are heard? Visible events of the embedded corpus against their onsets.

An event is seen where motion changes at once: a ball turns on the floor, a lamp goes on, a mallet strikes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from avlit.metrics.av_align import audio_peaks
from avlit.metrics.clip import Box, Clip
from avlit.metrics.estimate import Reading, among_others
from avlit.metrics.metric import Measure, Meter, Metric, Tools

LEAST = 0.2
"""Least change of motion, as a share of the clip's greatest, that is an event: a last faint bounce has about that."""

NEAR, WIDE = 1, 3
"""Frames by which what is seen may be off what is heard."""


def visible_events(frames: np.ndarray, mouth_boxes: Sequence[Sequence[Box]] | None = None) -> list[int]:
    """Frames in which something is seen to happen: local maxima of the mean second difference of brightness.

    frames: uint8 [F, H, W, 3]. Mouths, which move all the time, are left out where their boxes are known.
    """
    if len(frames) < 3:
        return []
    grey = frames.astype(np.float32).mean(-1)  # [F, H, W]
    change = np.abs(grey[2:] - 2 * grey[1:-1] + grey[:-2])  # [F - 2, H, W]
    for number, boxes in enumerate((mouth_boxes or [])[1 : len(frames) - 1]):
        for x1, y1, x2, y2 in boxes:
            change[number, int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] = 0
    strength = np.pad(change.mean((1, 2)), 2)  # [F + 2]: frame n is at n + 1
    inner = strength[1:-1]
    is_peak = (inner >= strength[:-2]) & (inner > strength[2:]) & (inner >= LEAST * inner.max()) & (inner > 1e-3)
    return np.flatnonzero(is_peak).tolist()


def event_f1(seen: Sequence[float], heard: Sequence[float], *, within: float) -> float:
    """F1 of two lists of times in one unit; each time is matched once, to the nearest one that is left. 1 for none."""
    free, matched = list(heard), 0
    for time in sorted(seen):
        nearest = min(free, key=lambda other: abs(other - time), default=None)
        if nearest is not None and abs(nearest - time) <= within:
            free.remove(nearest)
            matched += 1
    total = len(seen) + len(heard)
    return 2 * matched / total if total else 1.0


def heard_frames(clip: Clip) -> list[float] | None:
    """The frames in which something is heard; of generated sound its onsets, where nobody speaks. None: not known."""
    if not clip.has_own_sound:
        return [int(time * clip.fps + 1e-6) for time in clip.event_times_s] if clip.event_times_s else None
    if clip.sound is None or clip.num_speakers or not clip.event_times_s:
        return None
    return [int(time * clip.fps) for time in audio_peaks(clip.sound.waveform, clip.rate_hz)]


def _open(tools: Tools) -> Measure:
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None
        heard = heard_frames(clip)
        if heard is None:
            return {}
        seen = visible_events(clip.frames, clip.mouth_boxes)
        both = (float(len(seen)), *map(float, seen), *heard)
        return {
            "event_timing": event_f1(seen, heard, within=WIDE),
            "event_timing_near": event_f1(seen, heard, within=NEAR),
            "event_timing_shuffled": both,
            "event_timing_near_shuffled": both,
        }

    return measure


def _f1_of_others(within: float):
    """How well one clip's visible events fit what another's sound does."""

    def likeness(clip: Reading, other: Reading) -> float:
        assert isinstance(clip, tuple) and isinstance(other, tuple)
        seen, heard = clip[1 : 1 + int(clip[0])], other[1 + int(other[0]) :]
        return event_f1([float(time) for time in seen], [float(time) for time in heard], within=within)

    return among_others(likeness)


METER = Meter("events", _open, ("frames", "event_times_s"))
SOURCE = "exact on the embedded corpus; after MTV, Section 7.3"

METRICS = (
    Metric(
        "event_timing", "F1 of visible events and onsets within three frames", "higher", 0, 1, "", SOURCE, METER
    ),
    Metric(
        "event_timing_shuffled", "the same with other clips' onsets: chance", "none", 0, 1, "", SOURCE, METER,
        summary=_f1_of_others(WIDE),
    ),
    Metric(
        "event_timing_near", "F1 of visible events and onsets within one frame", "higher", 0, 1, "", SOURCE, METER
    ),
    Metric(
        "event_timing_near_shuffled", "the same with other clips' onsets: chance", "none", 0, 1, "", SOURCE, METER,
        summary=_f1_of_others(NEAR),
    ),
)  # fmt: skip
