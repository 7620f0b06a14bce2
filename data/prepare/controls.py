"""Depth, pose and reference image of real clips: from files beside them, or from annotators that are installed.

Beside a clip NAME lie `NAME.depth.mp4` and `NAME.pose.mp4`, as long and of the same shape as the clip, in any size;
`NAME.mask.png` is 0 where the background is, of `NAME.reference.png` or else of the clip's first frame, and what it
keeps, before grey, is the reference image. A `NAME.reference.png` without a mask is taken as it is.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from avlit.errors import ConfigError
from avlit.media import MediaError, probe, read_clip, read_image
from avlit.timing import Timing
from data.prepare.descriptions import Rejected
from data.prepare.windows import Window, reason
from data.sample import CONTROLS

CONTROL_FILES = {
    "reference_image": ("mask.png", "reference.png"),
    "depth": ("depth.mp4",),
    "pose": ("pose.mp4",),
}
"""What follows a clip's name, with a dot, in the names of the files that a control is made from."""

ANNOTATORS = "avlit.annotators"
"""The group of entry points under which a package offers its annotators."""

GREY = 128
"""The background of a reference image: the middle of what codecs are given."""

ASPECT_SLACK = 0.02
"""Width over height may differ by this share: estimators work in multiples of 14 or 32 pixels."""


class Annotator(Protocol):
    """Makes one control of the clips that have no file for it: an estimator of depth or pose, or a segmenter.

    To add one, a package declares an entry point of the group `avlit.annotators`, `NAME = "module:function"`, whose
    function takes nothing and returns an Annotator; `just prepare annotators=NAME` then uses it.
    control: one of CONTROLS. name: what people know it by; it is written beside every sample.
    """

    control: str
    name: str

    def annotate(self, frames: np.ndarray, *, fps: float) -> np.ndarray | None:
        """A window's frames uint8 [F, H, W, 3] -> the control, or None where they show none.

        Depth (white is nearest) and pose are uint8 [F, H, W, 3], a reference image, before GREY, uint8 [H, W, 3].
        """
        ...


class ClipControls:
    """The controls of one file, window by window. Raises Rejected where a file beside it does not fit it.

    names: those that are read; annotators: make those of them that have no file. origins: control -> what it is from.
    """

    def __init__(self, path: Path, *, names: Collection[str], timing: Timing, annotators: Sequence[Annotator]) -> None:
        self._timing, self._size = timing, (timing.height, timing.width)
        self._videos: dict[str, Path] = {}
        self._still: np.ndarray | None = None
        self.origins: dict[str, str] = {}
        for name in names:
            there = [file for suffix in CONTROL_FILES[name] if (file := beside(path, suffix)).exists()]
            if there:
                self.origins[name] = " and ".join(file.name for file in there)
        self._annotators = [each for each in annotators if each.control in names and each.control not in self.origins]
        if not self.origins:
            self._name_annotators()
            return
        try:
            first = read_clip(path, rate_hz=None, duration_s=1e-3).frames[0]
            self._length_s, self._frame_s = _picture_s(path), 1 / (probe(path).fps or timing.fps)
        except MediaError as error:
            raise Rejected(reason(path, error)) from error
        for name in self.origins:
            if name == "reference_image":
                self._still = _reference_image(path, first, self._size)
            else:
                self._videos[name] = self._checked_video(beside(path, CONTROL_FILES[name][0]), first)
        self._name_annotators()

    def of_window(self, window: Window) -> dict[str, np.ndarray]:
        """Those that the window has: depth and pose uint8 [F, H, W, 3], reference_image uint8 [H, W, 3].

        Raises Rejected where a file breaks off.
        """
        assert window.frames is not None
        found = {name: self._read(video, window.start_s) for name, video in self._videos.items()}
        if self._still is not None:
            found["reference_image"] = self._still
        for annotator in self._annotators:
            pictures = annotator.annotate(window.frames, fps=self._timing.fps)
            if pictures is not None:
                found[annotator.control] = pictures
        return found

    def _name_annotators(self) -> None:
        self.origins |= {each.control: each.name for each in self._annotators}

    def _checked_video(self, video: Path, frame: np.ndarray) -> Path:
        """A video beside the clip, if it is as long and of the same shape as the clip."""
        try:
            length_s, fps = _picture_s(video), probe(video).fps
            shown = read_clip(video, rate_hz=None, duration_s=1e-3).frames[0]
        except MediaError as error:
            raise Rejected(f"{video.name}: {reason(video, error)}") from error
        slack_s = max(self._frame_s, 1 / (fps or self._timing.fps)) + 1e-3
        if abs(length_s - self._length_s) > slack_s:
            raise Rejected(
                f"{video.name}: {length_s:.2f} s long, the clip {self._length_s:.2f} s; it must fit to a frame "
                f"({slack_s:.3f} s)"
            )
        _check_aspect(video, shown, frame, "the clip")
        return video

    def _read(self, video: Path, start_s: float) -> np.ndarray:
        """A window's part of a video beside the clip, uint8 [F, H, W, 3]."""
        timing = self._timing
        try:
            frames = read_clip(
                video, fps=timing.fps, size=self._size, rate_hz=None, start_s=start_s, duration_s=timing.duration_s
            ).frames
        except MediaError as error:
            raise Rejected(f"{video.name}: {reason(video, error)}") from error
        lacking = timing.num_frames - len(frames)
        if lacking > math.ceil(timing.fps * self._frame_s):  # a frame less is within what was allowed
            raise Rejected(f"{video.name}: ends before the picture")
        return np.concatenate([frames, np.repeat(frames[-1:], max(lacking, 0), axis=0)])


