"""Music whose mode and tempo set the scene's palette and brightness."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Mode = Literal["major", "minor"]

TEMPO_BPM = (66.0, 144.0)
PROGRESSIONS: dict[Mode, tuple[tuple[int, ...], ...]] = {
    "major": ((0, 4, 7, 12), (5, 9, 12, 17), (7, 11, 14, 19), (0, 4, 7, 12)),
    "minor": ((0, 3, 7, 12), (5, 8, 12, 17), (8, 12, 15, 20), (0, 3, 7, 12)),
}
"""Chords as semitones above the root, four beats each: I-IV-V-I and i-iv-VI-i."""


@dataclass(frozen=True)
class Mood:
    """A piece of music (mode, tempo, root in Hz) and what it does to the picture."""

    mode: Mode
    tempo_bpm: float
    root_hz: float

    @property
    def palette(self) -> str:
        return "warm" if self.mode == "major" else "cool"

    @property
    def tint(self) -> np.ndarray:
        """Factor of red, green and blue."""
        return np.array([1.12, 0.96, 0.68] if self.palette == "warm" else [0.66, 0.88, 1.14], np.float32)

    @property
    def pace(self) -> str:
        return "slow" if self.tempo_bpm < 88 else "fast" if self.tempo_bpm > 120 else "steady"

    @property
    def heard(self) -> str:
        """What kind of music it is."""
        return f"{self.pace}, in a {self.mode} key"

    @property
    def level(self) -> float:
        """Mean brightness of the scene: faster music, brighter light."""
        low, high = TEMPO_BPM
        return 0.68 + 0.34 * (self.tempo_bpm - low) / (high - low)

    def brightness(self, times_s: np.ndarray) -> np.ndarray:
        """Brightness at the given seconds [F]: the level with a gentle pulse that peaks on the beat."""
        beats = times_s * self.tempo_bpm / 60
        return self.level * (1 + 0.07 * np.cos(2 * np.pi * beats))

    def sound(self, *, rate_hz: int, num_samples: int) -> np.ndarray:
        """The music track, float32 [N] in [-1, 1]: a soft chord and an arpeggio of two notes a beat above it.

        Major pieces sound brighter as well: more overtones, and the arpeggio an octave higher.
        """
        track = np.zeros(num_samples, np.float32)
        beat_s = 60 / self.tempo_bpm
        chords = PROGRESSIONS[self.mode]
        overtones = (1.0, 0.5, 0.3, 0.18) if self.mode == "major" else (1.0, 0.22, 0.06)
        octave = 24 if self.mode == "major" else 12
        duration_s = num_samples / rate_hz
        for number in range(int(duration_s / beat_s / 2) + 1):
            chord = chords[number % len(chords)]  # a chord lasts two beats
            start_s = 2 * number * beat_s
            for semitones in chord[:3]:
                note = _note(self._hertz(semitones), min(2.2 * beat_s, duration_s - start_s), rate_hz, overtones[:2])
                _add(track, note * _swell(len(note), 0.06 * rate_hz), start_s, 0.06, rate_hz)
            for step in range(4):
                moment_s = start_s + step * beat_s / 2
                length_s = min(0.9 * beat_s, duration_s - moment_s)
                if length_s <= 0:
                    break
                note = _note(self._hertz(chord[step] + octave), length_s, rate_hz, overtones)
                decay = np.exp(np.arange(len(note), dtype=np.float32) * np.float32(-5 / (beat_s * rate_hz)))
                note *= decay * _swell(len(note), 0.006 * rate_hz)
                _add(track, note, moment_s, 0.16 if step % 2 == 0 else 0.11, rate_hz)
        return np.clip(track, -1, 1)

    def _hertz(self, semitones: int) -> float:
        return self.root_hz * 2 ** (semitones / 12)


def draw_mood(rng: np.random.Generator) -> Mood:
    mode: Mode = ("major", "minor")[int(rng.integers(2))]
    return Mood(mode, round(float(rng.uniform(*TEMPO_BPM)), 1), 110 * 2 ** (int(rng.integers(12)) / 12))


def _note(hertz: float, length_s: float, rate_hz: int, overtones: tuple[float, ...]) -> np.ndarray:
    phase = np.arange(max(0, round(length_s * rate_hz)), dtype=np.float32) * np.float32(2 * np.pi * hertz / rate_hz)
    note = np.sin(phase)
    for number, gain in enumerate(overtones[1:], 2):
        if number * hertz < 0.45 * rate_hz:
            note += np.float32(gain) * np.sin(phase * np.float32(number))
    return note


def _swell(length: int, ramp: float) -> np.ndarray:
    """Rise over the first `ramp` samples, fall over the last."""
    rise = np.arange(length, dtype=np.float32) / np.float32(ramp)
    return np.minimum(np.minimum(rise, rise[::-1]), 1)


def _add(track: np.ndarray, note: np.ndarray, start_s: float, gain: float, rate_hz: int) -> None:
    start = round(start_s * rate_hz)
    piece = note[: max(0, len(track) - start)]
    track[start : start + len(piece)] += np.float32(gain) * piece
