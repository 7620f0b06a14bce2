"""The embedded corpus: what it declares as truth is what its pixels and waveforms show."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from avlit.codecs.embedded_text import WORD, EmbeddedTextEncoder
from data.captions import STYLES, split_visual_speech
from data.clip import SUBSETS, RawClip
from data.corpus import (
    TRACKS,
    CorpusSettings,
    depth_frames,
    identity,
    make_clip,
    pose_frames,
    reference_audio,
    reference_image,
)  # fmt: skip
from data.corpus.dialogue import NUM_REFERENCES, REFERENCE_MARGIN_S, plan_reference
from data.corpus.settings import stream
from data.corpus.sounding_objects import BALLS
from data.corpus.voice import VOCABULARY, Timbre, plan_utterance, synthesise

SETTINGS = CorpusSettings()
ROOT = Path(__file__).parents[1]
PRINT_HASHES = """
from tests.test_corpus import SETTINGS, SUBSETS, clip_hash, make_clip
print(*(clip_hash(make_clip(subset, 3, SETTINGS)) for subset in reversed(SUBSETS)))
"""


def clip_hash(clip: RawClip) -> str:
    digest = hashlib.sha256()
    for array in (clip.frames, clip.speech, clip.effects, clip.music, clip.speech_second, *clip.references):
        digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    digest.update(json.dumps([clip.key, clip.captions, clip.transcript, clip.mouth_boxes, clip.truth]).encode())
    return digest.hexdigest()


def picture(clip: RawClip) -> np.ndarray:
    assert clip.frames is not None
    return clip.frames


def clips_of(subset: str, count: int, settings: CorpusSettings = SETTINGS) -> list[RawClip]:
    return [make_clip(subset, index, settings) for index in range(count)]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first, second)[0, 1])


def frame_rms(sound: np.ndarray, num_frames: int) -> np.ndarray:
    """Independent of the corpus: root mean square of each frame's own samples [F]."""
    return np.array([np.sqrt(np.mean(part.astype(np.float64) ** 2)) for part in np.array_split(sound, num_frames)])


def voices(clip: RawClip) -> list[np.ndarray]:
    tracks = [clip.speech] if clip.speech_second is None else [clip.speech, clip.speech_second]
    return tracks[: len(clip.truth["identity"])]  # type: ignore[arg-type]


def darkness(clip: RawClip, person: int) -> np.ndarray:
    """Share of pixels in the person's mouth box that are nearly black, per frame [F]."""
    shares = []
    for frame, boxes in zip(picture(clip), clip.mouth_boxes, strict=True):
        x1, y1, x2, y2 = (round(edge) for edge in boxes[person])
        shares.append((frame[y1:y2, x1:x2].mean(-1) < 55).mean())
    return np.array(shares)


def pitch_hz(sound: np.ndarray) -> float:
    """Independent of the corpus: the median pitch of the loud windows of 0.1 s, by autocorrelation."""
    pieces = np.lib.stride_tricks.sliding_window_view(sound.astype(np.float64), 1600)[::800]
    loud = [piece for piece in pieces if np.sqrt(np.mean(piece**2)) > 0.04]
    likeness = [np.correlate(piece, piece, "full")[1599:] for piece in loud]
    return float(np.median([16000 / (np.argmax(lags[50:220]) + 50) for lags in likeness]))


@pytest.mark.parametrize("subset", SUBSETS)
def test_same_index_gives_the_same_clip_in_any_order(subset: str) -> None:
    forwards = [clip_hash(make_clip(subset, index, SETTINGS)) for index in (0, 1, 2)]
    backwards = [clip_hash(make_clip(subset, index, SETTINGS)) for index in (2, 1, 0)]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 3


def test_another_process_makes_the_same_clips() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PRINT_HASHES], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.split() == [clip_hash(make_clip(subset, 3, SETTINGS)) for subset in reversed(SUBSETS)]


def test_seeds_are_different_worlds() -> None:
    assert clip_hash(make_clip("basic_face", 0, SETTINGS)) != clip_hash(make_clip("basic_face", 0, SETTINGS, seed=1))


