"""What other recipes condition on (depth, pose, a reference image, a reference voice), computed only when asked for.

Each is a pure function of the key of a clip, (subset, index, settings, seed), as make_clip is.
"""

import numpy as np

from data.corpus.dialogue import plan_speech, speak_reference
from data.corpus.painting import Colour, Layer, paint_clip, paint_depth, to_uint8
from data.corpus.persons import CLOSE_UP, PlacedPerson, Point, place
from data.corpus.scenes import plan_scene
from data.corpus.settings import CorpusSettings, stream

LIMBS: tuple[tuple[str, str, Colour], ...] = (
    ("neck", "nose", (0.0, 0.0, 255.0)),
    ("left_shoulder", "right_shoulder", (255.0, 85.0, 0.0)),
    ("left_shoulder", "left_elbow", (170.0, 255.0, 0.0)),
    ("right_shoulder", "right_elbow", (0.0, 255.0, 85.0)),
    ("left_eye", "right_eye", (255.0, 0.0, 170.0)),
)
"""Pairs of keypoints joined by a bar, with its colour; every pair is level or upright to within the head's sway."""


def depth_frames(subset: str, index: int, settings: CorpusSettings, seed: int = 0) -> np.ndarray:
    """Depth of every pixel of a clip: float32 [F, H, W] in 0..1, 1 is nearest."""
    scene = plan_scene(subset, index, settings, seed)
    closed = [np.zeros(settings.num_frames) for _ in scene.persons]
    return paint_depth(
        scene.layers(closed, closed), num_frames=settings.num_frames, height=settings.height, width=settings.width
    )


def control_frames(
    name: str, subset: str, index: int, settings: CorpusSettings, seed: int = 0, *, person: int = 0
) -> np.ndarray | None:  # fmt: skip
    """A control of a clip as pictures: uint8 [F, H, W, 3], or of `reference_image` [H, W, 3].

    name: reference_image (of `person`), depth (white is nearest) or pose. None where the clip shows nobody, but it
    always has a depth.
    """
    if name == "depth":
        grey = np.rint(255 * depth_frames(subset, index, settings, seed)).astype(np.uint8)  # [F, H, W]
        return np.repeat(grey[..., None], 3, axis=-1)
    if not plan_scene(subset, index, settings, seed).persons:
        return None
    if name == "pose":
        return pose_frames(subset, index, settings, seed)
    return reference_image(subset, index, settings, seed, person=person)


def pose_frames(subset: str, index: int, settings: CorpusSettings, seed: int = 0) -> np.ndarray:
    """Skeletons of a clip's persons on black: uint8 [F, H, W, 3]; all black where nobody is."""
    scene = plan_scene(subset, index, settings, seed)
    layers = [layer for placed in scene.persons for layer in _skeleton(placed)]
    canvas = paint_clip(layers, num_frames=settings.num_frames, height=settings.height, width=settings.width)
    return to_uint8(canvas)


def reference_image(
    subset: str, index: int, settings: CorpusSettings, seed: int = 0, *, person: int = 0
) -> np.ndarray:  # fmt: skip
    """One of the clip's persons, mouth closed, before a neutral wall in another place and size: uint8 [H, W, 3].

    Raises ValueError where the clip has no such person.
    """
    known = _person(subset, index, settings, seed, person)
    rng = stream(subset, index, seed, "reference")
    still = CorpusSettings(fps=settings.fps, num_frames=1, height=settings.height, width=settings.width)
    x, y = rng.uniform((0.42, 0.46), (0.58, 0.54))
    placed = place(known.person, CLOSE_UP, rng, still, x=x, y=y, sway=1.0, drift=0.0)
    wall = Layer("box", settings.width / 2, settings.height / 2, settings.width, settings.height, (128.0, 128.0, 128.0))
    canvas = paint_clip([wall, *placed.layers(0.0, 0.0)], num_frames=1, height=settings.height, width=settings.width)
    return to_uint8(canvas)[0]


def reference_audio(
    subset: str, index: int, settings: CorpusSettings, seed: int = 0, *, person: int = 0, number: int = 0
) -> np.ndarray:  # fmt: skip
    """One of the clip's persons saying something else: float32 [N'] in [-1, 1], at most `settings.reference_s` long.

    number: which of the person's utterances, from 0. Raises ValueError where the clip has no such person.
    """
    known = _person(subset, index, settings, seed, person)
    utterances = plan_speech(plan_scene(subset, index, settings, seed), stream(subset, index, seed, "speech"))
    rng = stream(subset, index, seed, "voice", person, number)
    return speak_reference(known.person.timbre, utterances, rng, settings)


def _person(subset: str, index: int, settings: CorpusSettings, seed: int, person: int) -> PlacedPerson:
    persons = plan_scene(subset, index, settings, seed).persons
    if not 0 <= person < len(persons):
        raise ValueError(
            f"person={person}: clip {index} of {subset} has {len(persons)} persons; "
            "its truth lists them under 'identity'"
        )
    return persons[person]


def _skeleton(placed: PlacedPerson) -> list[Layer]:
    points, thick = placed.keypoints(), 0.05 * placed.head_ry
    bars = [_bar(points[start], points[end], thick, colour) for start, end, colour in LIMBS]
    dots = [Layer("ellipse", x, y, 1.6 * thick, 1.6 * thick, (255.0, 255.0, 255.0)) for x, y in points.values()]
    return bars + dots


def _bar(start: Point, end: Point, thick: float, colour: Colour) -> Layer:
    """An upright or level bar between two points."""
    half_x, half_y = (np.abs(b - a) / 2 for a, b in zip(start, end, strict=True))
    is_level = bool(np.max(half_x) > np.max(half_y))
    half_x, half_y = (half_x, half_y * 0 + thick) if is_level else (half_x * 0 + thick, half_y)
    return Layer("box", (start[0] + end[0]) / 2, (start[1] + end[1]) / 2, half_x, half_y, colour)
