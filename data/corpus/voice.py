"""The synthetic voice: words from a small vocabulary, spoken by a harmonic source and noise through formant filters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from scipy import fft

VOICE_RMS = 0.16
"""RMS of a stressed open vowel; the mouth is fully open there."""

HOP_S = 0.008


class Phoneme(NamedTuple):
    """A speech sound: three formants in Hz, level and noise level relative to an open vowel, the noise's centre in Hz,
    its length in seconds, and the mouth's shape from -1 (round) to 1 (wide)."""

    f1: float
    f2: float
    f3: float
    level: float
    noise: float
    noise_hz: float
    duration_s: float
    spread: float


def _phonemes() -> Mapping[str, Phoneme]:
    return MappingProxyType({
        "AA": Phoneme(730, 1090, 2440, 1.00, 0, 2000, 0.20, 0.0),
        "AE": Phoneme(660, 1720, 2410, 0.95, 0, 2000, 0.19, 0.6),
        "AH": Phoneme(640, 1190, 2390, 0.85, 0, 2000, 0.15, 0.0),
        "AO": Phoneme(570, 840, 2410, 0.90, 0, 2000, 0.20, -0.7),
        "EH": Phoneme(530, 1840, 2480, 0.85, 0, 2000, 0.17, 0.5),
        "ER": Phoneme(490, 1350, 1690, 0.75, 0, 2000, 0.18, -0.3),
        "IH": Phoneme(390, 1990, 2550, 0.65, 0, 2000, 0.14, 0.6),
        "IY": Phoneme(270, 2290, 3010, 0.60, 0, 2000, 0.18, 1.0),
        "OW": Phoneme(450, 880, 2400, 0.80, 0, 2000, 0.21, -0.9),
        "UW": Phoneme(300, 870, 2240, 0.60, 0, 2000, 0.19, -1.0),
        "L": Phoneme(360, 1100, 2700, 0.40, 0, 2000, 0.07, 0.0),
        "R": Phoneme(330, 1060, 1500, 0.40, 0, 2000, 0.07, -0.4),
        "W": Phoneme(290, 610, 2200, 0.32, 0, 2000, 0.08, -1.0),
        "Y": Phoneme(260, 2200, 3000, 0.35, 0, 2000, 0.07, 0.8),
        "M": Phoneme(250, 1000, 2200, 0.22, 0, 2000, 0.08, 0.0),
        "N": Phoneme(250, 1500, 2500, 0.24, 0, 2000, 0.07, 0.1),
        "NG": Phoneme(250, 2000, 2600, 0.22, 0, 2000, 0.08, 0.1),
        "V": Phoneme(280, 1100, 2300, 0.22, 0.06, 3500, 0.07, 0.0),
        "Z": Phoneme(280, 1700, 2500, 0.18, 0.16, 5500, 0.09, 0.3),
        "S": Phoneme(280, 1700, 2500, 0, 0.24, 5800, 0.11, 0.3),
        "HH": Phoneme(530, 1500, 2500, 0, 0.12, 1700, 0.06, 0.0),
        "P": Phoneme(400, 900, 2300, 0, 0.20, 1000, 0.025, 0.0),
        "T": Phoneme(400, 1700, 2600, 0, 0.26, 4500, 0.03, 0.2),
        "K": Phoneme(400, 1900, 2500, 0, 0.24, 2200, 0.035, 0.0),
        "B": Phoneme(300, 900, 2300, 0.25, 0.10, 900, 0.03, 0.0),
        "D": Phoneme(300, 1700, 2600, 0.25, 0.14, 3800, 0.03, 0.2),
        "-": Phoneme(400, 1400, 2400, 0, 0, 2000, 0.045, 0.0),
    })  # fmt: skip


PHONEMES = _phonemes()

VOCABULARY: Mapping[str, str] = MappingProxyType({
    "apple": "AE - P AH L", "blue": "- B L UW", "day": "- D EH IY", "happy": "HH AE - P IY", "hello": "HH EH L OW",
    "light": "L AA IY - T", "moon": "M UW N", "morning": "M AO R N IH NG", "music": "M Y UW Z IH - K",
    "open": "OW - P AH N", "sea": "S IY", "seven": "S EH V AH N", "summer": "S AH M ER", "water": "W AO - T ER",
    "window": "W IH N - D OW", "yellow": "Y EH L OW",
})  # fmt: skip
"""Every word the corpus speaks, with its phonemes; "-" is the closure before a stop."""


@dataclass(frozen=True)
class Timbre:
    """A speaker's voice: mean pitch in Hz, and the factor of all formants (above 1: a shorter vocal tract)."""

    f0_hz: float
    formant_scale: float


@dataclass(frozen=True)
class SpokenWord:
    """A word with the times in seconds at which its sounds start and end."""

    word: str
    start_s: float
    end_s: float


