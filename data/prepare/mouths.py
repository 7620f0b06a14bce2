"""Mouth boxes of real clips: faces are followed from frame to frame, and the box is that of their outer lips.

What JoVA's mouth loss is computed on (Section 3.2.2). Boxes are as found in each frame, not smoothed: the paper does
not smooth them, and the mask encloses those of four frames anyway.

Measured on the first five seconds of six real clips: a mouth in 96 to 100 % of the frames of each, all three of three
people who take a tenth of the picture's height, 45 to 89 frames a second on one core; where mediapipe itself finds the
face, too, boxes overlap its own by 0.83 to 0.97 (intersection over union). Seen from the side a box is off by up to
half a mouth, and a mouth behind a hand or a cup is guessed. A head that is turned away has none.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from avlit.durable import write_atomically
from avlit.errors import ConfigError
from avlit.media import read_clip
from avlit.timing import Timing
from data.prepare.face_mesh import INSTALL, Face, FaceMesh, FaceSquare, is_installed

Box = tuple[float, float, float, float]
UNSEEN: Box = (0.0, 0.0, 0.0, 0.0)
"""Stands for a person who is not seen in a frame, so that those after keep their places."""

SEARCH_S = 0.25
"""Seconds after which new faces are looked for; those known are followed in every frame."""

LEAST_S = 0.25
"""A face that is seen for less than this in all is taken for a mistake."""

_SOURCES = (Path(__file__), Path(__file__).with_name("face_mesh.py"))
SHORT_SIDE = 704
"""Pixels of the shorter side, at most, of the pictures that faces are looked for in."""


class FaceFinder(Protocol):
    """Finds faces in one picture, and the mesh of a face where one is known to be."""

    def detect(self, picture: Image.Image) -> list[FaceSquare]:
        """Every face in a picture, surest first."""
        ...

    def look(self, picture: Image.Image, square: FaceSquare) -> Face | None:
        """The face in a square of a picture, or None where there is none."""
        ...


@dataclass(frozen=True)
class MouthFinder:
    """Finds the mouths in a stretch of a file.

    name: says in words, for people, what finds them. cache: a folder that keeps what was found, by the file's contents
    and the window, so that clips that are prepared again are not searched again; None keeps nothing.
    """

    faces: FaceFinder
    name: str = "MediaPipe Face Mesh"
    cache: Path | None = None

    def in_file(self, path: Path, *, timing: Timing, start_s: float) -> list[list[Box]]:
        """The boxes of a window's frames and persons, in pixels of the window's frames; MediaError as in reading.

        Faces are looked for in the whole picture of the file, read once more: a window's frames may be too small for
        it, and what they cut off, such as a forehead, is needed to find what they keep.
        """
        if self.cache is None:
            return self._in_file(path, timing=timing, start_s=start_s)
        kept = self.cache / f"{self._key(path, timing=timing, start_s=start_s)}.json"
        if (boxes := _read_boxes(kept, num_frames=timing.num_frames)) is not None:
            return boxes
        boxes = self._in_file(path, timing=timing, start_s=start_s)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(boxes))
        return boxes

    def _key(self, path: Path, *, timing: Timing, start_s: float) -> str:
        """A hash of all that decides a window's boxes: the file's bytes, the window, what finds them, this code."""
        window = (start_s, timing.fps, timing.num_frames, timing.height, timing.width)
        digest = hashlib.sha256(json.dumps([self.name, *window]).encode())
        for source in (path, *_SOURCES):
            with source.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:32]

    def _in_file(self, path: Path, *, timing: Timing, start_s: float) -> list[list[Box]]:
        whole = read_clip(path, rate_hz=None, start_s=start_s, duration_s=1e-3).frames.shape[1:3]
        scale = min(1.0, SHORT_SIDE / min(whole))
        size = round(whole[0] * scale), round(whole[1] * scale)
        clip = read_clip(
            path, fps=timing.fps, size=size, rate_hz=None, start_s=start_s, duration_s=timing.duration_s
        )  # fmt: skip
        found = self.find(clip.frames, fps=timing.fps)
        cut = [[_cut(box, whole, size, (timing.height, timing.width)) for box in persons] for persons in found]
        return _places([{place: box for place, box in enumerate(boxes) if box} for boxes in cut])

    def find(self, frames: np.ndarray, *, fps: float) -> list[list[Box]]:
        """Frames uint8 [F, H, W, 3] -> each frame's boxes (x1, y1, x2, y2) in pixels, cut to the picture.

        A place in the lists is a person, in the order in which they are first seen, from left to right; one who is not
        seen in a frame has UNSEEN there, which is left out at the end of a list.
        """
        persons: list[_Person] = []
        every = max(1, round(SEARCH_S * fps))
        for number, frame in enumerate(frames):
            picture = Image.fromarray(frame)
            was_lost = self._follow(picture, number, persons)
            if was_lost or number % every == 0:
                self._search(picture, number, persons)
        least = min(len(frames), math.ceil(LEAST_S * fps))
        kept = [person.boxes for person in persons if len(person.boxes) >= least]
        return _places([
            {place: boxes[number] for place, boxes in enumerate(kept) if number in boxes}
            for number in range(len(frames))
        ])  # fmt: skip

    def _follow(self, picture: Image.Image, number: int, persons: list["_Person"]) -> bool:
        """Looks for everyone seen in the frame before, where they were; whether somebody was lost."""
        following = [person for person in persons if person.last == number - 1]
        for person in following:
            face = self.faces.look(picture, person.face.square)
            if face is not None and not _at(face.square, persons, number):
                person.see(face, number, picture)
        return any(person.last < number for person in following)

    def _search(self, picture: Image.Image, number: int, persons: list["_Person"]) -> None:
        """Looks for everyone in the whole picture who was not followed into it."""
        new: list[Face] = []
        for square in self.faces.detect(picture):
            first = None if _at(square, persons, number) else self.faces.look(picture, square)
            face = None if first is None else self.faces.look(picture, first.square)  # as when it is followed
            if face is None or _at(face.square, persons, number):
                continue
            lost = [(_distance(face.square, each.face.square), each) for each in persons if each.last < number]
            distance, nearest = min(lost, key=lambda pair: pair[0], default=(0.0, None))
            if nearest is not None and distance < nearest.face.square.face_size:
                nearest.see(face, number, picture)
            elif not any(_distance(face.square, each.square) < each.square.face_size / 2 for each in new):
                new.append(face)
        for face in sorted(new, key=lambda face: face.square.x):
            persons.append(_Person(face, number, picture))


class _Person:
    """One face through a stretch. boxes: frame -> box of the lips; last: the frame it was last seen in."""

    def __init__(self, face: Face, number: int, picture: Image.Image) -> None:
        self.boxes: dict[int, Box] = {}
        self.see(face, number, picture)

    def see(self, face: Face, number: int, picture: Image.Image) -> None:
        """Takes note of the face in a frame."""
        self.face, self.last = face, number
        if box := _inside(face.lips, height=picture.height, width=picture.width):
            self.boxes[number] = box


def _read_boxes(path: Path, *, num_frames: int) -> list[list[Box]] | None:
    """What was kept of a window; None where there is nothing, or something else than a window's boxes."""
    try:
        frames = json.loads(path.read_text(encoding="utf-8"))
        boxes = [[(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in persons] for persons in frames]
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return boxes if len(boxes) == num_frames else None


def build_mouth_finder(name: str, *, cache: Path | None = None) -> MouthFinder | None:
    """`facemesh`; `auto`: the same where it is installed, else None; `none`: None. ConfigError if it is not.

    cache: see `MouthFinder`.
    """
    if name not in ("auto", "none", "facemesh"):
        raise ConfigError(f"mouths={name}: must be one of auto, none, facemesh")
    if name == "none" or (name == "auto" and not is_installed()):
        return None
    if not is_installed():
        raise ConfigError(f"mouths=facemesh: not installed; {INSTALL}, or give mouths=none")
    return MouthFinder(FaceMesh(), cache=cache)


def _at(square: FaceSquare, persons: list[_Person], number: int) -> bool:
    """Whether somebody already seen in this frame is at a place: two faces are not nearer than half of one."""
    return any(
        person.last == number and _distance(square, person.face.square) < person.face.square.face_size / 2
        for person in persons
    )


def _distance(a: FaceSquare, b: FaceSquare) -> float:
    return math.hypot(a.x - b.x, a.y - b.y)


def _cut(box: Box, whole: tuple[int, int], size: tuple[int, int], window: tuple[int, int]) -> Box | None:
    """A box in a picture of a size, H and W, -> where it is when the whole picture covers a window, centred.

    None where that leaves nothing of it. whole: size of the picture that both are made from, as `read_clip` does.
    """
    factor = max(window[0] / whole[0], window[1] / whole[1])
    edges = []
    for low, high, length, scaled, limit in zip(box[:2], box[2:], whole[::-1], size[::-1], window[::-1], strict=True):
        covering = max(limit, round(length * factor))
        edges.append([edge * covering / scaled - (covering - limit) // 2 for edge in (low, high)])
    (x1, x2), (y1, y2) = edges
    return _inside((x1, y1, x2, y2), height=window[0], width=window[1])


def _inside(box: Box, *, height: int, width: int) -> Box | None:
    """The part of a box that is in the picture, to a hundredth of a pixel; None where nothing is."""
    x1, y1, x2, y2 = (round(edge, 2) for edge in box)
    x1, x2 = max(x1, 0.0), min(x2, float(width))
    y1, y2 = max(y1, 0.0), min(y2, float(height))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _places(frames: list[dict[int, Box]]) -> list[list[Box]]:
    """Boxes of each frame by person -> lists in which a place is a person who is seen at all."""
    persons = sorted(set().union(*frames))
    return [
        [boxes.get(person, UNSEEN) for person in persons if any(later in boxes for later in persons if later >= person)]
        for boxes in frames
    ]