def beside(path: Path, suffix: str) -> Path:
    """`clips/NAME.mp4`, `depth.mp4` -> `clips/NAME.depth.mp4`."""
    return path.with_name(f"{path.stem}.{suffix}")


def controls_there(clips: Iterable[Path], names: Collection[str], annotators: Sequence[Annotator]) -> tuple[str, ...]:
    """Those of `names` that any of the clips has a file for, or that an annotator makes, in the order of CONTROLS."""
    made = {annotator.control for annotator in annotators}
    clips = list(clips)
    return tuple(
        name
        for name in CONTROLS
        if name in names
        and (
            name in made or any(beside(clip, suffix).exists() for clip in clips for suffix in CONTROL_FILES[name])
        )
    )  # fmt: skip


def build_annotators(names: str) -> tuple[Annotator, ...]:
    """The installed annotators of a list with commas; ConfigError for one that is not there, or two of one control."""
    installed = {entry.name: entry for entry in entry_points(group=ANNOTATORS)}
    annotators: dict[str, Annotator] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in installed:
            raise ConfigError(
                f"annotators={name}: not installed; there are {', '.join(sorted(installed)) or 'none'} (a package adds "
                f"its own by an entry point of the group {ANNOTATORS}, see data/prepare/controls.py)"
            )
        annotator = installed[name].load()()
        if annotator.control not in CONTROLS:
            raise ConfigError(f"annotators={name}: makes {annotator.control!r}, none of {', '.join(CONTROLS)}")
        if annotator.control in annotators:
            raise ConfigError(f"annotators={names}: two of them make {annotator.control}; keep one")
        annotators[annotator.control] = annotator
    return tuple(annotators.values())


def _picture_s(path: Path) -> float:
    """Seconds that a file's picture lasts; MediaError where it has none."""
    seconds = probe(path).picture_s
    if seconds is None:
        raise MediaError(f"{path}: has no video stream")
    return seconds


def _reference_image(path: Path, first: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What the mask keeps of the reference picture, else of the clip's first frame, before grey: uint8 [H, W, 3]."""
    mask_path, given_path = (beside(path, suffix) for suffix in CONTROL_FILES["reference_image"])
    picture, shown = first, "the clip's first frame"
    if given_path.exists():
        picture, shown = _picture(given_path), given_path.name
        _check_aspect(given_path, picture, first, "the clip")
    if mask_path.exists():
        mask = _picture(mask_path)
        _check_aspect(mask_path, mask, picture, shown)
        kept = Image.fromarray(mask.any(axis=-1))  # [h, w]
        is_kept = np.asarray(kept.resize((picture.shape[1], picture.shape[0]), Image.Resampling.NEAREST))
        if not is_kept.any():
            raise Rejected(f"{mask_path.name}: is 0 everywhere, so nothing of {shown} would be kept")
        picture = np.where(is_kept[..., None], picture, np.uint8(GREY))
    return fit_picture(picture, size)


def fit_picture(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A reference image uint8 [h, w, 3] scaled to cover `size` (height, width) and cut around the centre."""
    fitted = ImageOps.fit(Image.fromarray(np.ascontiguousarray(picture)), (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.array(fitted)  # of its own memory: Pillow's may not be written to


def _picture(path: Path) -> np.ndarray:
    try:
        return read_image(path, size=None)
    except MediaError as error:
        raise Rejected(f"{path.name}: {reason(path, error)}") from error


def _check_aspect(path: Path, picture: np.ndarray, other: np.ndarray, name: str) -> None:
    """Rejected where a picture [h, w, 3] cannot be laid over another one by scaling it."""
    (height, width), (other_height, other_width) = picture.shape[:2], other.shape[:2]
    if abs(width * other_height / (height * other_width) - 1) > ASPECT_SLACK:
        raise Rejected(
            f"{path.name}: {width}x{height} pixels, {name} has {other_width}x{other_height}; it must be of the same "
            "shape, in any size"
        )
