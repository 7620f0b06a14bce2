"""Lip sync, clip by clip: the mouth's opening against the speech, on the embedded corpus, where mouths are dark."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading, among_others
from avlit.metrics.lip_sync import mouth_aperture, speech_envelope, sync_correlation
from avlit.metrics.metric import Measure, Meter, Metric, Tools

FURTHEST = 6
"""Most frames of lag that are tried, and at most a quarter of the clip's."""


def best_lag(aperture: np.ndarray, envelope: np.ndarray, *, furthest: int) -> tuple[int, float]:
    """Frames by which a mouth [F] is late (negative: early) where it correlates best with speech [F], and how much.

    Of equal correlations the smallest lag; (0, 0.0) where either does not move.
    """
    found = []
    for lag in sorted(range(-furthest, furthest + 1), key=abs):
        mouth, speech = aperture[max(0, lag) :], envelope[max(0, -lag) :]
        length = min(len(mouth), len(speech))
        found.append((lag, sync_correlation(mouth[:length], speech[:length])))
    return max(found, key=lambda pair: pair[1]) if any(value for _, value in found) else (0, 0.0)


def curves(clip: Clip) -> tuple[np.ndarray, np.ndarray] | None:
    """Opening of each speaking person's mouth and loudness of their speech, [P, F] each, without given frames.

    None where nobody speaks, or where generated speech could be that of several.
    """
    assert clip.frames is not None and clip.mouth_boxes is not None and clip.sound is not None
    if not clip.num_speakers or (clip.has_own_sound and clip.num_speakers > 1):
        return None
    if clip.has_own_sound:
        speech = [speech_envelope(clip.sound.waveform, num_frames=len(clip.frames))]
    elif clip.speech_envelopes is not None:
        speech = list(clip.speech_envelopes)
    else:
        return None
    video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1  # [1, 3, F, H, W]
    boxes = torch.tensor(clip.mouth_boxes, dtype=torch.float32)  # [F, P, 4]
    mouths = [mouth_aperture(video, boxes[None, :, person])[0].numpy() for person in range(len(speech))]
    first = clip.num_given
    return np.stack(mouths)[:, first:], np.stack(speech)[:, first:]


def _open(tools: Tools) -> Measure:
    def measure(clip: Clip) -> Mapping[str, Reading]:
        both = curves(clip)
        if both is None:
            return {}
        mouths, speech = both
        furthest = min(FURTHEST, mouths.shape[1] // 4)
        pairs = list(zip(mouths, speech, strict=True))
        lags = [best_lag(mouth, loudness, furthest=furthest)[0] for mouth, loudness in pairs]
        return {
            "lip_sync": float(np.mean([sync_correlation(mouth, loudness) for mouth, loudness in pairs])),
            "lip_sync_lag": float(np.mean(lags)),
            "lip_sync_shuffled": (float(len(mouths)), *map(float, np.concatenate((mouths, speech)).ravel())),
        }

    return measure


def _with_others_speech(clip: Reading, other: Reading) -> float:
    """Mean correlation of one clip's mouths with another clip's speech, over the frames that both have."""
    mouths, speech = _unpacked(clip)[0], _unpacked(other)[1]
    length = min(mouths.shape[1], speech.shape[1])
    return float(np.mean([sync_correlation(a[:length], b[:length]) for a in mouths for b in speech]))


def _unpacked(reading: Reading) -> np.ndarray:
    """Mouths and speech, [2, P, F]."""
    assert isinstance(reading, tuple)
    return np.array(reading[1:], float).reshape(2, int(float(reading[0])), -1)


METER = Meter("lip_sync", _open, ("frames", "sound", "mouth_boxes", "num_speakers"))
SOURCE = "exact on the embedded corpus; a counterpart of SyncNet's confidence, which it is not"
BESIDE = ("Sync-C", "LSE-C")

METRICS = (
    Metric(
        "lip_sync", "correlation of the mouth's opening with the speech", "higher", -1, 1, "", SOURCE, METER, BESIDE
    ),
    Metric(
        "lip_sync_shuffled", "the same with other clips' speech: chance", "none", -1, 1, "", SOURCE, METER,
        summary=among_others(_with_others_speech),
    ),
    Metric(
        "lip_sync_lag", "by how much mouths are late where they correlate best", "none", -FURTHEST, FURTHEST, "frames",
        SOURCE, METER,
    ),
)  # fmt: skip