def test_importing_and_rendering_needs_no_torch() -> None:
    program = (
        "import sys, data.corpus as c; c.make_clip('sound_event', 0, c.CorpusSettings()); print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize("subset", SUBSETS)
def test_only_the_declared_tracks_sound(subset: str) -> None:
    for clip in clips_of(subset, 10):
        tracks = {"speech": clip.speech, "effects": clip.effects, "music": clip.music}
        if clip.speech_second is not None:
            tracks["speech_second"] = clip.speech_second
        expected = set(TRACKS[subset]) | ({"speech"} if clip.truth["identity"] else set())
        assert {name for name, track in tracks.items() if np.any(track)} == expected
        for track in tracks.values():
            assert track.dtype == np.float32 and track.shape == (SETTINGS.num_samples,)
            assert np.abs(track).max() <= 1.0
            assert np.array_equal(np.rint(track * 32768), track * 32768), "not on the grid of 16-bit samples"


@pytest.mark.parametrize("subset", ["sound_event", "visual_mood"])
def test_about_half_of_the_scenes_have_a_talking_person(subset: str) -> None:
    share = np.mean([len(clip.truth["identity"]) for clip in clips_of(subset, 60)])  # type: ignore[arg-type]
    assert 0.3 < share < 0.7


@pytest.mark.parametrize("subset", ["basic_face", "single_character", "multiple_characters"])
def test_aperture_follows_the_waveform(subset: str) -> None:
    declared, measured = [], []
    for clip in clips_of(subset, 12):
        for aperture, envelope, voice in zip(
            clip.truth["mouth_aperture"], clip.truth["speech_envelope"], voices(clip), strict=True  # type: ignore[arg-type]
        ):  # fmt: skip
            rms = frame_rms(voice, SETTINGS.num_frames)
            declared.append(correlation(np.array(aperture), np.array(envelope)))
            measured.append(correlation(np.array(aperture), rms))
            shifted = [correlation(np.roll(aperture, shift), rms) for shift in (-1, 1)]
            assert measured[-1] > max(shifted), "the mouth leads or lags the sound"
    assert min(declared) > 0.95
    assert min(measured) > 0.8


@pytest.mark.parametrize("subset", ["basic_face", "single_character", "multiple_characters"])
def test_aperture_is_visible_in_the_mouth_box(subset: str) -> None:
    found = [
        correlation(darkness(clip, person), np.array(aperture))
        for clip in clips_of(subset, 12)
        for person, aperture in enumerate(clip.truth["mouth_aperture"])  # type: ignore[arg-type]
    ]
    assert min(found) > 0.8


def test_listeners_keep_their_mouth_closed_and_both_take_turns() -> None:
    for clip in clips_of("multiple_characters", 12):
        first, second = np.array(clip.truth["mouth_aperture"])
        assert first.max() > 0.3 and second.max() > 0.3
        assert np.minimum(first, second).max() < 0.3
        assert np.all((frame_rms(voices(clip)[0], 25) < 1e-3) == (np.array(clip.truth["speech_envelope"][0]) < 0.01))  # type: ignore[index]


@pytest.mark.parametrize(
    ("subset", "least", "most"),
    [("basic_face", 0.06, 0.08), ("single_character", 0.02, 0.04), ("multiple_characters", 0.02, 0.04)],
)
def test_mouth_boxes_take_their_share_of_the_frame_and_keep_their_size(subset: str, least: float, most: float) -> None:
    for clip in clips_of(subset, 12):
        boxes = np.array(clip.mouth_boxes)  # [F, P, 4]
        assert boxes.shape == (25, len(clip.truth["identity"]), 4)  # type: ignore[arg-type]
        assert boxes.min() >= 0 and boxes.max() <= 64
        sizes = boxes[..., 2:] - boxes[..., :2]
        assert np.ptp(sizes, axis=0).max() < 0.03
        assert least <= sizes.prod(-1).mean() / 64**2 <= most


def test_event_sounds_start_within_a_frame_of_their_picture() -> None:
    kinds = set()
    for clip in clips_of("sound_event", 24):
        events = clip.truth["event_frames"]
        kinds.update(clip.truth["event_kinds"])  # type: ignore[arg-type]
        fine = frame_rms(np.diff(clip.effects, prepend=0), 25 * 8)  # the difference leaves out the decaying hum
        rises = fine[1:] - np.maximum.reduce([np.roll(fine, lag)[1:] for lag in (1, 2, 3)])
        onsets = [place / 8 for place in np.flatnonzero(rises > 0.02) + 1]
        assert isinstance(events, list) and events
        for event in events:
            assert min(abs(onset - (event + 0.5)) for onset in onsets) <= 1.0, (clip.key, event, onsets)
        for onset in onsets:
            assert min(abs(onset - (event + 0.5)) for event in events) <= 1.0, (clip.key, onset, events)
    assert kinds == {"bounce", "switch", "beat"}


def test_events_are_visible_at_their_frames() -> None:
    seen = {"bounce": 0, "switch": 0, "beat": 0}
    for clip in clips_of("sound_event", 40):
        kind = clip.truth["event_kinds"][0]  # type: ignore[index]
        video = picture(clip).astype(np.float32)
        for event in clip.truth["event_frames"]:  # type: ignore[union-attr]
            seen[kind] += 1
            if kind == "switch":
                assert abs(video[event].mean() - video[event - 1].mean()) > 10, clip.key
                continue
            if kind == "bounce":
                moving = next(np.array(colour) for name, colour in BALLS.items() if f"{name} ball" in clip.caption)
                contact = 52
            else:
                moving, contact = np.array((70.0, 46.0, 30.0)), 39
            near = np.abs(video[max(event - 1, 0) : event + 2] - moving).max(-1) < 6  # [<=3, H, W]
            lowest = np.flatnonzero(near.any((0, 2))).max() + 1
            assert lowest >= contact, (clip.key, event, lowest)
    assert min(seen.values()) > 3


def test_mode_sets_the_palette_and_tempo_the_brightness() -> None:
    tempos, lights = [], []
    for clip in clips_of("visual_mood", 40):
        red, _, blue = picture(clip).reshape(-1, 3).mean(0)
        assert clip.truth["palette"] == ("warm" if clip.truth["mode"] == "major" else "cool")
        assert (red > blue) == (clip.truth["mode"] == "major"), clip.key
        tempos.append(clip.truth["tempo_bpm"])
        lights.append(picture(clip).mean())
        pulse = picture(clip)[:, :8].mean((1, 2, 3))
        if not clip.truth["identity"]:
            assert correlation(pulse, np.array(clip.truth["brightness"])) > 0.98
    assert correlation(np.array(tempos), np.array(lights)) > 0.6


def test_music_holds_the_third_of_its_mode() -> None:
    """In the first chord, the third that was played is far louder than the third of the other mode."""
    long = CorpusSettings(fps=12, num_frames=49, height=32, width=32)
    for index in range(12):
        clip = make_clip("visual_mood", index, long)
        spectrum = np.abs(np.fft.rfft(clip.music[: round(60 / clip.truth["tempo_bpm"] * 2 * 16000)], 1 << 17))  # type: ignore[operator]
        power = {}
        for mode, semitones in (("minor", 3), ("major", 4)):
            roots = 110 * 2 ** (np.arange(12) / 12)
            power[mode] = {
                round(root, 3): spectrum[round(root * 2 ** (semitones / 12) * (1 << 17) / 16000)] for root in roots
            }
        root = max(
            power["major"], key=lambda hertz: spectrum[round(hertz * (1 << 17) / 16000)] + spectrum[
                round(hertz * 1.4983 * (1 << 17) / 16000)
            ],
        )  # fmt: skip
        played = str(clip.truth["mode"])
        other = "minor" if played == "major" else "major"
        assert power[played][root] > 2 * power[other][root], clip.key


def test_timbre_is_heard_as_pitch() -> None:
    for f0_hz in (100.0, 180.0, 240.0):
        rng = np.random.default_rng(1)
        said = plan_utterance(rng, [(0.1, 1.9)])
        sound = synthesise(said, Timbre(f0_hz, 1.0), rng, rate_hz=16000, num_samples=32000)
        measured = []
        for word in said.words:
            middle = round((word.start_s + word.end_s) / 2 * 16000)
            piece = sound[middle - 800 : middle + 800].astype(np.float64)
            if np.sqrt(np.mean(piece**2)) < 0.04:
                continue
            likeness = np.correlate(piece, piece, "full")[len(piece) - 1 :]
            measured.append(16000 / (np.argmax(likeness[50:200]) + 50))
        assert measured and abs(np.log2(np.median(measured) / f0_hz)) < 0.3


def test_captions_follow_the_template_and_stay_short() -> None:
    for subset in SUBSETS:
        for clip in clips_of(subset, 30):
            persons = len(clip.truth["identity"])  # type: ignore[arg-type]
            start = {0: "No conversation. Scene Description: ", 1: "One person conversation. Persons: Person1: A",
                     2: "Two person conversation. Persons: Person1: A"}[persons]  # fmt: skip
            assert clip.caption.startswith(start)
            assert clip.caption.count(" is speaking. Scene Description: ") == (persons > 0)
            assert len(clip.caption.split()) <= 45, clip.caption
            for person in clip.truth["identity"]:  # type: ignore[union-attr]
                clothes = f"{person['clothes_colour']} {person['garment']}"
                assert f"{person['hair_colour']} hair and a {clothes}" in clip.caption
            assert clip.captions["visual_speech"] == clip.truth["prompt"]
            seen, said = split_visual_speech(str(clip.truth["prompt"]))
            assert said == (clip.transcript or "No speech.")
            for person in clip.truth["identity"]:  # type: ignore[union-attr]
                assert not any(look in seen for look in (person["garment"], person["gender"], person["hair_style"]))


def test_words_lie_inside_the_clip_and_where_the_voice_sounds() -> None:
    for clip in [*clips_of("single_character", 6), *clips_of("multiple_characters", 6)]:
        for word in clip.truth["words"]:  # type: ignore[union-attr]
            start, end = (round(word[name] * 16000) for name in ("start_s", "end_s"))
            assert 0 <= start < end <= SETTINGS.num_samples
            assert word["word"] in clip.transcript
            assert np.sqrt(np.mean(voices(clip)[word["person"]][start:end] ** 2)) > 0.02
        assert clip.truth == json.loads(json.dumps(clip.truth))


@pytest.mark.parametrize("subset", SUBSETS)
def test_sound_without_picture_is_the_same_clip(subset: str) -> None:
    for index in range(6):
        seen, heard = make_clip(subset, index, SETTINGS), make_clip(subset, index, SETTINGS, has_frames=False)
        assert heard.frames is None and heard.mouth_boxes == []
        assert clip_hash(replace(seen, frames=None, mouth_boxes=[])) == clip_hash(heard)
        mute = make_clip(subset, index, SETTINGS, has_frames=False, has_references=False)
        assert clip_hash(replace(heard, references=())) == clip_hash(mute)


@pytest.mark.parametrize("subset", SUBSETS)
def test_references_speak_as_loud_as_the_clip_from_the_start_on(subset: str) -> None:
    for clip in (make_clip(subset, index, SETTINGS, has_frames=False) for index in range(20)):
        assert len(clip.references) == (NUM_REFERENCES if clip.transcript else 0)
        for sound in clip.references:
            assert sound.dtype == np.float32 and sound.ndim == 1 and np.abs(sound).max() <= 1
            assert np.array_equal(np.rint(sound * 32768), sound * 32768), "not on the grid of 16-bit samples"
            assert 0.75 * 16000 < len(sound) <= SETTINGS.reference_s * 16000
            assert np.sqrt(np.mean(sound[:3200] ** 2)) > 0.015 and np.sqrt(np.mean(sound[-3200:] ** 2)) > 0.015
            own = max(np.sqrt(np.mean(voice[np.abs(voice) > 0.01] ** 2)) for voice in voices(clip))
            assert 0.4 < np.sqrt(np.mean(sound[np.abs(sound) > 0.01] ** 2)) / own < 2.5


@pytest.mark.parametrize("subset", ["basic_face", "multiple_characters"])
def test_references_have_the_pitch_of_who_speaks_most(subset: str) -> None:
    off = []
    for clip in (make_clip(subset, index, SETTINGS, has_frames=False) for index in range(12)):
        spoken = [0.0, 0.0]
        for word in clip.truth["words"]:  # type: ignore[union-attr]
            spoken[word["person"]] += word["end_s"] - word["start_s"]
        f0_hz = clip.truth["timbre"][int(np.argmax(spoken))]["f0_hz"]  # type: ignore[index]
        off += [np.log2(pitch_hz(sound) / f0_hz) for sound in clip.references]
    assert np.abs(off).max() < 0.4, "within 5 semitones: intonation moves the pitch by 3"
    assert np.abs(np.median(off)) < 0.1


def test_references_say_other_words_than_the_clip_and_each_its_own() -> None:
    distinct = []
    for index in range(40):
        clip = make_clip("basic_face", index, SETTINGS, has_frames=False)
        taken = set(clip.transcript.split())
        plans = [
            plan_reference(taken, stream("basic_face", index, 0, "voice", 0, number), SETTINGS)
            for number in range(NUM_REFERENCES)
        ]
        for plan, sound in zip(plans, clip.references, strict=True):
            assert not taken & set(plan.text.split())
            assert len(sound) == round((plan.words[-1].end_s + REFERENCE_MARGIN_S) * 16000)
        distinct.append(len({plan.text for plan in plans}))
    assert np.mean(np.array(distinct) == NUM_REFERENCES) > 0.9
    assert set(plan_reference(set(VOCABULARY), np.random.default_rng(0), SETTINGS).text.split()) <= set(VOCABULARY)


def test_a_reference_is_the_clips_own_and_of_either_person() -> None:
    clip = make_clip("multiple_characters", 1, SETTINGS, has_frames=False)
    spoken = [
        [reference_audio("multiple_characters", 1, SETTINGS, person=person, number=number) for number in range(3)]
        for person in range(2)
    ]
    likeness = [all(len(a) == len(b) and np.allclose(a, b, atol=2e-5) for a, b in zip(clip.references, of, strict=True))
                for of in spoken]  # fmt: skip
    assert sorted(likeness) == [False, True]


@pytest.mark.parametrize("subset", SUBSETS)
def test_captions_of_all_styles_hold_the_spoken_words_and_fit_the_text_encoder(subset: str) -> None:
    encoder = EmbeddedTextEncoder()
    for index in range(120):
        clip = make_clip(subset, index, SETTINGS, has_frames=False, has_references=False)
        assert clip.captions.keys() == STYLES.keys() and clip.captions["structured"] == clip.caption
        said = [
            " ".join(word["word"] for word in clip.truth["words"] if word["person"] == person)  # type: ignore[union-attr]
            for person in range(len(clip.truth["identity"]))  # type: ignore[arg-type]
        ]
        for style in ("detailed", "short", "fused", "speech", "visual_speech"):
            assert all(words in clip.captions[style] for words in said), clip.captions[style]
        for style in ("short", "fused", "speech", "visual_speech"):
            assert len(WORD.findall(clip.captions[style])) <= encoder.max_tokens, clip.captions[style]
        heard = encoder.encode(clip.captions["speech"])
        for style in ("detailed", "short"):
            assert encoder.encode(clip.captions[style])[: len(heard)].equal(heard), clip.captions[style]
        assert clip.captions["fused"].count(".") == 1


def test_turns_are_captioned_in_the_order_they_are_spoken() -> None:
    long = CorpusSettings(num_frames=73)
    for index in range(10):
        clip = make_clip("multiple_characters", index, long, has_frames=False, has_references=False)
        words = sorted(clip.truth["words"], key=lambda word: word["start_s"])  # type: ignore[arg-type]
        turns = [part.split(".")[0] for part in clip.captions["speech"].split(" says: ")[1:]]
        assert " ".join(turns) == " ".join(word["word"] for word in words)
        assert clip.captions["speech"].startswith(f"Person{1 + words[0]['person']} says: ") and len(turns) > 2


def test_a_voice_is_called_low_or_high_by_its_pitch() -> None:
    heard: dict[str, list[float]] = {}
    for index in range(80):
        clip = make_clip("basic_face", index, SETTINGS, has_frames=False, has_references=False)
        called = clip.captions["speech"].split("Voice: ")[1].rstrip(".")
        heard.setdefault(called, []).append(clip.truth["timbre"][0]["f0_hz"])  # type: ignore[index]
    order = ["low male", "high male", "low female", "high female"]
    assert sorted(heard) == sorted(order)
    assert all(max(heard[below]) < min(heard[above]) for below, above in pairwise(order))


@pytest.mark.parametrize(
    "settings",
    [
        CorpusSettings(fps=8, num_frames=17, height=48, width=80, rate_hz=24000),
        CorpusSettings(fps=24, num_frames=49, height=96, width=64, rate_hz=44100),
        CorpusSettings(fps=25, num_frames=5, height=64, width=64),
        CorpusSettings(num_frames=1, height=32, width=32, rate_hz=8000),
    ],
    ids=lambda settings: identity(settings).split(":")[1],
)
def test_other_sizes_rates_and_lengths_work(settings: CorpusSettings) -> None:
    for subset in SUBSETS:
        for clip in clips_of(subset, 3, settings):
            assert picture(clip).shape == (settings.num_frames, settings.height, settings.width, 3)
            assert picture(clip).dtype == np.uint8
            assert clip.speech.shape == (settings.num_samples,)
            assert len(clip.mouth_boxes) == settings.num_frames
            assert all(np.isfinite(track).all() for track in (clip.speech, clip.effects, clip.music))
            assert all(0 <= event < settings.num_frames for event in clip.truth["event_frames"])  # type: ignore[union-attr]
            boxes = np.array(clip.mouth_boxes)
            assert boxes.size == 0 or ((boxes >= 0).all() and (boxes[..., [0, 2]] <= settings.width).all())


def test_another_size_shows_the_same_people_and_the_same_words() -> None:
    small, large = (make_clip("single_character", 5, CorpusSettings(height=side, width=side)) for side in (64, 128))
    assert small.caption == large.caption and small.transcript == large.transcript
    assert np.array_equal(small.speech, large.speech)


def test_conditions_match_their_clip() -> None:
    for subset, index in (("single_character", 0), ("multiple_characters", 1), ("sound_event", 2)):
        clip = make_clip(subset, index, SETTINGS)
        depth, pose = depth_frames(subset, index, SETTINGS), pose_frames(subset, index, SETTINGS)
        assert depth.shape == (25, 64, 64) and depth.min() >= 0 and depth.max() <= 1
        assert pose.shape == (25, 64, 64, 3) and pose.dtype == np.uint8
        assert pose.any() == bool(clip.truth["identity"])
        for frame in (0, 12, 24):
            for x1, y1, x2, y2 in clip.mouth_boxes[frame]:
                assert depth[frame, round((y1 + y2) / 2), round((x1 + x2) / 2)] == pytest.approx(0.8, abs=0.01)
        for person in range(len(clip.truth["identity"])):  # type: ignore[arg-type]
            still = reference_image(subset, index, SETTINGS, person=person)
            x1, y1, x2, _ = (round(edge) for edge in clip.mouth_boxes[12][person])
            skin = picture(clip)[12, y1 - 1, [x1 + 1, x2 - 1]].mean(0)
            assert np.abs(still.reshape(-1, 3).astype(float) - skin).max(1).min() < 25, "another skin"
            voice = reference_audio(subset, index, SETTINGS, person=person)
            assert 0.7 * 16000 < len(voice) <= 1.4 * 16000 and np.sqrt(np.mean(voice**2)) > 0.02
            assert np.array_equal(voice, reference_audio(subset, index, SETTINGS, person=person))
            assert not np.array_equal(voice, reference_audio(subset, index, SETTINGS, person=person, number=1))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"subset='faces'.*basic_face"):
        make_clip("faces", 0, SETTINGS)
    with pytest.raises(ValueError, match="index=-1"):
        make_clip("basic_face", -1, SETTINGS)
    with pytest.raises(ValueError, match="height=16"):
        CorpusSettings(height=16)
    with pytest.raises(ValueError, match="person=1: clip 0 of basic_face has 1"):
        reference_image("basic_face", 0, SETTINGS, person=1)
    with pytest.raises(ValueError, match="reference_s=0"):
        CorpusSettings(reference_s=0)


def test_identity_names_every_setting() -> None:
    others = [
        CorpusSettings(fps=24), CorpusSettings(num_frames=49), CorpusSettings(height=96), CorpusSettings(width=96),
        CorpusSettings(rate_hz=24000), CorpusSettings(reference_s=1.0), CorpusSettings(version="0"),
    ]  # fmt: skip
    assert len({identity(settings) for settings in (SETTINGS, *others)}) == len(others) + 1
