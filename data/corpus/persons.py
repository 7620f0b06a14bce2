"""The corpus's people: what they look like in words and numbers, where they are, and the layers that draw them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import numpy as np

from data.corpus.painting import Colour, Layer, PerFrame
from data.corpus.settings import CorpusSettings
from data.corpus.voice import Timbre

SKINS: Mapping[str, Colour] = MappingProxyType({
    "fair-skinned": (242.0, 206.0, 180.0), "tan": (220.0, 170.0, 128.0), "brown-skinned": (186.0, 128.0, 90.0),
})  # fmt: skip
HAIR_COLOURS: Mapping[str, Colour] = MappingProxyType({
    "black": (38.0, 32.0, 36.0), "brown": (104.0, 66.0, 38.0), "blond": (236.0, 200.0, 104.0),
    "red": (190.0, 74.0, 34.0), "grey": (168.0, 168.0, 172.0),
})  # fmt: skip
CLOTHES: Mapping[str, Colour] = MappingProxyType({
    "red": (200.0, 48.0, 48.0), "blue": (48.0, 84.0, 190.0), "green": (44.0, 140.0, 76.0),
    "yellow": (228.0, 196.0, 60.0), "white": (232.0, 232.0, 232.0), "purple": (124.0, 64.0, 160.0),
})  # fmt: skip
GARMENTS = ("shirt", "sweater", "jacket")
HAIR_STYLES = ("short", "long", "curly", "tied-up")
FACE_SHAPES: Mapping[str, float] = MappingProxyType({"round": 0.92, "oval": 0.84, "long": 0.76})
"""Names of face shapes and the width of such a face over its height."""

PITCHES_HZ: Mapping[str, tuple[float, float]] = MappingProxyType({"woman": (165.0, 250.0), "man": (88.0, 140.0)})
"""Lowest and highest pitch of each gender's voices."""

MOUTH_INTERIOR = (32.0, 6.0, 12.0)
EYE_WHITE = (244.0, 244.0, 240.0)
PUPIL = (30.0, 26.0, 34.0)

Point = tuple[PerFrame, PerFrame]


