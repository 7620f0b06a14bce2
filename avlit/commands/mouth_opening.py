"""How far a real speaker's mouth is open, frame by frame, by MediaPipe's face mesh."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from data.prepare.face_mesh import Face, FaceMesh, is_installed

UPPER_LIP, LOWER_LIP, FOREHEAD, CHIN = 13, 14, 10, 152
"""Points of the mesh: the inner edges of the lips, and the ends of the face."""


def mouth_opening_finder() -> Callable[[np.ndarray], np.ndarray] | None:
    """What finds it, see `Tools.mouth_opening`; None where the mesh is not installed."""
    if not is_installed():
        return None
    mesh = FaceMesh()
    return lambda frames: mouth_openings(frames, mesh)


def mouth_openings(frames: np.ndarray, mesh: FaceMesh) -> np.ndarray:
    """Distance of the lips over the height of the face, of the surest face in each frame, [F]; NaN without one.

    frames: uint8 [F, H, W, 3]. A face that was found is followed; where it is lost, it is looked for anew.
    """
    found, face = np.full(len(frames), np.nan), None
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        face = None if face is None else mesh.look(picture, face.square)
        if face is None and (squares := mesh.detect(picture)):
            face = mesh.look(picture, squares[0])
        if face is not None:
            found[number] = opening(face)
    return found


def opening(face: Face) -> float:
    """Distance of the lips over the height of the face."""
    upper, lower, top, chin = (face.points[point] for point in (UPPER_LIP, LOWER_LIP, FOREHEAD, CHIN))
    return math.dist(upper, lower) / math.dist(top, chin)