@dataclass(frozen=True, eq=False)
class Utterance:
    """Words in time and their phonemes: `controls` [P, 8] holds Phoneme's numbers, `bounds` [P, 2] seconds."""

    words: tuple[SpokenWord, ...]
    bounds: np.ndarray
    controls: np.ndarray
    accents: np.ndarray

    @property
    def text(self) -> str:
        return " ".join(spoken.word for spoken in self.words)


def plan_utterance(
    rng: np.random.Generator, turns: list[tuple[float, float]], vocabulary: Sequence[str] = tuple(VOCABULARY)
) -> Utterance:
    """Random words of the vocabulary, two or more, with pauses, inside the given turns (start, end) in seconds."""
    words: list[SpokenWord] = []
    bounds: list[tuple[float, float]] = []
    controls: list[Phoneme] = []
    accents: list[float] = []
    last = ""
    for time_s, end_s in turns:
        is_first = True
        while word := _next_word(rng, vocabulary, last, end_s - time_s, is_first=is_first):
            phonemes = [PHONEMES[name] for name in VOCABULARY[word].split()]
            stretch, stress, accent, pause_s = rng.uniform((0.95, 0.65, 0.0, 0.1), (1.25, 1.0, 4.0, 0.3))
            stretch = min(stretch, (end_s - time_s) / _length_s(word))
            start_s = time_s
            for phoneme in phonemes:
                length_s = stretch * phoneme.duration_s
                bounds.append((time_s, time_s + length_s))
                controls.append(phoneme._replace(level=stress * phoneme.level, noise=stress * phoneme.noise))
                accents.append(accent)
                time_s += length_s
            words.append(SpokenWord(word, start_s, time_s))
            time_s += pause_s
            last, is_first = word, False
    return Utterance(tuple(words), np.array(bounds), np.array(controls), np.array(accents))


def _next_word(rng: np.random.Generator, vocabulary: Sequence[str], last: str, room_s: float, *, is_first: bool) -> str:
    """A random word that fits the room left, never the last one again; "" where none fits, but a turn has one word."""
    words = [word for word in vocabulary if word != last and 0.9 * _length_s(word) <= room_s]
    if not words and is_first:
        words = [word for word in vocabulary if word != last]
    return words[int(rng.integers(len(words)))] if words else ""


def _length_s(word: str) -> float:
    return sum(PHONEMES[name].duration_s for name in VOCABULARY[word].split())


