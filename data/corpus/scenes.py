"""The plan of a clip: who is there, where, before what background, with which object or music, before any sound."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from data.corpus.mood import Mood, draw_mood
from data.corpus.painting import Colour, Layer, PerFrame
from data.corpus.persons import CLOSE_UP, HALF_BODY, SHARED, PlacedPerson, draw_persons, place
from data.corpus.settings import CorpusSettings, stream
from data.corpus.sounding_objects import FLOOR, SoundingObject, draw_object

COLOURS: Mapping[str, Colour] = MappingProxyType({
    "grey": (150.0, 152.0, 156.0), "blue": (118.0, 150.0, 196.0), "green": (128.0, 172.0, 132.0),
    "beige": (206.0, 190.0, 160.0), "pink": (212.0, 164.0, 172.0), "teal": (96.0, 158.0, 160.0),
})  # fmt: skip
PLACES = ("wall", "room", "window", "field")
MOOD_COLOURS = ("grey", "beige", "pink")
"""Backgrounds of mood scenes: pale enough that the music's palette, not the wall, decides whether red or blue wins."""


@dataclass(frozen=True)
class Background:
    """A named place in a named colour; `shift` is how far its things move with the camera, in pixels, per frame."""

    place: str
    colour: str

    @property
    def words(self) -> str:
        """The place for a caption, with its preposition."""
        return {
            "wall": f"in front of a plain {self.colour} wall",
            "room": f"in a {self.colour} room",
            "window": f"beside a bright window in a {self.colour} wall",
            "field": f"under a {self.colour} sky above a green field",
        }[self.place]

    def layers(self, settings: CorpusSettings, shift: PerFrame) -> list[Layer]:
        height, width, unit = settings.height, settings.width, settings.unit
        colour = np.asarray(COLOURS[self.colour])
        wall = Layer("box", width / 2, height / 2, width, height, colour, 0.1)
        floor = FLOOR * height - 3 * unit
        match self.place:
            case "room":
                return [wall, Layer("box", width / 2, floor + height, 2 * width, height, 0.62 * colour, 0.3)]
            case "window":
                pane = np.array([238.0, 240.0, 226.0])
                x, y, half_x, half_y = 0.82 * width + shift, 0.26 * height, 0.13 * width, 0.17 * height
                return [wall, Layer("box", x, y, half_x, half_y, pane, 0.05)]
            case "field":
                grass = np.array([84.0, 132.0, 70.0])
                x, y, half_x, half_y = 0.4 * width + shift, 1.16 * height, 1.3 * width, 0.5 * height
                return [wall, Layer("ellipse", x, y, half_x, half_y, grass, 0.25)]
            case _:
                return [wall]


