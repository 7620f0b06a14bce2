"""Exact metrics move when the truth is shifted, swapped or destroyed, and agree with other computations."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import linalg
from scipy.ndimage import gaussian_filter, shift

from avlit.commands.measured_clips import asked_for
from avlit.errors import ConfigError
from avlit.metrics import av_align, events, mood, mouths, places, registry, spoken_words
from avlit.metrics.clip import Clip
from avlit.metrics.estimate import among_others, estimate, frechet, mean, share
from avlit.metrics.metric import Metric, Tools, Weights
from data.clip import RawClip
from data.corpus import CorpusSettings, make_clip
from data.sample import Annotation

SETTINGS = CorpusSettings(num_frames=25)


def clips_of(subset: str, count: int) -> list[Clip]:
    """True clips of the embedded corpus; their sound drives them."""
    return [as_measured(make_clip(subset, number, SETTINGS, has_references=False)) for number in range(count)]


def pictures(clip: Clip) -> np.ndarray:
    assert clip.frames is not None
    return clip.frames


def as_measured(raw: RawClip) -> Clip:
    assert raw.frames is not None
    num_frames, height, width = raw.frames.shape[:3]
    about = Annotation(
        caption=raw.caption, transcript=raw.transcript, subset=raw.subset, fps=raw.fps, rate_hz=raw.rate_hz,
        num_frames=num_frames, height=height, width=width, mouth_boxes=raw.mouth_boxes, truth=raw.truth,
    )  # fmt: skip
    return replace(
        asked_for(about, key=raw.key, prompt=raw.caption), frames=raw.frames, waveform=raw.mix, rate_hz=raw.rate_hz,
        has_own_sound=False, mouth_boxes=raw.mouth_boxes, pose_boxes=raw.mouth_boxes,
    )  # fmt: skip


def value(name: str, clips: list[Clip], tools: Tools | None = None) -> float:
    """A registered metric over clips."""
    metric = registry.metrics()[name]
    measure = metric.meter.open(tools or Tools())
    readings = [found[name] for clip in clips if metric.meter.applies(clip) and name in (found := measure(clip))]
    return estimate(readings, metric.summary).value


@pytest.fixture(scope="module")
def faces() -> list[Clip]:
    return clips_of("basic_face", 6)


@pytest.fixture(scope="module")
def happenings() -> list[Clip]:
    return clips_of("sound_event", 9)


@pytest.fixture(scope="module")
def moods() -> list[Clip]:
    return clips_of("visual_mood", 8)


def swapped(clips: list[Clip], *names: str) -> list[Clip]:
    """Every clip with what the next one has of these."""
    others = [*clips[1:], clips[0]]
    return [replace(clip, **{name: getattr(o, name) for name in names}) for clip, o in zip(clips, others, strict=True)]


def destroyed(clip: Clip) -> Clip:
    return replace(clip, frames=np.random.default_rng(0).integers(0, 255, pictures(clip).shape, dtype=np.uint8))


def stilled(clip: Clip) -> Clip:
    return replace(clip, frames=np.repeat(pictures(clip)[:1], len(pictures(clip)), axis=0))


def test_lip_sync_and_its_lag_follow_the_mouth(faces: list[Clip]):
    assert value("lip_sync", faces) > 0.85
    assert value("lip_sync_lag", faces) == 0
    late = [replace(clip, frames=np.concatenate([pictures(clip)[:1]] * 3 + [pictures(clip)[:-3]])) for clip in faces]
    assert value("lip_sync_lag", late) == pytest.approx(3, abs=0.5)
    assert value("lip_sync", late) < 0.5
    by_chance = value("lip_sync_shuffled", faces)
    assert by_chance < 0.5
    pairs = np.mean([value("lip_sync", [replace(a, speech_envelopes=b.speech_envelopes)])
                     for a in faces for b in faces if a is not b])  # fmt: skip
    assert by_chance == pytest.approx(pairs)
    assert abs(value("lip_sync", [destroyed(clip) for clip in faces])) < 0.25


def test_generated_speech_is_what_the_mouth_is_compared_with(faces: list[Clip]):
    own = [replace(clip, has_own_sound=True, speech_envelopes=None) for clip in faces]
    assert value("lip_sync", own) > 0.85
    silent = [replace(clip, waveform=np.zeros_like(clip.waveform)) for clip in own]
    assert value("lip_sync", silent) == 0


def test_lag_is_where_scipy_finds_the_greatest_correlation():
    speech = gaussian_filter(np.random.default_rng(1).standard_normal(40), 1.0)
    for late in (-4, 0, 3):
        mouth = np.roll(speech, late)
        lag, height = mouths.best_lag(mouth, speech, furthest=6)
        inner = [np.corrcoef(mouth[6 + k : 34 + k], speech[6:34])[0, 1] for k in range(-6, 7)]
        assert lag == late == int(np.argmax(inner)) - 6
        assert height == pytest.approx(1.0)


def test_events_are_seen_when_they_are_heard_and_not_when_others_are(happenings: list[Clip]):
    assert value("event_timing", happenings) > 0.97
    assert value("event_timing_near", happenings) > 0.95
    assert value("event_timing_near_shuffled", happenings) < 0.7
    late = [
        replace(clip, event_times_s=tuple(time + 2.5 / clip.fps for time in clip.event_times_s or ()))
        for clip in happenings
    ]
    assert value("event_timing_near", late) < 0.6 < 0.8 < value("event_timing", late)
    assert value("event_timing_near", swapped(happenings, "event_times_s")) < 0.8
    still = [stilled(clip) for clip in happenings]
    assert value("event_timing", still) == 0


def test_event_f1_is_two_matches_over_all():
    assert events.event_f1([3, 10, 20], [5, 11], within=3) == pytest.approx(2 * 2 / 5)
    assert events.event_f1([3, 4], [5], within=3) == pytest.approx(2 / 3), "an onset is matched once"
    assert events.event_f1([], [5], within=3) == 0
    assert events.event_f1([], [], within=3) == 1


def test_onsets_are_where_sounds_begin_and_nowhere_in_silence():
    rate_hz, starts = 16000, (0.4, 0.9, 1.55)
    sound = np.zeros(2 * rate_hz, np.float32)
    for start in starts:
        time = np.arange(3000) / rate_hz
        place = round(start * rate_hz)
        sound[place : place + 3000] += (
            0.5 * np.sin(2 * np.pi * 440 * time) * np.exp(-20 * time) * (1 - time / time[-1])
        ).astype(np.float32)
    assert av_align.audio_peaks(sound, rate_hz) == pytest.approx(starts, abs=0.06)
    assert av_align.audio_peaks(np.zeros(rate_hz, np.float32), rate_hz) == []


def test_onsets_are_librosas():
    librosa = pytest.importorskip("librosa")
    for clip in clips_of("sound_event", 2):
        assert clip.waveform is not None
        heard = librosa.resample(clip.waveform, orig_sr=clip.rate_hz, target_sr=av_align.RATE_HZ)
        strength = librosa.onset.onset_strength(y=heard, sr=av_align.RATE_HZ)
        assert av_align.onset_strength(heard) == pytest.approx(strength, abs=1e-3)
        found = librosa.onset.onset_detect(onset_envelope=strength, sr=av_align.RATE_HZ, units="time")
        assert av_align.audio_peaks(heard, av_align.RATE_HZ) == pytest.approx(found.tolist())


def test_peaks_within_a_frame_meet_once_each():
    fps = 10.0
    assert av_align.peaks_met([0.5, 1.0], [0.55, 1.2], fps=fps) == pytest.approx(1 / 3)
    assert av_align.peaks_met([0.5, 0.52], [0.5], fps=fps) == pytest.approx(1 / 2)
    assert av_align.peaks_met([0.5], [0.7], fps=fps) == 0
    assert math.isnan(av_align.peaks_met([], [], fps=fps))


def test_av_align_is_high_for_a_jump_with_its_sound_and_low_for_one_without():
    pytest.importorskip("cv2")
    rate_hz, fps = 16000, 12.0
    picture = gaussian_filter(np.random.default_rng(0).uniform(0, 255, (64, 64)), 2)
    frames = np.stack([np.roll(picture, 3 * sum(n > jump for jump in (6, 14, 20)), axis=1) for n in range(25)])
    frames = np.repeat(frames[..., None], 3, axis=-1).astype(np.uint8)
    sound = np.zeros(round(25 / fps * rate_hz), np.float32)
    noise = np.random.default_rng(1).standard_normal(800).astype(np.float32) * 0.3
    late = sound.copy()
    for jump in (6, 14, 20):
        for track, delay_s in ((sound, 0.0), (late, 0.29)):
            place = round(((jump + 1) / fps + delay_s) * rate_hz)
            track[place : place + 800] += noise[: len(track) - place]
    clip = Clip("a", fps, frames=frames, waveform=sound, rate_hz=rate_hz)
    assert value("AV-Align", [clip]) == 1
    assert value("AV-Align", [replace(clip, waveform=late)]) == 0


def test_mood_follows_the_music(moods: list[Clip]):
    assert value("mood", moods) == 1
    opposite = [replace(clip, music_mode="minor" if clip.music_mode == "major" else "major") for clip in moods]
    assert value("mood", opposite) == 0
    assert value("mood_pulse", moods) > 0.8
    assert abs(value("mood_pulse", swapped(moods, "brightness"))) < 0.6
    assert abs(value("mood_pulse", [destroyed(clip) for clip in moods])) < 0.5


def test_warmth_is_the_logarithm_of_red_over_blue():
    frames = np.zeros((1, 4, 4, 3), np.uint8) + np.array([199, 7, 99], np.uint8)
    assert mood.warmth(frames) == pytest.approx(math.log(2))


def test_pose_error_is_the_distance_of_heads_from_their_places():
    people = clips_of("single_character", 3)
    true = [replace(clip, real=clip) for clip in people]
    assert value("pose_error", true) == 0
    for down, right in ((2, 0), (-1, 3)):
        moved = [
            replace(clip, frames=shift(pictures(clip), (0, down, right, 0), order=0, mode="nearest"), real=clip)
            for clip in people
        ]
        assert value("pose_error", moved) == pytest.approx(math.hypot(down, right), abs=0.5)
    assert value("pose_error", [replace(destroyed(clip), real=clip) for clip in people]) > 2.5
    darker = [replace(clip, frames=(0.6 * pictures(clip)).astype(np.uint8), real=clip) for clip in people]
    assert value("pose_error", darker) < 0.3, "light does not matter"


def test_motion_and_picture_are_those_of_the_true_clip(faces: list[Clip]):
    true = [replace(clip, real=clip, num_given=1) for clip in faces]
    assert value("motion_ratio", true) == 1
    assert value("picture_psnr", true) == 100
    still = [stilled(clip) for clip in true]
    assert value("motion_ratio", still) == 0
    brighter = [np.clip(pictures(clip).astype(int) + 10, 0, 255).astype(np.uint8) for clip in true]
    noisy = [replace(clip, frames=frames) for clip, frames in zip(true, brighter, strict=True)]
    assert value("picture_psnr", noisy) == pytest.approx(20 * math.log10(255 / 10), abs=0.5)
    assert value("motion_ratio", noisy) == pytest.approx(1, abs=0.05)


def test_words_are_counted_over_clips_together_and_against_all_others():
    readings = [("hello moon", "hello moon"), ("sea", "seven sea day"), ("", "open water")]
    metrics = registry.metrics()
    assert estimate(readings, metrics["words"].summary).value == pytest.approx(1 - 4 / 7)
    chance = estimate([("a b", "a b"), ("c d", "c d"), ("a d", "a d")], metrics["words_shuffled"].summary).value
    assert chance == pytest.approx(1 - (2 + 1 + 2 + 1 + 1 + 1) / 12)


def test_only_sentences_of_one_speaker_are_judged(faces: list[Clip]):
    heard: list[np.ndarray] = []

    def judge(sounds):
        heard.extend(sounds)
        return ["hello"]

    measure = spoken_words.METER.open(Tools(word_judge=lambda: judge))  # type: ignore[arg-type,return-value]
    own = replace(faces[0], has_own_sound=True)
    assert measure(own)["words"] == ("hello", faces[0].transcript)
    assert measure(replace(own, num_speakers=2)) == {}
    assert len(heard) == 1
    assert not spoken_words.METER.applies(faces[0]), "speech that drove the video says nothing about the model"


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        found = estimate(list(rng.normal(1.0, 2.0, 40)), mean, seed=seed)
        assert found.low is not None and found.high is not None
        covered += found.low <= 1.0 <= found.high
    assert 86 <= covered <= 100
    wide = estimate(list(rng.normal(1.0, 2.0, 40)), mean)
    assert wide.high is not None and wide.low is not None
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(40), rel=0.3)
    assert estimate([1.0], mean).low is None


def test_shares_weigh_long_clips_more_and_pairs_leave_out_a_clip_itself():
    assert estimate([(1.0, 2.0), (0.0, 8.0)], share).value == pytest.approx(0.1)
    distance = among_others(lambda a, b: abs(float(a) - float(b)))  # type: ignore[arg-type]
    assert estimate([0.0, 1.0, 3.0], distance).value == pytest.approx((1 + 3 + 2) / 3)


def test_frechet_distance_is_that_of_the_matrix_root():
    rng = np.random.default_rng(0)
    generated, real = rng.normal(0.3, 1.5, (60, 5)), rng.normal(0, 1, (60, 5))
    readings = [tuple(map(float, (*a, *b))) for a, b in zip(generated, real, strict=True)]
    first, second = np.cov(generated.T), np.cov(real.T)
    root = np.real(linalg.sqrtm(first @ second))
    gap = generated.mean(0) - real.mean(0)
    expected = gap @ gap + np.trace(first + second - 2 * root)
    assert estimate(readings, frechet, is_resampled=False).value == pytest.approx(expected, rel=1e-6)
    assert estimate([(*r[5:], *r[5:]) for r in readings], frechet).value == pytest.approx(0, abs=1e-9)


def test_every_metric_says_what_it_is_and_reads_back_from_json(faces: list[Clip]):
    for name, metric in registry.metrics().items():
        assert metric.name == name
        assert metric.about and metric.source, name
        assert metric.low < metric.high and metric.better in ("higher", "lower", "none"), name
        assert all(hasattr(faces[0], field) for field in metric.meter.clip), name
        assert name not in metric.beside, f"{name} is a stand-in and must not have the name of what it stands beside"
    reading = mouths.METER.open(Tools())(faces[0])["lip_sync_shuffled"]
    assert tuple(json.loads(json.dumps(reading))) == reading


def test_a_metric_that_lacks_something_is_left_out_or_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    weights = Weights("net", "the released net.pt")
    lacking = replace(registry.metrics()["mood"], name="Net", meter=replace(mood.METER, name="net", needs=(weights,)))
    with_net: dict[str, Metric] = {**registry.metrics(), "Net": lacking}
    monkeypatch.setattr(registry, "metrics", lambda: with_net)
    assert "Net" not in [metric.name for metric in registry.chosen([], Tools())]
    with pytest.raises(ConfigError, match=r"metrics=Net: needs weights.net=PATH, the released net.pt"):
        registry.chosen(["Net"], Tools())
    with pytest.raises(ConfigError, match="metrics=lip_sink: no such metric; did you mean lip_sync"):
        registry.chosen(["lip_sink"], Tools())
    assert [meter.name for meter in registry.meters(registry.chosen(["lip_sync", "lip_sync_lag"], Tools()))] == [
        "lip_sync"
    ]


def test_a_part_of_a_head_outside_the_frame_is_not_measured():
    frame = np.zeros((64, 64, 3), np.uint8)
    assert places.head_distance(frame, frame, (0.0, 2.0, 12.0, 11.0)) is None
