"""Objects whose visible events sound in the effects track: a bouncing ball, a lamp, a drum."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.corpus.painting import Layer
from data.corpus.settings import CorpusSettings

Kind = Literal["bounce", "switch", "beat"]

BALLS = {"red": (210.0, 44.0, 40.0), "blue": (44.0, 92.0, 210.0), "orange": (240.0, 140.0, 30.0)}
BOUNCE = 0.6
"""Speed after a bounce over the speed before it."""
LIFT_S = 0.4
FLOOR = 0.86
"""Height of the floor line on which balls and drums stand, as a share of the frame."""


@dataclass(frozen=True, eq=False)
class SoundingObject:
    """One object at x (a share of the width) with its events: times in seconds, frames that show them, strengths 0..1.

    motion [F]: the ball's height or the mallet's (0 touches, 1 is up), or the lamp's light (0 off, 1 on).
    """

    kind: Kind
    colour: str
    x: float
    times_s: np.ndarray
    frames: np.ndarray
    strengths: np.ndarray
    motion: np.ndarray

    @property
    def look(self) -> str:
        """The object as a noun phrase."""
        noun = {"bounce": "ball", "switch": "lamp", "beat": "drum"}[self.kind]
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {noun}"

    @property
    def scene(self) -> str:
        """What happens, as a clause for the caption."""
        return {
            "bounce": f"{self.look.capitalize()} falls and bounces on the floor",
            "switch": f"{self.look.capitalize()} is switched on and off",
            "beat": f"A mallet beats {self.look}",
        }[self.kind]

    @property
    def heard(self) -> str:
        """What is heard, as a clause."""
        return {"bounce": "a ball bounces", "switch": "a switch clicks", "beat": "a drum is beaten"}[self.kind]

    @property
    def seen_and_heard(self) -> str:
        """What happens and how it sounds, as a clause."""
        return {
            "bounce": f"{self.look} thumps on the floor",
            "switch": f"{self.look} clicks on and off",
            "beat": f"a mallet beats {self.look}",
        }[self.kind]

    @property
    def light(self) -> np.ndarray | float:
        """Brightness of the whole scene [F]: a lamp lights its room."""
        return 0.72 + 0.28 * self.motion if self.kind == "switch" else 1.0

    def layers(self, settings: CorpusSettings) -> list[Layer]:
        unit, x, floor = settings.unit, self.x * settings.width, FLOOR * settings.height
        colour = BALLS[self.colour]
        if self.kind == "bounce":
            radius = 5.5 * unit
            travel = floor - 2 * radius - 0.12 * settings.height
            shadow = Layer("ellipse", x, floor, radius * 1.1, 1.2 * unit, (40.0, 40.0, 44.0), opacity=0.5)
            return [shadow, Layer("ellipse", x, floor - radius - travel * self.motion, radius, radius, colour, 0.7)]
        if self.kind == "switch":
            bulb_y = floor - 30 * unit
            lit = np.outer(np.array([255.0, 244.0, 190.0]), self.motion)
            bulb = lit + np.outer(np.array([70.0, 66.0, 70.0]), 1 - self.motion)
            return [
                Layer("box", x, floor - 14 * unit, 0.9 * unit, 14 * unit, (60.0, 52.0, 50.0), 0.5),
                Layer("box", x, floor, 5 * unit, 1.2 * unit, (60.0, 52.0, 50.0), 0.5),
                Layer("glow", x, bulb_y, 20 * unit, 20 * unit, (255.0, 236.0, 170.0), opacity=0.75 * self.motion),
                Layer("box", x, bulb_y - 4 * unit, 5 * unit, 3 * unit, colour, 0.55),
                Layer("ellipse", x, bulb_y + 1.5 * unit, 4.2 * unit, 4.2 * unit, bulb, 0.56),
            ]
        skin_y = floor - 14 * unit
        hit = np.clip(1 - 2.5 * self.motion, 0, 1)
        skin = np.array([[222.0], [214.0], [196.0]]) + np.outer((12.0, 13.0, 15.0), hit)  # a struck skin flashes
        mallet_x, mallet_y = x + 3 * unit, skin_y - (2.5 + 15 * self.motion) * unit
        return [
            Layer("box", x, floor - 6 * unit, 10 * unit, 8 * unit, colour, 0.6),
            Layer("ellipse", x, skin_y + hit * 0.8 * unit, 10 * unit, 3 * unit, skin, 0.62),
            Layer("box", mallet_x, mallet_y - 10.5 * unit, 0.9 * unit, 11 * unit, (120.0, 84.0, 50.0)),
            Layer("ellipse", mallet_x, mallet_y, 3 * unit, 3 * unit, (70.0, 46.0, 30.0), 0.7),
        ]

    def sound(self, rng: np.random.Generator, *, rate_hz: int, num_samples: int) -> np.ndarray:
        """The effects track: float32 [N] in [-1, 1], zeros until the first event."""
        track = np.zeros(num_samples, np.float32)
        time = np.arange(round(0.28 * rate_hz), dtype=np.float32) / np.float32(rate_hz)
        fade = 1 - time / time[-1]
        pitch = np.float32(rng.uniform(0.85, 1.15))
        for moment_s, strength in zip(self.times_s, self.strengths, strict=True):
            start = round(moment_s * rate_hz)
            piece = (fade * _SOUNDS[self.kind](time, pitch, rng))[: max(0, num_samples - start)]
            track[start : start + len(piece)] += np.float32(0.5 * strength**0.5) * piece
        return np.clip(track, -1, 1)


def draw_object(rng: np.random.Generator, settings: CorpusSettings, *, x: float) -> SoundingObject:
    """A random object whose events fit the clip; clips of a few frames may have a single event."""
    kind: Kind = ("bounce", "switch", "beat")[int(rng.integers(3))]
    colour = tuple(BALLS)[int(rng.integers(len(BALLS)))]
    plan = {"bounce": _plan_bounces, "switch": _plan_switches, "beat": _plan_beats}[kind]
    times_s, strengths, motion = plan(rng, settings)
    frames = np.minimum((times_s * settings.fps + 1e-6).astype(int), settings.num_frames - 1)
    return SoundingObject(kind, colour, x, times_s, frames, strengths, motion)


def _plan_bounces(rng: np.random.Generator, settings: CorpusSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drops from rest, bouncing until they are faint; in a long clip the ball is lifted and dropped again.

    The ball meets the floor in the middle of a frame, so that every impact is seen where it is heard.
    """
    times, fps = settings.frame_times, settings.fps
    height = np.zeros(len(times))
    impacts: list[float] = []
    strengths: list[float] = []
    held_s, end_s = 0.0, settings.duration_s
    while held_s < end_s:
        pause_s, fall_s = rng.uniform((0.08, 0.4), (0.34, 0.5))
        if not impacts and pause_s + fall_s > 0.9 * end_s:
            pause_s, fall_s = 0.2 * end_s, 0.4 * end_s
        impact_s = (int((held_s + pause_s + fall_s) * fps) + 0.5) / fps
        release_s = impact_s - fall_s
        if impacts:
            height = np.where((times >= held_s - LIFT_S) & (times < held_s), 1 - (held_s - times) / LIFT_S, height)
        height = np.where((times >= held_s) & (times < release_s), 1.0, height)
        falling = (times >= release_s) & (times < impact_s)
        height = np.where(falling, 1 - ((times - release_s) / fall_s) ** 2, height)
        strength = 1.0
        while strength > 0.3:
            impacts.append(impact_s)
            strengths.append(strength)
            flight_s = max(1, round(2 * fall_s * strength * BOUNCE * fps)) / fps
            strength *= BOUNCE
            through = (times - impact_s) / flight_s  # 0..1 in the air
            height = np.where((through >= 0) & (through < 1), strength**2 * 4 * through * (1 - through), height)
            impact_s += flight_s
        held_s = impact_s + 2 * LIFT_S
    kept = np.array(impacts) < end_s
    return np.array(impacts)[kept], np.array(strengths)[kept], np.clip(height, 0, 1)