@dataclass(frozen=True)
class Person:
    """A person's identity: every attribute has a name, so a caption can say it and a metric can check it."""

    gender: str
    skin: str
    hair_colour: str
    hair_style: str
    clothes_colour: str
    garment: str
    face_shape: str
    timbre: Timbre

    @property
    def appearance(self) -> str:
        """The identity as one noun phrase."""
        return (
            f"A {self.skin} {self.gender} with {self.hair_style} {self.hair_colour} hair "
            f"and a {self.clothes_colour} {self.garment}"
        )

    @property
    def look(self) -> str:
        """The identity in as few words as tell two persons of a clip apart."""
        return f"a {self.gender} in a {self.clothes_colour} {self.garment}"

    @property
    def voice(self) -> str:
        """The timbre as adjectives: low or high among the voices of its gender."""
        height = "low" if self.timbre.f0_hz < sum(PITCHES_HZ[self.gender]) / 2 else "high"
        return f"{height} {'female' if self.gender == 'woman' else 'male'}"

    @property
    def attributes(self) -> dict[str, str]:
        """The visible attributes as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "timbre"}


def draw_persons(rng: np.random.Generator, count: int) -> tuple[Person, ...]:
    """`count` random persons of one clip; no two share the colour of hair or clothes, so a caption tells them apart."""
    hair = rng.permutation(len(HAIR_COLOURS))
    clothes = rng.permutation(len(CLOTHES))
    persons = []
    for place in range(count):
        picks = rng.random(6)
        gender = ("woman", "man")[int(picks[0] * 2)]
        low, high = PITCHES_HZ[gender]
        f0_hz = low + picks[1] * (high - low)
        formant_scale = (1.06 if gender == "woman" else 0.9) + 0.12 * picks[2]
        persons.append(Person(
            gender=gender,
            skin=tuple(SKINS)[int(picks[3] * len(SKINS))],
            hair_colour=tuple(HAIR_COLOURS)[hair[place]],
            hair_style=HAIR_STYLES[int(picks[4] * len(HAIR_STYLES))],
            clothes_colour=tuple(CLOTHES)[clothes[place]],
            garment=GARMENTS[int(rng.integers(len(GARMENTS)))],
            face_shape=tuple(FACE_SHAPES)[int(picks[5] * len(FACE_SHAPES))],
            timbre=Timbre(round(f0_hz, 1), round(formant_scale, 3)),
        ))  # fmt: skip
    return tuple(persons)


@dataclass(frozen=True)
class Framing:
    """How a person is framed, in drawing units (64 to the frame): half height of the head, half sizes of the mouth."""

    head: float
    mouth_rx: float
    mouth_open: float
    mouth_closed: float
    mouth_below: float
    box: tuple[float, float]


CLOSE_UP = Framing(head=29.0, mouth_rx=7.6, mouth_open=6.0, mouth_closed=0.5, mouth_below=0.46, box=(10.0, 7.2))
HALF_BODY = Framing(head=14.5, mouth_rx=4.6, mouth_open=3.1, mouth_closed=0.5, mouth_below=0.48, box=(6.2, 4.4))
SHARED = Framing(head=13.2, mouth_rx=4.3, mouth_open=2.9, mouth_closed=0.5, mouth_below=0.48, box=(5.8, 4.1))


@dataclass(frozen=True, eq=False)
class PlacedPerson:
    """A person in a clip, in pixels: the head's centre and the body's per frame [F], and the framing's sizes."""

    person: Person
    framing: Framing
    unit: float
    head_x: np.ndarray
    head_y: np.ndarray
    body_x: np.ndarray
    body_y: np.ndarray

    @property
    def head_ry(self) -> float:
        return self.framing.head * self.unit

    @property
    def head_rx(self) -> float:
        return self.head_ry * FACE_SHAPES[self.person.face_shape]

    @property
    def mouth_y(self) -> np.ndarray:
        """Centre of the mouth [F]."""
        return self.head_y + self.framing.mouth_below * self.head_ry

    def mouth_boxes(self, *, height: int, width: int) -> np.ndarray:
        """A box of one size around the mouth, wide enough for its widest opening: [F, 4] as x1, y1, x2, y2."""
        half_x, half_y = (half * self.unit for half in self.framing.box)
        x, y = self.head_x, self.mouth_y
        return np.stack([
            np.clip(x - half_x, 0, width), np.clip(y - half_y, 0, height),
            np.clip(x + half_x, 0, width), np.clip(y + half_y, 0, height),
        ], axis=1)  # fmt: skip

    def layers(self, aperture: PerFrame, spread: PerFrame) -> list[Layer]:
        """Back to front; aperture 0..1 opens the mouth, spread -1..1 makes it round or wide."""
        person, rx, ry, x, y = self.person, self.head_rx, self.head_ry, self.head_x, self.head_y
        skin, hair, clothes = SKINS[person.skin], HAIR_COLOURS[person.hair_colour], CLOTHES[person.clothes_colour]
        unit, framing = self.unit, self.framing
        mouth_rx = framing.mouth_rx * unit * (1 + 0.2 * spread)
        mouth_ry = unit * (framing.mouth_closed + (framing.mouth_open - framing.mouth_closed) * aperture)
        shade, lips = _mixed(skin, (110.0, 60.0, 40.0), 0.3), _mixed(skin, (190.0, 50.0, 60.0), 0.6)
        lip = 0.045 * ry
        return [
            *self._hair(hair),
            Layer("box", self.body_x, y + ry, 0.42 * rx, 0.6 * ry, shade, 0.62),
            Layer("ellipse", self.body_x, self.body_y + 1.5 * ry, 1.9 * rx, 1.5 * ry, clothes, 0.6),
            Layer("ellipse", x, y, rx, ry, skin, 0.8),
            Layer("ellipse", x, y - 0.82 * ry, 0.78 * rx, 0.3 * ry, hair, 0.82),
            *(Layer("ellipse", x + side * 0.4 * rx, y - 0.12 * ry, 0.19 * rx, 0.1 * ry, EYE_WHITE) for side in (-1, 1)),
            *(Layer("ellipse", x + side * 0.4 * rx, y - 0.12 * ry, 0.09 * rx, 0.09 * ry, PUPIL) for side in (-1, 1)),
            Layer("ellipse", x, y + 0.16 * ry, 0.1 * rx, 0.09 * ry, shade),
            Layer("ellipse", x, self.mouth_y, mouth_rx + lip, mouth_ry + lip, lips),
            Layer("ellipse", x, self.mouth_y, mouth_rx, mouth_ry, MOUTH_INTERIOR),
        ]

    def _hair(self, colour: Colour) -> list[Layer]:
        rx, ry, x, y = self.head_rx, self.head_ry, self.head_x, self.head_y
        cap = Layer("ellipse", x, y - 0.14 * ry, 1.08 * rx, 0.98 * ry, colour, 0.78)
        match self.person.hair_style:
            case "long":
                return [cap, Layer("box", x, y + 0.45 * ry, 1.12 * rx, 0.75 * ry, colour, 0.5)]
            case "curly":
                return [Layer("ellipse", x, y - 0.16 * ry, 1.3 * rx, 1.02 * ry, colour, 0.78)]
            case "tied-up":
                return [cap, Layer("ellipse", x, y - 1.1 * ry, 0.4 * rx, 0.3 * ry, colour, 0.78)]
            case _:
                return [cap]

    def keypoints(self) -> dict[str, Point]:
        """Body and face points in pixels, each coordinate per frame."""
        rx, ry, x, y = self.head_rx, self.head_ry, self.head_x, self.head_y
        shoulder_y = self.body_y + 0.35 * ry
        points: dict[str, Point] = {"nose": (x, y + 0.16 * ry), "neck": (self.body_x, shoulder_y)}
        for name, side in (("left", -1), ("right", 1)):
            points[f"{name}_eye"] = (x + side * 0.4 * rx, y - 0.12 * ry)
            points[f"{name}_ear"] = (x + side * rx, y)
            points[f"{name}_shoulder"] = (self.body_x + side * 1.45 * rx, shoulder_y)
            points[f"{name}_elbow"] = (self.body_x + side * 1.45 * rx, shoulder_y + 1.6 * ry)
        return points


