"""The judge of words of the embedded corpus: trained on clips that no model trains on and none is sampled for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from avlit.codecs.embedded_audio import EmbeddedAudioCodec
from avlit.metrics.word_judge import SpokenWord, WordJudge
from data.clip import RawClip
from data.corpus import CorpusSettings, make_clip
from data.corpus.voice import VOCABULARY

FIRST, NUM_CLIPS = 500_000, 320
"""Clips that train the judge; those after them are heard by nobody."""


def corpus_judge(*, seed: int = 0, epochs: int = 6) -> WordJudge:
    """A judge of clips with one speaker, as they are and as the embedded codec gives them back."""
    clips = corpus_speech(range(FIRST, FIRST + NUM_CLIPS), CorpusSettings())
    raw = torch.from_numpy(np.stack([clip.speech for clip in clips]))  # [B, N]
    codec = EmbeddedAudioCodec()
    decoded = torch.cat([codec.decode(codec.encode(part))[:, : raw.shape[1]] for part in raw.split(64)])
    words = [spoken_words(clip) for clip in clips]
    return WordJudge.train(
        torch.cat([raw, decoded]), [*words, *words], vocabulary=tuple(VOCABULARY), seed=seed, epochs=epochs
    )


def corpus_speech(numbers: Sequence[int], settings: CorpusSettings) -> list[RawClip]:
    """Clips of the corpus with one speaker, without picture."""
    return [make_clip("basic_face", n, settings, has_frames=False, has_references=False) for n in numbers]


def spoken_words(clip: RawClip) -> list[SpokenWord]:
    """What is said in a clip of the corpus, and when."""
    words = clip.truth["words"]
    assert isinstance(words, list)
    return [SpokenWord(word["word"], word["start_s"], word["end_s"]) for word in words]