@dataclass(frozen=True, eq=False)
class Scene:
    """All that is decided about a clip's picture; the speech adds the mouths. `shift` [F] or 0 moves the background."""

    subset: str
    settings: CorpusSettings
    background: Background
    shift: PerFrame
    persons: tuple[PlacedPerson, ...]
    thing: SoundingObject | None = None
    mood: Mood | None = None

    def words(self, person: str = "Person1") -> str:
        """The scene description of the caption; `person` names the only person of a scene with something else in it."""
        where = self.background.words
        if self.thing is not None:
            beside = f" beside {person}" if self.persons else ""
            return f"{self.thing.scene}{beside} {where}."
        if self.mood is not None:
            mood = self.mood
            music = f"{mood.pace} {mood.mode} music"
            place_words = f"a view {where}" if not self.persons else f"{person} talks {where}"
            return f"{place_words[0].upper()}{place_words[1:]}, in {mood.palette} light with {music}."
        if len(self.persons) > 1:
            return f"They take turns {where}."
        view = "A close-up of a face" if self.subset == "basic_face" else "Half-body view of a person"
        return f"{view} {where}."

    @property
    def detailed(self) -> str:
        """A video caption with all that can be seen."""
        person = f"the {self.persons[0].person.gender}" if self.persons else ""
        looks = [f"{placed.person.appearance}." for placed in self.persons]
        if len(looks) > 1:
            looks = [f"Person{number}: {look}" for number, look in enumerate(looks, 1)]
        return " ".join([*looks, self.words(person)])

    @property
    def short(self) -> str:
        """A video caption of a few words."""
        seen = [placed.person.look for placed in self.persons]
        if self.thing is not None:
            seen.append(self.thing.look)
        words = " and ".join(seen) or f"a view {self.background.words}"
        if self.subset == "basic_face":
            words = f"a close-up of {words}"
        if self.mood is not None:
            words = f"{words} in {self.mood.palette} light"
        return f"{words[0].upper()}{words[1:]}."

    @property
    def staging(self) -> str:
        """A video caption without anybody's looks, which a reference image is left to say."""
        if len(self.persons) > 1:
            return f"Two persons take turns {self.background.words}."
        return self.words("a person")

    @property
    def place(self) -> str:
        """Where it happens and in which light, with its preposition."""
        return self.background.words if self.mood is None else f"{self.background.words} in {self.mood.palette} light"

    @property
    def happening(self) -> str:
        """What is seen and heard besides speech, as a clause; "" where there is nothing else."""
        if self.mood is not None:
            return f"{self.mood.pace} music in a {self.mood.mode} key plays"
        return "" if self.thing is None else self.thing.seen_and_heard

    def layers(self, apertures: list[np.ndarray], spreads: list[np.ndarray]) -> list[Layer]:
        """Back to front, for paint_clip; one aperture and spread [F] a person."""
        layers = self.background.layers(self.settings, self.shift)
        if self.thing is not None:
            layers += self.thing.layers(self.settings)
        for person, aperture, spread in zip(self.persons, apertures, spreads, strict=True):
            layers += person.layers(aperture, spread)
        return layers

    def light(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Tint [3] and brightness [F] of the whole scene, or None in neutral light."""
        if self.mood is not None:
            return self.mood.tint, self.mood.brightness(self.settings.frame_times)
        if self.thing is not None and isinstance(self.thing.light, np.ndarray):
            return np.ones(3, np.float32), self.thing.light
        return None


def plan_scene(subset: str, index: int, settings: CorpusSettings, seed: int) -> Scene:
    """The scene of one clip: a pure function of its arguments."""
    rng = stream(subset, index, seed, "scene")
    colours = MOOD_COLOURS if subset == "visual_mood" else tuple(COLOURS)
    places = {"basic_face": ("wall",), "visual_mood": PLACES[1:]}.get(subset, PLACES)
    colour, where = colours[int(rng.integers(len(colours)))], places[int(rng.integers(len(places)))]
    background = Background(where, colour)
    if subset == "basic_face":
        (person,) = draw_persons(rng, 1)
        x, y = 0.5 + rng.uniform(-0.04, 0.04), 0.49 + rng.uniform(-0.02, 0.02)
        return Scene(subset, settings, background, 0.0, (
            place(person, CLOSE_UP, rng, settings, x=x, y=y, sway=1.0, drift=0.0),
        ))  # fmt: skip
    if subset == "single_character":
        (person,) = draw_persons(rng, 1)
        x, y = rng.uniform((0.3, 0.36), (0.7, 0.44))
        placed = place(person, HALF_BODY, rng, settings, x=x, y=y, sway=0.8, drift=4.0)
        return Scene(subset, settings, background, 0.5 * (placed.body_x - placed.body_x.mean()), (placed,))
    if subset == "multiple_characters":
        left, right = draw_persons(rng, 2)
        left_x, left_y, right_x, right_y = rng.uniform((0.24, 0.4, 0.72, 0.4), (0.28, 0.46, 0.76, 0.46))
        return Scene(subset, settings, background, 0.0, (
            place(left, SHARED, rng, settings, x=left_x, y=left_y, sway=0.5, drift=1.0),
            place(right, SHARED, rng, settings, x=right_x, y=right_y, sway=0.5, drift=1.0),
        ))  # fmt: skip
    on_left = bool(rng.integers(2))
    has_person = bool(rng.integers(2))
    x, y = rng.uniform((0.26, 0.4), (0.3, 0.46))
    persons: tuple[PlacedPerson, ...] = ()
    if has_person:
        (person,) = draw_persons(rng, 1)
        framing = SHARED if subset == "sound_event" else HALF_BODY
        spot = x if on_left else 1 - x
        persons = (place(person, framing, rng, settings, x=spot, y=y, sway=0.6, drift=1.0),)
    if subset == "sound_event":
        centre = float(rng.uniform(0.35, 0.65))
        thing = draw_object(rng, settings, x=centre if not has_person else (0.77 if on_left else 0.23))
        return Scene(subset, settings, background, 0.0, persons, thing=thing)
    return Scene(subset, settings, background, 0.0, persons, mood=draw_mood(rng))