def place(
    person: Person, framing: Framing, rng: np.random.Generator, settings: CorpusSettings, *,
    x: float, y: float, sway: float, drift: float,
) -> PlacedPerson:  # fmt: skip
    """Stand a person at (x, y) (fractions of the frame: the head's centre) with a head that sways and a camera that
    drifts; sway and drift in drawing units."""
    unit, times = settings.unit, settings.frame_times
    rates = rng.uniform(0.25, 0.6, 2)
    phases = rng.random(2)
    sway_x, sway_y = (np.sin(2 * np.pi * (rate * times + phase)) for rate, phase in zip(rates, phases, strict=True))
    direction = rng.uniform(-1, 1, 2)
    progress = times / times[-1] - 0.5 if len(times) > 1 else np.zeros(1)
    drift_x, drift_y = (drift * amount * progress for amount in direction)
    body_x = x * settings.width + unit * drift_x
    head_y = y * settings.height + unit * 0.6 * drift_y
    return PlacedPerson(
        person=person, framing=framing, unit=unit,
        head_x=body_x + unit * sway * sway_x, head_y=head_y + unit * 0.5 * sway * sway_y,
        body_x=body_x + 0 * sway_x, body_y=head_y + framing.head * unit,
    )  # fmt: skip


def _mixed(first: Colour, second: Colour, share: float) -> Colour:
    return np.asarray(first) * (1 - share) + np.asarray(second) * share
