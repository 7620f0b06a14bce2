"""Which words are heard in generated speech, on the embedded corpus. Its judge knows few words: this is not WER."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torchmetrics.functional.text import word_error_rate

from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Estimator, Reading
from avlit.metrics.metric import Measure, Meter, Metric, Tool, Tools
from avlit.metrics.word_judge import RATE_HZ
from avlit.sound import resample


def _open(tools: Tools) -> Measure:
    assert tools.word_judge is not None
    judge = tools.word_judge()

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.own_sound is not None and clip.words is not None
        if clip.num_speakers != 1:  # what several say is no one's sentence
            return {}
        (said,) = judge([resample(clip.own_sound.waveform, clip.rate_hz, RATE_HZ)])
        return {"words": (said, clip.words), "words_shuffled": (said, clip.words)}

    return measure


def errors(said: str, transcript: str) -> float:
    """Words to insert, delete or replace."""
    return float(word_error_rate([said], [transcript])) * len(transcript.split())


def own_words(readings: Sequence[Reading]) -> Estimator:
    """1 - errors / words over clips together, at least 0."""
    said, asked = zip(*map(_texts, readings), strict=True)
    wrong = np.array([errors(a, b) for a, b in zip(said, asked, strict=True)])
    counts = np.array([len(text.split()) for text in asked])
    return lambda rows: max(0.0, 1 - float(wrong[rows].sum() / counts[rows].sum()))


def others_words(readings: Sequence[Reading]) -> Estimator:
    """The same against the transcripts of all other clips."""
    texts = [_texts(reading) for reading in readings]
    wrong = np.array([[errors(said, other) for _, other in texts] for said, _ in texts])  # [B, B]
    counts = np.tile([float(len(other.split())) for _, other in texts], (len(texts), 1))
    np.fill_diagonal(wrong, 0)
    np.fill_diagonal(counts, 0)

    def over(rows: np.ndarray) -> float:
        total = counts[np.ix_(rows, rows)].sum()
        return max(0.0, 1 - float(wrong[np.ix_(rows, rows)].sum() / total)) if total else math.nan

    return over


def _texts(reading: Reading) -> tuple[str, str]:
    assert isinstance(reading, tuple)
    said, asked = map(str, reading)
    return said, asked


JUDGE = Tool("word_judge", "the judge of the embedded corpus' voice; on real speech WER is measured")
METER = Meter("words", _open, ("own_sound", "words"), (JUDGE,))
SOURCE = "exact on the embedded corpus; a counterpart of 1 - WER, which it is not"

METRICS = (
    Metric(
        "words", "share of words that a judge of the corpus' voice hears", "higher", 0, 1, "", SOURCE, METER, ("WER",),
        summary=own_words,
    ),
    Metric(
        "words_shuffled", "the same against other clips' words: chance", "none", 0, 1, "", SOURCE, METER,
        summary=others_words,
    ),
)  # fmt: skip
