"""What moves in real pictures: lips with speech, optical flow, cuts. By OpenCV, a face mesh and PySceneDetect."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import inf

import numpy as np

from avlit.metrics.av_align import OPENCV
from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading
from avlit.metrics.lip_sync import speech_envelope
from avlit.metrics.metric import Measure, Meter, Metric, Package, Tool, Tools
from avlit.metrics.mouths import best_lag

FURTHEST = 15
"""Frames of lag that are tried, as SyncNet tries them."""

LEAST_SEEN = 0.5
"""Share of frames in which a face must be found."""


def lip_motion(opening: np.ndarray, waveform: np.ndarray) -> tuple[int, float] | None:
    """Lag in frames, above 0 where the mouth is late, and height of the greatest correlation of a mouth's opening [F]
    (NaN where none is seen) with the sound's level in dB. None where a face is in too few frames."""
    seen = np.isfinite(opening)
    if seen.mean() < LEAST_SEEN or len(opening) < 4:
        return None
    frames = np.arange(len(opening))
    mouth = np.interp(frames, frames[seen], opening[seen])
    level = 20 * np.log10(np.maximum(speech_envelope(waveform, num_frames=len(opening)), 1e-3))
    return best_lag(mouth, level, furthest=min(FURTHEST, len(opening) // 4))


def _open_lips(tools: Tools) -> Measure:
    find = tools.mouth_opening
    assert find is not None

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None and clip.sound is not None
        found = lip_motion(find(clip.frames), clip.sound.waveform)
        return {} if found is None else {"lip_motion": found[1], "lip_motion_lag": float(found[0])}

    return measure


def flows(frames: np.ndarray) -> Iterator[np.ndarray]:
    """Dense inverse search flow from each frame to the next, float32 [H, W, 2] in pixels; frames: uint8 [F, H, W, 3].

    One at a time: those of 20 s at 1920 x 1080 would take 8 GB.
    """
    cv2 = importlib.import_module("cv2")
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames)
    for before, after in pairwise(grey):
        yield search.calc(before, after, None)


def _open_flow(tools: Tools) -> Measure:
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None
        if len(clip.frames) < 3:
            return {}
        lengths: list[float] = []
        changes: list[float] = []
        before: np.ndarray | None = None
        for flow in flows(clip.frames):
            lengths.append(float(np.linalg.norm(flow, axis=-1).mean()))
            if before is not None:
                changes.append(float(np.linalg.norm(flow - before, axis=-1).mean()))
            before = flow
        motion, change = float(np.mean(lengths)), float(np.mean(changes))
        return {"flow_motion": motion, **({"flow_jerk": change / motion} if motion > 1e-3 else {})}

    return measure


def _open_cuts(tools: Tools) -> Measure:
    scenedetect = importlib.import_module("scenedetect")

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None
        detector = scenedetect.ContentDetector()
        cuts = [
            cut
            for number, frame in enumerate(clip.frames)
            for cut in detector.process_frame(
                scenedetect.FrameTimecode(number, clip.fps), np.ascontiguousarray(frame[..., ::-1])
            )
        ]
        return {"shot_cuts": float(len(cuts))}

    return measure


FACES = Tool(
    "mouth_opening",
    "clips of real faces and a face mesh: `uv pip install ai-edge-litert` and `uv pip install --no-deps "
    "mediapipe==0.10.21`; on the embedded corpus lip_sync is measured",
)
SCENES = Package("scenedetect", "uv pip install 'avlit[eval-video]'")
LIPS = Meter("lip_motion", _open_lips, ("frames", "sound"), (FACES,))
FLOW = Meter("flow", _open_flow, ("frames",), (OPENCV,))

METRICS = (
    Metric(
        "lip_motion", "greatest correlation of a real mouth's opening with the sound's level within 15 frames",
        "higher", -1, 1, "", "a check of plausibility, no SyncNet", LIPS, ("Sync-C", "LSE-C"),
    ),
    Metric(
        "lip_motion_lag", "by how much the mouth is late there", "none", -FURTHEST, FURTHEST, "frames",
        "as lip_motion", LIPS,
    ),
    Metric(
        "flow_motion", "mean length of optical flow, by DIS", "none", 0, inf, "pixels a frame",
        "DIS (Kroeger et al. 2016)", FLOW, ("Dynamic Degree", "MS"),
    ),
    Metric(
        "flow_jerk", "change of flow from frame to frame over its length; steady motion has 0", "lower", 0, inf, "",
        "DIS (Kroeger et al. 2016)", FLOW, ("Motion Smoothness",),
    ),
    Metric(
        "shot_cuts", "cuts in a clip", "none", 0, inf, "", "PySceneDetect, content detector",
        Meter("cuts", _open_cuts, ("frames",), (SCENES, OPENCV)),
    ),
)  # fmt: skip
