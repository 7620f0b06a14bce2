"""make_clip: from (subset, index, settings, seed) to a RawClip with its caption and its exact truth."""

from itertools import pairwise

import numpy as np

from data.captions import mtv_caption
from data.clip import RawClip
from data.corpus.painting import paint_clip, to_uint8
from data.corpus.scenes import Scene, plan_scene
from data.corpus.settings import CorpusSettings, stream
from data.corpus.voice import VOICE_RMS, Utterance, mouth_spread, plan_utterance, synthesise

TRACKS = {
    "basic_face": ("speech",),
    "single_character": ("speech",),
    "multiple_characters": ("speech", "speech_second"),
    "sound_event": ("effects",),
    "visual_mood": ("music",),
}
"""Tracks that sound in every clip of a subset; sound events and moods have speech too where a person is present."""


def make_clip(subset: str, index: int, settings: CorpusSettings, seed: int = 0) -> RawClip:
    """Render one clip: picture, demixed tracks, caption and truth; no state, so any order gives the same clips.

    Bits are equal on equal processors; another vector unit may round a pixel or a sample by one level.
    """
    scene = plan_scene(subset, index, settings, seed)
    utterances = plan_speech(scene, stream(subset, index, seed, "speech"))
    sounds = stream(subset, index, seed, "sounds")
    rate_hz, num_samples = settings.rate_hz, settings.num_samples
    voices = [
        _to_pcm(synthesise(said, placed.person.timbre, sounds, rate_hz=rate_hz, num_samples=num_samples))
        for said, placed in zip(utterances, scene.persons, strict=True)
    ]
    silence = np.zeros(num_samples, np.float32)
    effects = silence if scene.thing is None else scene.thing.sound(sounds, rate_hz=rate_hz, num_samples=num_samples)
    music = silence if scene.mood is None else scene.mood.sound(rate_hz=rate_hz, num_samples=num_samples)

    envelopes = [speech_envelope(voice, settings) for voice in voices]
    apertures = [mouth_aperture(voice, settings) for voice in voices]
    spreads = [mouth_spread(said, settings.frame_times) for said in utterances]
    canvas = paint_clip(
        scene.layers(apertures, spreads),
        num_frames=settings.num_frames, height=settings.height, width=settings.width,
    )  # fmt: skip
    if (light := scene.light()) is not None:
        tint, brightness = light
        canvas *= (tint[:, None] * brightness.astype(np.float32))[:, :, None, None]  # [3, F, 1, 1]

    boxes = [person.mouth_boxes(height=settings.height, width=settings.width) for person in scene.persons]
    appearances = [placed.person.appearance for placed in scene.persons]
    transcript = _transcript(utterances)
    speaking = f"Person{1 + _main_speaker(utterances)}" if utterances else None
    caption = mtv_caption(appearances, speaking, scene.words, len(scene.persons))
    visual = " ".join([*(f"{appearance}." for appearance in appearances), scene.words])
    truth: dict[str, object] = {
        "mouth_aperture": [_rounded(aperture) for aperture in apertures],
        "mouth_spread": [_rounded(spread) for spread in spreads],
        "speech_envelope": [_rounded(envelope) for envelope in envelopes],
        "identity": [placed.person.attributes for placed in scene.persons],
        "timbre": [
            {"f0_hz": placed.person.timbre.f0_hz, "formant_scale": placed.person.timbre.formant_scale}
            for placed in scene.persons
        ],
        "words": [
            {"word": word.word, "start_s": round(word.start_s, 4), "end_s": round(word.end_s, 4), "person": person}
            for person, said in enumerate(utterances)
            for word in said.words
        ],
        "background": {"place": scene.background.place, "colour": scene.background.colour},
        "prompt": f"[VISUAL]: {visual} [SPEECH]: {transcript or 'No speech.'}",
        **_event_truth(scene),
        **_mood_truth(scene),
    }
    return RawClip(
        key=f"{subset}-{seed:04d}-{index:07d}",
        subset=subset, fps=settings.fps, rate_hz=rate_hz,
        frames=to_uint8(canvas),
        speech=voices[0] if voices else silence,
        effects=_to_pcm(effects),
        music=_to_pcm(music),
        speech_second=voices[1] if len(voices) > 1 else None,
        caption=caption, transcript=transcript,
        mouth_boxes=[
            [tuple(box[frame]) for box in (np.round(boxes, 2).tolist() if boxes else [])]
            for frame in range(settings.num_frames)
        ],
        truth=truth,
    )  # fmt: skip


