"""Does a clip have the person, the voice and the depth that were asked for? On the embedded corpus, by its judges."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from math import inf

import torch

from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Estimator, Reading, among_others, mean
from avlit.metrics.metric import Measure, Meter, Metric, Tool, Tools
from avlit.metrics.timbre import pitch_hz


def _open_person(tools: Tools) -> Measure:
    assert tools.picture_judge is not None
    judge = tools.picture_judge()

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None and clip.person is not None
        seen = judge.person(torch.from_numpy(clip.frames[clip.num_given :]).permute(3, 0, 1, 2).float() / 127.5 - 1)
        asked = {name: clip.person[name] for name in seen}
        both = (json.dumps(seen, sort_keys=True), json.dumps(asked, sort_keys=True))
        return {"identity": both, "identity_shuffled": both}

    return measure


def agreement(seen: str, asked: str) -> float:
    """Share of the attributes asked for that are seen, of two JSON objects."""
    has, wants = json.loads(seen), json.loads(asked)
    return sum(has[name] == value for name, value in wants.items()) / len(wants)


def _own(readings: Sequence[Reading]) -> Estimator:
    return mean([agreement(*map(str, reading)) for reading in readings if isinstance(reading, tuple)])


def _others(clip: Reading, other: Reading) -> float:
    assert isinstance(clip, tuple) and isinstance(other, tuple)
    return agreement(str(clip[0]), str(other[1]))


def _open_depth(tools: Tools) -> Measure:
    assert tools.picture_judge is not None
    judge = tools.picture_judge()

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None and clip.depth is not None
        video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2).float() / 127.5 - 1
        return {"depth_error": judge.depth_error(video, torch.from_numpy(clip.depth))}

    return measure


def _open_pitch(tools: Tools) -> Measure:
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.own_sound is not None and clip.voice_hz is not None
        if clip.num_speakers != 1:
            return {}
        heard = pitch_hz(clip.own_sound.waveform, clip.rate_hz)
        if math.isnan(heard):
            return {"voiced": 0.0}
        both = (12 * math.log2(heard), 12 * math.log2(clip.voice_hz))
        return {"voiced": 1.0, "pitch_error": abs(both[0] - both[1]), "pitch_error_shuffled": both}

    return measure


def _others_pitch(clip: Reading, other: Reading) -> float:
    assert isinstance(clip, tuple) and isinstance(other, tuple)
    return abs(float(clip[0]) - float(other[1]))


JUDGE = Tool("picture_judge", "the judge of the embedded corpus' pictures")
PERSON = Meter("person", _open_person, ("frames", "person"), (JUDGE,))
DEPTH = Meter("depth", _open_depth, ("frames", "depth"), (JUDGE,))
PITCH = Meter("pitch", _open_pitch, ("own_sound", "voice_hz", "num_speakers"))
SOURCE = "exact on the embedded corpus"

METRICS = (
    Metric(
        "identity", "share of the asked person's attributes that a judge sees; a closed set, no face recogniser",
        "higher", 0, 1, "", SOURCE, PERSON, ("Subject DINO Similarity", "ID"), summary=_own,
    ),
    Metric(
        "identity_shuffled", "the same for the persons of other clips: chance", "none", 0, 1, "", SOURCE, PERSON,
        summary=among_others(_others),
    ),
    Metric(
        "depth_error", "mean absolute error of depth, as a judge sees it, against the depth given", "lower", 0, 1, "",
        SOURCE, DEPTH, ("Mean MAE",),
    ),
    Metric(
        "pitch_error", "distance of the voice's pitch from the asked voice's", "lower", 0, inf, "semitones", SOURCE,
        PITCH, ("SIM-o", "Speaker Similarity"),
    ),
    Metric(
        "pitch_error_shuffled", "the same to the voices of other clips: chance", "none", 0, inf, "semitones", SOURCE,
        PITCH, summary=among_others(_others_pitch),
    ),
    Metric("voiced", "share of clips in which a pitch is heard", "higher", 0, 1, "", SOURCE, PITCH),
)  # fmt: skip
