"""Mouth boxes of real clips: faces are followed from frame to frame, and the box is that of their outer lips.

What JoVA's mouth loss is computed on (Section 3.2.2). Boxes are as found in each frame, not smoothed: the paper does
not smooth them, and the mask encloses those of four frames anyway.

Measured on the first five seconds of six real clips, 608 to 1080 pixels on the shorter side: a mouth in 96 to 100 % of
the frames of each, all three of three people who take a tenth of the picture's height, 37 to 69 frames a second on one
core; where mediapipe itself finds the face, too, boxes overlap its own by 0.83 to 0.97 (intersection over union). Seen
from the side a box is off by up to half a mouth, and mouths behind a hand or a cup are guessed. A head that is turned
away has none.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

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

SHORT_SIDE = 704
"""Pixels of the shorter side, at least, of the pictures that faces are looked for in: shards may be far smaller."""


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
    """Finds the mouths in a stretch of a file. `name` says in words, for people, what finds them."""

    faces: FaceFinder
    name: str = "MediaPipe Face Mesh"

    def in_file(self, path: Path, *, timing: Timing, start_s: float) -> list[list[Box]]:
        """The boxes of a window's frames and persons, in pixels of the window's frames; MediaError as in reading.

        The file is read once more, larger: the window's frames may be too small to find faces in.
        """
        factor = math.ceil(SHORT_SIDE / min(timing.height, timing.width))
        clip = read_clip(
            path,
            fps=timing.fps,
            size=(timing.height * factor, timing.width * factor),  # the same cut of the picture
            rate_hz=None,
            start_s=start_s,
            duration_s=timing.duration_s,
        )
        found = self.find(clip.frames, fps=timing.fps)
        return [[_smaller(box, factor) for box in persons] for persons in found]

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
        kept = [person for person in persons if len(person.boxes) >= least]
        found = [[person.boxes.get(number, UNSEEN) for person in kept] for number in range(len(frames))]
        return [_trimmed(boxes) for boxes in found]

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
        x1, y1, x2, y2 = face.lips
        width, height = picture.size
        x1, x2 = max(x1, 0.0), min(x2, float(width))
        y1, y2 = max(y1, 0.0), min(y2, float(height))
        if x1 < x2 and y1 < y2:
            self.boxes[number] = x1, y1, x2, y2


def build_mouth_finder(name: str) -> MouthFinder | None:
    """`facemesh`; `auto`: the same where it is installed, else None; `none`: None. ConfigError if it is not."""
    if name not in ("auto", "none", "facemesh"):
        raise ConfigError(f"mouths={name}: must be one of auto, none, facemesh")
    if name == "none" or (name == "auto" and not is_installed()):
        return None
    if not is_installed():
        raise ConfigError(f"mouths=facemesh: not installed; {INSTALL}, or give mouths=none")
    return MouthFinder(FaceMesh())


def _at(square: FaceSquare, persons: list[_Person], number: int) -> bool:
    """Whether somebody already seen in this frame is at a place: two faces are not nearer than half of one."""
    return any(
        person.last == number and _distance(square, person.face.square) < person.face.square.face_size / 2
        for person in persons
    )


def _distance(a: FaceSquare, b: FaceSquare) -> float:
    return math.hypot(a.x - b.x, a.y - b.y)


def _smaller(box: Box, factor: int) -> Box:
    x1, y1, x2, y2 = (round(edge / factor, 2) for edge in box)
    return x1, y1, x2, y2


def _trimmed(boxes: list[Box]) -> list[Box]:
    """Without those at the end who are not seen."""
    count = max((place + 1 for place, box in enumerate(boxes) if box != UNSEEN), default=0)
    return boxes[:count]