def plan_speech(scene: Scene, rng: np.random.Generator) -> list[Utterance]:
    """What each person says; two persons take turns of a second or two, in random order."""
    end_s = scene.settings.duration_s
    margin_s = min(0.06, 0.1 * end_s)
    if len(scene.persons) < 2:
        start_s = margin_s + float(rng.uniform(0, 0.12 * end_s if end_s < 2 else 0.25))
        return [plan_utterance(rng, [(start_s, end_s - margin_s)]) for _ in scene.persons]
    turns: tuple[list, list] = ([], [])
    speaker = int(rng.integers(2))
    num_turns = max(2, round(end_s / 1.4))
    cuts = np.arange(num_turns + 1.0)
    cuts[1:-1] += rng.uniform(-0.15, 0.15, num_turns - 1)
    cuts *= end_s / num_turns
    gap_s = min(0.1, 0.05 * end_s)
    for start, end in pairwise(cuts):
        turns[speaker].append((start + gap_s / 2, end - gap_s))
        speaker = 1 - speaker
    return [plan_utterance(rng, turn) for turn in turns]


def speech_envelope(voice: np.ndarray, settings: CorpusSettings) -> np.ndarray:
    """Loudness of each frame's own stretch of sound [F]: RMS over that of a stressed open vowel, at most 1."""
    quarters = _quarter_power(voice, settings)
    return np.minimum(np.sqrt(quarters.reshape(-1, 4).mean(1)) / VOICE_RMS, 1)


def mouth_aperture(voice: np.ndarray, settings: CorpusSettings) -> np.ndarray:
    """How far the mouth is open in each frame [F], 0..1: the envelope, smoothed over two frames, without any lag."""
    quarters = np.pad(_quarter_power(voice, settings), 2)
    weights = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(8) + 0.5) / 8)
    windows = np.lib.stride_tricks.sliding_window_view(quarters, 8)[::4]  # [F, 8]: two frames around each centre
    return np.minimum(np.sqrt((windows * weights).sum(1) / weights.sum()) / VOICE_RMS, 1)


def _quarter_power(voice: np.ndarray, settings: CorpusSettings) -> np.ndarray:
    """Mean square in each quarter of a frame [4 F]."""
    edges = (np.arange(4 * settings.num_frames + 1) * (len(voice) / (4 * settings.num_frames))).astype(int)
    return np.add.reduceat(np.square(voice), edges[:-1]) / np.diff(edges)


def _main_speaker(utterances: list[Utterance]) -> int:
    """Who speaks longest."""
    return int(np.argmax([sum(word.end_s - word.start_s for word in said.words) for said in utterances]))


def _transcript(utterances: list[Utterance]) -> str:
    if len(utterances) < 2:
        return " ".join(said.text for said in utterances)
    return " ".join(f"Person{number}: {said.text}." for number, said in enumerate(utterances, 1))


def _event_truth(scene: Scene) -> dict[str, object]:
    thing = scene.thing
    if thing is None:
        return {"event_frames": [], "event_kinds": [], "event_times_s": []}
    kinds = [thing.kind] * len(thing.frames)
    return {"event_frames": thing.frames.tolist(), "event_kinds": kinds, "event_times_s": _rounded(thing.times_s)}


def _mood_truth(scene: Scene) -> dict[str, object]:
    mood = scene.mood
    if mood is None:
        return {"mode": None, "tempo_bpm": None, "palette": None, "brightness": None}
    brightness = _rounded(mood.brightness(scene.settings.frame_times))
    return {"mode": mood.mode, "tempo_bpm": mood.tempo_bpm, "palette": mood.palette, "brightness": brightness}


def _rounded(numbers: np.ndarray) -> list[float]:
    return np.round(numbers, 4).tolist()


def _to_pcm(sound: np.ndarray) -> np.ndarray:
    """Onto the grid of 16-bit samples: a clip stored as FLAC is the clip that was made."""
    return np.rint(np.clip(sound, -1, 32767 / 32768) * np.float32(32768)) / np.float32(32768)