def synthesise(
    utterance: Utterance, timbre: Timbre, rng: np.random.Generator, *, rate_hz: int, num_samples: int
) -> np.ndarray:
    """The utterance's sound: float32 [N] in [-1, 1], zeros where nothing is said.

    A pulse train and white noise, cut into half-overlapping windows, each multiplied in the frequency domain by the
    magnitude response of its moment's formants: a source-filter voice at the cost of three short Fourier transforms.
    """
    hop = 16 * max(1, round(HOP_S * rate_hz / 16))
    num_hops = -(-num_samples // hop)
    times = (np.arange(num_hops) + 0.5) * hop / rate_hz
    controls = _controls_at(utterance, times)  # [8, T]
    voiced, noisy = controls[3], controls[4]
    active = np.flatnonzero(voiced + noisy > 1e-3)
    if not len(active):
        return np.zeros(num_samples, np.float32)
    f0 = _pitch(utterance, timbre, times, rng)

    frequencies = fft.rfftfreq(4 * hop, 1 / rate_hz).astype(np.float32)  # [K]
    window = (0.5 - 0.5 * np.cos(np.pi * (np.arange(2 * hop) + 0.5) / hop)).astype(np.float32)
    spectra = _windows(_pulses(f0, hop, rate_hz), active, hop, window)  # [A, K]
    formants = np.vstack([controls[:3, active], np.full(len(active), 3500.0)]) * timbre.formant_scale  # [4, A]
    response = _formants(formants.astype(np.float32), frequencies)  # [A, K]
    # power of harmonics with amplitudes 1 / k after the filter, so that the level is what the phoneme asks for
    decay = np.where(frequencies > 60, 1 / np.maximum(frequencies, 60), 0).astype(np.float32)
    power = np.square(response * decay).sum(1) * (0.5 * f0[active] * frequencies[1])
    response *= (VOICE_RMS * voiced[active] / np.sqrt(power)).astype(np.float32)[:, None]
    spectra *= response

    hissing = np.flatnonzero(noisy[active] > 1e-3)
    if len(hissing):
        where = active[hissing]
        hiss = rng.random((num_hops + 1) * hop, np.float32) - 0.5
        centre = (controls[5, where] * timbre.formant_scale).astype(np.float32)[:, None]
        band = 1 / (1 + np.square((frequencies - centre) / (0.35 * centre)))  # [A', K]
        level = VOICE_RMS * noisy[where] / np.sqrt(np.square(band).mean(1) / 12)
        band *= level.astype(np.float32)[:, None]
        spectra[hissing] += _windows(hiss, where, hop, window) * band

    pieces = np.zeros((num_hops, 4, hop), np.float32)
    pieces[active] = np.asarray(fft.irfft(spectra, 4 * hop, axis=1)).reshape(-1, 4, hop)
    sound = np.zeros((num_hops + 3, hop), np.float32)
    for quarter in range(4):
        sound[quarter : quarter + num_hops] += pieces[:, quarter]
    # the window of hop t starts half a hop before it, in the second quarter of its piece
    sound = sound.reshape(-1)[hop + hop // 2 :][:num_samples]
    return np.clip(sound, -1, 1)


def mouth_spread(utterance: Utterance, times: np.ndarray) -> np.ndarray:
    """Mouth shape at the given seconds [F]: -1 round, 0 neutral, 1 wide."""
    fine = (times[:, None] + np.linspace(-0.04, 0.04, 5)).reshape(-1)
    return _controls_at(utterance, fine, smooth=False)[7].reshape(-1, 5).mean(1)


def _controls_at(utterance: Utterance, times: np.ndarray, *, smooth: bool = True) -> np.ndarray:
    """Phoneme numbers at the given seconds [8, T]; formants and levels glide over some 40 ms when `smooth`."""
    place = np.clip(np.searchsorted(utterance.bounds[:, 0], times, side="right") - 1, 0, None)
    controls = utterance.controls[place].T.copy()  # [8, T]
    silent = (times < utterance.bounds[place, 0]) | (times >= utterance.bounds[place, 1])
    controls[3:5, silent] = 0
    controls[7, silent] = 0
    if smooth:
        padded = np.pad(controls, ((0, 0), (2, 2)), mode="edge")
        width = controls.shape[1]
        controls[:4] = sum(padded[:4, shift : shift + width] for shift in range(5)) / 5
        controls[4] = sum(padded[4, shift : shift + width] for shift in range(1, 4)) / 3
    return controls


def _pitch(utterance: Utterance, timbre: Timbre, times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pitch in Hz per hop [T]: it falls over the utterance, rises on accented words and wavers a little."""
    start_s, end_s = utterance.bounds[0, 0], utterance.bounds[-1, 1]
    place = np.clip(np.searchsorted(utterance.bounds[:, 0], times, side="right") - 1, 0, None)
    accent = np.convolve(utterance.accents[place], np.full(15, 1 / 15), mode="same")[: len(times)]
    fall = 1.5 - 3 * np.clip((times - start_s) / max(end_s - start_s, 0.1), 0, 1)
    waver = 0.3 * np.sin(2 * np.pi * (rng.uniform(4, 6) * times + rng.random()))
    return timbre.f0_hz * 2 ** ((accent - 2 + fall + waver) / 12)


def _pulses(f0: np.ndarray, hop: int, rate_hz: int) -> np.ndarray:
    """A band-limited pulse train whose k-th harmonic has amplitude 1 / k: float32 [(T + 1) * hop]."""
    harmonics = max(1, int(0.45 * rate_hz / f0.max()))
    table_size = 4096
    spectrum = np.zeros(table_size // 2 + 1, np.complex64)
    spectrum[1 : harmonics + 1] = table_size / 2 / np.arange(1, harmonics + 1)
    table = np.asarray(fft.irfft(spectrum, table_size))
    per_hop = np.append(f0, f0[-1]) * (hop * table_size / rate_hz)  # table steps in each hop
    starts = np.cumsum(per_hop) - per_hop
    phase = starts[:, None] + per_hop[:, None] * (np.arange(hop) / hop)  # [T + 1, hop]
    return table[phase.astype(np.int32).reshape(-1) & (table_size - 1)]


def _windows(signal: np.ndarray, places: np.ndarray, hop: int, window: np.ndarray) -> np.ndarray:
    """Spectra [A, K] of the windows around the given hops, in the middle of 4 hops: a zero-phase filter rings ahead."""
    hops = np.lib.stride_tricks.sliding_window_view(signal, 2 * hop)[::hop]
    framed = np.zeros((len(places), 4 * hop), np.float32)
    framed[:, hop : 3 * hop] = hops[np.minimum(places, len(hops) - 1)] * window
    return np.asarray(fft.rfft(framed, axis=1))


def _formants(formants: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Magnitude response [A, K] of four formants [4, A] in parallel, their gains falling and their widths growing."""
    response = np.full((formants.shape[1], len(frequencies)), 0.004, np.float32)
    for centre, gain, width in zip(formants, (1.0, 0.7, 0.45, 0.25), (80, 100, 140, 220), strict=True):
        distance = (frequencies - centre[:, None]) / np.float32(width)
        response += np.float32(gain) / (1 + np.square(distance))
    return response
