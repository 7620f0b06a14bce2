"""make_clip: from (subset, index, settings, seed) to a RawClip with its captions and its exact truth."""

from collections.abc import Collection

import numpy as np

from data.captions import audio_caption, fused_caption, joint_caption, mtv_caption, visual_speech_caption
from data.clip import RawClip
from data.corpus.conditions import control_frames
from data.corpus.dialogue import (
    NUM_REFERENCES,
    main_speaker,
    plan_speech,
    speak_reference,
    spoken_turns,
    transcript,
)
from data.corpus.painting import paint_clip, to_uint8
from data.corpus.scenes import Scene, plan_scene
from data.corpus.settings import CorpusSettings, stream
from data.corpus.voice import VOICE_RMS, Utterance, mouth_spread, synthesise

TRACKS = {
    "basic_face": ("speech",),
    "single_character": ("speech",),
    "multiple_characters": ("speech", "speech_second"),
    "sound_event": ("effects",),
    "visual_mood": ("music",),
}
"""Tracks that sound in every clip of a subset; sound events and moods have speech too where a person is present."""


def make_clip(
    subset: str,
    index: int,
    settings: CorpusSettings,
    seed: int = 0,
    *,
    has_frames: bool = True,
    has_references: bool = True,
    controls: Collection[str] = (),
) -> RawClip:
    """Render one clip: picture, demixed tracks, captions and truth; no state, so any order gives the same clips.

    Without frames nothing is painted (`frames` None, no mouth boxes), without references none are spoken, and all the
    rest is the same clip in less time. controls: which of `data.sample.CONTROLS` are made; the reference image is of
    the person whose voice the references are.

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
    captions = _captions(scene, utterances)
    person = main_speaker(utterances) if utterances else 0
    said_words = transcript(utterances)
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
        "prompt": captions["visual_speech"],
        **_event_truth(scene),
        **_mood_truth(scene),
    }
    return RawClip(
        key=f"{subset}-{seed:04d}-{index:07d}",
        subset=subset, fps=settings.fps, rate_hz=rate_hz,
        frames=_paint(scene, apertures, spreads) if has_frames else None,
        speech=voices[0] if voices else silence,
        effects=_to_pcm(effects),
        music=_to_pcm(music),
        speech_second=voices[1] if len(voices) > 1 else None,
        caption=captions["structured"], transcript=said_words,
        mouth_boxes=_mouth_boxes(scene) if has_frames else [],
        truth=truth,
        captions=captions,
        references=_references(scene, utterances, subset, index, settings, seed) if has_references else (),
        **{name: control_frames(name, subset, index, settings, seed, person=person) for name in controls},
    )  # fmt: skip


def _paint(scene: Scene, apertures: list[np.ndarray], spreads: list[np.ndarray]) -> np.ndarray:
    """The scene in its light, mouths moving: uint8 [F, H, W, 3]."""
    settings = scene.settings
    canvas = paint_clip(
        scene.layers(apertures, spreads),
        num_frames=settings.num_frames, height=settings.height, width=settings.width,
    )  # fmt: skip
    if (light := scene.light()) is not None:
        tint, brightness = light
        canvas *= (tint[:, None] * brightness.astype(np.float32))[:, :, None, None]  # [3, F, 1, 1]
    return to_uint8(canvas)


def _mouth_boxes(scene: Scene) -> list[list[tuple[float, float, float, float]]]:
    """Per frame, per person (x1, y1, x2, y2) in pixels."""
    settings = scene.settings
    boxes = [
        np.round(placed.mouth_boxes(height=settings.height, width=settings.width), 2).tolist()
        for placed in scene.persons
    ]
    return [[tuple(box[frame]) for box in boxes] for frame in range(settings.num_frames)]


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


def _captions(scene: Scene, utterances: list[Utterance]) -> dict[str, str]:
    """The clip in the words of every style."""
    turns = spoken_turns(scene, utterances)
    appearances = [placed.person.appearance for placed in scene.persons]
    speaking = f"Person{1 + main_speaker(utterances)}" if utterances else None
    heard = audio_caption(
        turns,
        sound="" if scene.thing is None else scene.thing.heard,
        music="" if scene.mood is None else scene.mood.heard,
    )
    return {
        "structured": mtv_caption(appearances, speaking, scene.words(), len(scene.persons)),
        "detailed": joint_caption(heard, scene.detailed),
        "short": joint_caption(heard, scene.short),
        "fused": fused_caption(turns, happening=scene.happening, place=scene.place),
        "speech": heard,
        "video": scene.detailed,
        "visual_speech": visual_speech_caption(scene.staging, transcript(utterances)),
    }


def _references(
    scene: Scene, utterances: list[Utterance], subset: str, index: int, settings: CorpusSettings, seed: int
) -> tuple[np.ndarray, ...]:
    """Other utterances of the voice that speaks longest; none where nobody speaks."""
    if not utterances:
        return ()
    person = main_speaker(utterances)
    timbre = scene.persons[person].person.timbre
    rngs = [stream(subset, index, seed, "voice", person, number) for number in range(NUM_REFERENCES)]
    return tuple(_to_pcm(speak_reference(timbre, utterances, rng, settings)) for rng in rngs)


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
