"""MediaPipe's face detector and face mesh: where faces are in one picture, and the outline of their lips.

The weights (BlazeFace's full range and the mesh of 468 points, Apache-2.0) lie in mediapipe 0.10.21's wheel, the newest
that has them, and are run by `ai-edge-litert`, both of Google. mediapipe's own code is not imported: it needs numpy 1
and a protobuf older than MLflow's. Its wheels are for Python up to 3.12.
"""

import importlib
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

RUNTIME, WEIGHTS = "ai_edge_litert", "mediapipe"
DETECTOR, MESH = "face_detection/face_detection_full_range_sparse.tflite", "face_landmark/face_landmark.tflite"
INSTALL = "`uv pip install ai-edge-litert` and `uv pip install --no-deps mediapipe==0.10.21`"

LEAST_SCORE = 0.5
"""Below it there is no face, for the detector and for the mesh; MediaPipe's own threshold."""

MARGIN = 1.5
"""How much larger than a face the square is that the mesh looks at, as the mesh was trained."""

LIPS = (0, 17, 37, 39, 40, 61, 84, 91, 146, 181, 185, 267, 269, 270, 291, 314, 321, 375, 405, 409)
"""Points of the mesh on the outer edge of the lips."""

_EYES = (33, 263)
"""Points at the outer corners of the eyes: their line says how a head is tilted."""


@dataclass(frozen=True)
class FaceSquare:
    """Where a face is looked at: centre and side in pixels, and the angle in radians by which the head is tilted."""

    x: float
    y: float
    side: float
    angle: float

    @classmethod
    def around(cls, points: np.ndarray, eyes: np.ndarray) -> "FaceSquare":
        """The square with MediaPipe's margin around points [N, 2], upright for a face with these eyes [2, 2]."""
        low, high = points.min(0), points.max(0)
        x, y = (low + high) / 2
        (left_x, left_y), (right_x, right_y) = eyes
        angle = math.atan2(right_y - left_y, right_x - left_x)
        return cls(float(x), float(y), MARGIN * float((high - low).max()), angle)

    @property
    def face_size(self) -> float:
        """Pixels that the face itself takes."""
        return self.side / MARGIN


@dataclass(frozen=True)
class Face:
    """The mesh of a face: points [468, 2] as x, y in pixels."""

    points: np.ndarray

    @property
    def square(self) -> FaceSquare:
        """Where to look for the same face in the next frame."""
        return FaceSquare.around(self.points, self.points[list(_EYES)])

    @property
    def lips(self) -> tuple[float, float, float, float]:
        """The box around the outer lips: x1, y1, x2, y2 in pixels, not cut to the picture."""
        lips = self.points[list(LIPS)]
        (x1, y1), (x2, y2) = lips.min(0).tolist(), lips.max(0).tolist()
        return x1, y1, x2, y2


