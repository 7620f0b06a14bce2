"""Pitch of voices: what is heard is what was spoken, and it moves when voices are shifted, swapped or destroyed."""

import math

import numpy as np
import pytest

from avlit.metrics.timbre import pitch_contour, pitch_following, pitch_hz
from data.corpus import CorpusSettings, make_clip

RATE_HZ = 16000


def spoken(numbers: range) -> tuple[list[np.ndarray], list[float]]:
    """Voices of the corpus, and the pitch that each was given."""
    settings = CorpusSettings(num_frames=9)
    clips = [make_clip("basic_face", n, settings, has_frames=False, has_references=False) for n in numbers]
    return [clip.speech for clip in clips], [clip.truth["timbre"][0]["f0_hz"] for clip in clips]  # pyright: ignore


@pytest.mark.parametrize("hertz", [72.0, 110.0, 187.5, 305.0])
@pytest.mark.parametrize("tilt", [-2.0, 0.0, 1.0])
def test_pitch_is_that_of_the_harmonics_whatever_their_strengths(hertz: float, tilt: float):
    time = np.arange(RATE_HZ // 2) / RATE_HZ
    tones = [k**tilt * np.cos(2 * np.pi * k * hertz * time + k) for k in range(1, 9)]
    assert pitch_hz(np.sum(tones, axis=0) / 100, RATE_HZ) == pytest.approx(hertz, rel=0.005)


def test_noise_and_silence_have_no_pitch_and_pauses_do_not_count():
    noise = np.random.default_rng(0).normal(0, 0.1, RATE_HZ)
    assert np.isfinite(pitch_contour(noise, RATE_HZ)).mean() < 0.05
    assert math.isnan(pitch_hz(np.zeros(RATE_HZ), RATE_HZ))
    assert len(pitch_contour(noise[:400], RATE_HZ)) == 0 and math.isnan(pitch_hz(noise[:400], RATE_HZ))
    time = np.arange(RATE_HZ) / RATE_HZ
    voice = np.where(time < 0.5, np.cos(2 * np.pi * 120 * time), 0) + 1e-3 * np.cos(2 * np.pi * 230 * time)
    assert pitch_hz(voice, RATE_HZ) == pytest.approx(120, rel=0.01)


def test_voices_follow_their_own_speakers_and_nobody_once_swapped_shifted_or_destroyed():
    voices, asked = spoken(range(16))
    found = np.array([pitch_hz(voice, RATE_HZ) for voice in voices])
    own = pitch_following(found, asked)
    assert own.error < 1.5 and own.error_shuffled > 4 and own.correlation > 0.95 and own.voiced == 1
    swapped = pitch_following(np.roll(found, 5), asked)
    assert swapped.error > 4 and abs(swapped.correlation) < 0.6
    slow = pitch_following([pitch_hz(voice, RATE_HZ * 13 // 16) for voice in voices], asked)  # 3.6 semitones lower
    assert slow.error == pytest.approx(3.6, abs=0.7) and slow.correlation > 0.95
    rng = np.random.default_rng(0)
    destroyed = pitch_following([pitch_hz(rng.permutation(voice), RATE_HZ) for voice in voices], asked)
    assert destroyed.voiced < 0.5


def test_clips_without_a_pitch_are_counted_and_left_out():
    following = pitch_following([100.0, math.nan, 200.0, 200.0], [100.0, 150.0, 200.0, 400.0])
    assert following.voiced == 0.75 and following.error == pytest.approx(4)
    assert following.error_shuffled == pytest.approx((12 + 24 + 12 + 12 + 12 + 0) / 6)
    nobody = pitch_following([math.nan, 100.0], [100.0, 100.0])
    assert nobody.voiced == 0.5 and math.isnan(nobody.error) and math.isnan(nobody.correlation)
    assert pitch_following([100.0, 100.0], [100.0, 200.0]).correlation == 0


def test_references_without_a_pitch_and_wrong_numbers_are_errors():
    with pytest.raises(ValueError, match="a reference voice has no pitch"):
        pitch_following([100.0, 100.0], [100.0, math.nan])
    with pytest.raises(ValueError, match="1 voices and 2 references"):
        pitch_following([100.0], [100.0, 100.0])
