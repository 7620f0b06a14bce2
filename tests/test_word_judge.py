"""The judge of words: it writes down what the corpus says, counts only what lasts, and is fooled by no one else's."""

import numpy as np
import pytest
import torch

from avlit.commands.corpus_judge import FIRST, NUM_CLIPS, corpus_speech, spoken_words
from avlit.metrics.word_judge import RATE_HZ, Listener, SpokenWord, WordJudge, frame_labels, hear, word_accuracy
from data.corpus import CorpusSettings
from data.corpus.voice import VOCABULARY


def test_a_judge_of_two_words_tells_them_apart_and_hears_none_in_noise():
    """Words are tones here: 400 ms each, in a second of silence."""
    times = torch.arange(RATE_HZ) / RATE_HZ
    draw = np.random.default_rng(0)
    waveforms, spoken, transcripts = [], [], []
    for _ in range(64):
        first, start = int(draw.integers(2)), float(draw.uniform(0, 0.1))
        words = [SpokenWord("ab"[first], start, start + 0.4), SpokenWord("ab"[1 - first], start + 0.45, start + 0.85)]
        sound = torch.zeros(RATE_HZ)
        for word in words:
            tone = torch.sin(2 * torch.pi * (500 if word.word == "a" else 2000) * times)
            sound += tone * ((times >= word.start_s) & (times < word.end_s))
        waveforms.append(0.5 * sound)
        spoken.append(words)
        transcripts.append(" ".join(word.word for word in words))
    judge = WordJudge.train(torch.stack(waveforms[:48]), spoken[:48], vocabulary=("a", "b"), epochs=12)
    own, shuffled = judge.score([each.numpy() for each in waveforms[48:]], transcripts[48:])
    assert own > 0.95
    assert shuffled < 0.7  # half of the others are said in the other order
    again = WordJudge.train(torch.stack(waveforms[:48]), spoken[:48], vocabulary=("a", "b"), epochs=12)
    assert all(torch.equal(a, b) for a, b in zip(judge.listener.parameters(), again.listener.parameters(), strict=True))


def test_only_runs_of_a_word_that_last_count_and_each_once():
    judge = WordJudge(Listener(3), ("a", "b"))
    assert judge.transcribe([0] * 5 + [1] * 8 + [2] * 7 + [1] * 9 + [0] * 3 + [2] * 20) == "a b"


def test_labels_are_the_words_at_their_times():
    labels = frame_labels([SpokenWord("b", 0.02, 0.05), SpokenWord("a", 0.05, 0.06)], 8, vocabulary=("a", "b"))
    assert labels.tolist() == [0, 0, 2, 2, 2, 1, 0, 0]


def test_the_corpus_says_its_words_when_it_says_so():
    (clip,) = corpus_speech([FIRST + NUM_CLIPS], CorpusSettings())
    words = spoken_words(clip)
    assert " ".join(word.word for word in words) == clip.transcript
    assert {word.word for word in words} <= set(VOCABULARY)
    labels = frame_labels(words, hear(torch.from_numpy(clip.speech)[None]).shape[2], vocabulary=tuple(VOCABULARY))
    loud = hear(torch.from_numpy(clip.speech)[None])[0].amax(0)  # [M]
    assert loud[labels > 0].mean() > loud[labels == 0].mean() + 0.3


@pytest.mark.parametrize(("said", "accuracy"), [("one two", 1.0), ("one", 0.5), ("one two three four five", 0.0)])
def test_word_accuracy_is_the_share_of_words_without_an_edit(said, accuracy):
    assert word_accuracy([said], ["one two"]) == accuracy