def _plan_switches(rng: np.random.Generator, settings: CorpusSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lamp switches at the start of a frame, so the picture of that frame is the first of its new state."""
    frames = _event_frames(rng, settings, least_s=0.35, most_s=0.9)
    state = (np.searchsorted(frames, np.arange(settings.num_frames), side="right") + int(rng.integers(2))) % 2
    return frames / settings.fps, np.full(len(frames), 0.9), state.astype(float)


def _plan_beats(rng: np.random.Generator, settings: CorpusSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mallet touches the skin in the middle of a frame."""
    frames = _event_frames(rng, settings, least_s=0.3, most_s=0.7)
    distance = np.abs(np.arange(settings.num_frames)[:, None] - frames).min(1) / settings.fps
    hits_s = (frames + 0.5) / settings.fps
    return hits_s, rng.uniform(0.6, 1.0, len(frames)), np.sin(np.pi / 2 * np.clip(distance / 0.25, 0, 1))


def _event_frames(rng: np.random.Generator, settings: CorpusSettings, *, least_s: float, most_s: float) -> np.ndarray:
    """Frames with random gaps between `least_s` and `most_s`; at least one, none in the last frame of a longer clip."""
    frames: list[int] = []
    frame = min(1 + round(float(rng.uniform(0.08, 0.5)) * settings.fps), (settings.num_frames - 1) // 2)
    while not frames or frame < settings.num_frames - 1:
        frames.append(frame)
        frame += max(2, round(float(rng.uniform(least_s, most_s)) * settings.fps))
    return np.array(frames)


def _thump(time: np.ndarray, pitch: np.float32, rng: np.random.Generator) -> np.ndarray:
    knock = (2 * rng.random(len(time), np.float32) - 1) * np.exp(-time * 220)
    return 0.9 * np.exp(-time * 22) * np.cos(2 * np.pi * 170 * pitch * time * (1 - 0.5 * time)) + 0.6 * knock


def _click(time: np.ndarray, pitch: np.float32, rng: np.random.Generator) -> np.ndarray:
    noise = 2 * rng.random(len(time), np.float32) - 1
    second = np.maximum(time - np.float32(0.025), 0)
    decay = np.exp(-time * 300) + 0.7 * np.exp(-second * 350) * (second > 0)
    return decay * (0.8 * noise + 0.8 * np.cos(2 * np.pi * 2600 * pitch * time))


def _drum(time: np.ndarray, pitch: np.float32, rng: np.random.Generator) -> np.ndarray:
    rattle = (2 * rng.random(len(time), np.float32) - 1) * np.exp(-time * 45)
    return np.exp(-time * 14) * np.cos(2 * np.pi * 95 * pitch * time * (1 + np.exp(-time * 40))) + 0.45 * rattle


_SOUNDS = {"bounce": _thump, "switch": _click, "beat": _drum}