class FaceMesh:
    """Both networks, on one core."""

    def __init__(self) -> None:
        interpreter = importlib.import_module(f"{RUNTIME}.interpreter").Interpreter
        self._detector = _Network(interpreter, DETECTOR)
        self._mesh = _Network(interpreter, MESH)
        self._anchors = _anchors(self._detector.size)

    def detect(self, picture: Image.Image) -> list[FaceSquare]:
        """Every face in a picture, surest first.

        The detector sees 192 pixels, so it looks at the whole picture and at squares as high as the picture that
        overlap by a third. A face of less than about a twelfth of the shorter side is not found.
        """
        width, height = picture.size
        short = min(width, height)
        places = [(x, y, short) for y in _starts(height, short) for x in _starts(width, short)]
        if width != height:
            places.append((0, 0, max(width, height)))
        found = [self._detect(picture, *place) for place in places]
        scores, points = (np.concatenate(parts) for parts in zip(*found, strict=True))  # [n], [n, 8, 2]
        order = np.argsort(-scores, kind="stable")
        return [FaceSquare.around(points[i, :2], points[i, 2:4]) for i in _distinct(points[:, :2], order)]

    def look(self, picture: Image.Image, square: FaceSquare) -> Face | None:
        """The face in a square of a picture, or None where there is none."""
        size = self._mesh.size
        step = square.side / size
        along, across = step * math.cos(square.angle), step * math.sin(square.angle)
        left = square.x - (along - across) * size / 2
        top = square.y - (across + along) * size / 2
        affine = (along, -across, left, across, along, top)  # a pixel of the square -> its place in the picture
        seen = picture.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        points, score = self._mesh(np.asarray(seen, np.float32) / 255)
        if _sigmoid(score.reshape(-1))[0] < LEAST_SCORE:
            return None
        x, y = points.reshape(-1, 3)[:, :2].T
        return Face(np.stack([along * x - across * y + left, across * x + along * y + top], axis=1))

    def _detect(self, picture: Image.Image, left: int, top: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [n] and points [n, 8, 2] in pixels (two corners, eyes, nose, mouth, ears) of what is seen there."""
        size = self._detector.size
        part = picture.crop((left, top, left + side, top + side))  # black outside the picture
        part = part.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
        raw, logits = self._detector(np.asarray(part, np.float32) / 127.5 - 1)
        scores = _sigmoid(logits[:, 0])
        sure = scores >= LEAST_SCORE
        points = raw[sure].reshape(-1, 8, 2) / size  # centre, width and height, six points; relative to the anchors
        points[:, [0, *range(2, 8)]] += self._anchors[sure][:, None]
        centre, half = points[:, 0].copy(), points[:, 1] / 2
        points[:, 0], points[:, 1] = centre - half, centre + half
        return scores[sure], points * side + (left, top)


class _Network:
    """A file of the weights' package, from pictures [size, size, 3] to its outputs."""

    def __init__(self, interpreter: type, file: str) -> None:
        self._model = interpreter(model_path=str(_weights(file)), num_threads=1)
        self._model.allocate_tensors()
        (given,) = self._model.get_input_details()
        self._input, self.size = given["index"], int(given["shape"][1])
        self._outputs = [output["index"] for output in self._model.get_output_details()]

    def __call__(self, picture: np.ndarray) -> list[np.ndarray]:
        self._model.set_tensor(self._input, picture[None])
        self._model.invoke()
        return [self._model.get_tensor(index)[0].copy() for index in self._outputs]


def is_installed() -> bool:
    """Whether the runtime and the weights are there; other releases of mediapipe have none inside."""
    return importlib.util.find_spec(RUNTIME) is not None and None not in (_weights(DETECTOR), _weights(MESH))


def _weights(file: str) -> Path | None:
    """Where a file of weights is, without importing its package; None where it is not."""
    spec = importlib.util.find_spec(WEIGHTS)
    path = Path(spec.origin).parent / "modules" / file if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


def _anchors(size: int) -> np.ndarray:
    """Centres [n, 2] as x, y from 0 to 1 of what the detector's outputs are relative to: of every cell of 4 pixels."""
    centres = (np.arange(size // 4) + 0.5) * 4 / size
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return np.stack([x, y], -1).reshape(-1, 2).astype(np.float32)


def _starts(length: int, side: int) -> list[int]:
    """Where squares begin that cover a length and overlap by a third or more."""
    count = 1 + math.ceil((length - side) / (side * 2 / 3))
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def _distinct(boxes: np.ndarray, order: np.ndarray) -> list[int]:
    """Of boxes [n, 2, 2] those, in order, that none before covers by more than 0.3 (intersection over union)."""
    kept: list[int] = []
    for i in order.tolist():
        overlap = (np.minimum(boxes[i, 1], boxes[kept, 1]) - np.maximum(boxes[i, 0], boxes[kept, 0])).clip(0).prod(-1)
        areas = (boxes[:, 1] - boxes[:, 0]).prod(-1)
        if not (overlap > 0.3 * (areas[i] + areas[kept] - overlap)).any():
            kept.append(i)
    return kept


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.clip(-80, 80)))
