"""The embedded corpus: a small world of talking heads, sounding objects and music, whose truth is known exactly."""

from data.corpus.clips import TRACKS, make_clip
from data.corpus.conditions import control_frames, depth_frames, pose_frames, reference_audio, reference_image
from data.corpus.settings import CorpusSettings, identity

__all__ = [
    "TRACKS", "CorpusSettings", "control_frames", "depth_frames", "identity", "make_clip", "pose_frames",
    "reference_audio", "reference_image",
]  # fmt: skip
