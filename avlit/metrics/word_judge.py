"""Writes down the words of a sound, by a small network that is trained on a corpus whose words are known exactly.

No recogniser of real speech: it knows a closed vocabulary, and its word accuracy is never called WER.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import word_error_rate

from avlit.codecs.embedded_audio import EmbeddedAudioCodec, mel_filters, power_spectrum

RATE_HZ, FFT_SIZE, HOP, NUM_MELS = EmbeddedAudioCodec.rate_hz, 512, 160, 40
"""What the judge hears: 40 log-mel bands up to 8 kHz, 100 a second."""

FLOOR = 1e-5
"""Power below a clip's loudest band that counts as silence (50 dB), so that the judge does not know a clip's level."""

SHORTEST_RUN = 8
"""Frames of 10 ms that a word lasts at least; the shortest of the embedded corpus lasts 270 ms."""


@dataclass(frozen=True)
class SpokenWord:
    """A word and when it is said."""

    word: str
    start_s: float
    end_s: float


def hear(waveforms: Tensor) -> Tensor:
    """[B, N] at 16 kHz -> log-mel [B, 40, M], M = N // 160 + 1: 0 at a clip's loudest band, -1 in its silence."""
    filters = mel_filters(num_mels=NUM_MELS, fft_size=FFT_SIZE, rate_hz=RATE_HZ)
    power = power_spectrum(waveforms, fft_size=FFT_SIZE, hop=HOP) @ filters  # [B, M, 40]
    power = power / power.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return -(power + FLOOR).log10().transpose(1, 2) / math.log10(FLOOR)


class Listener(nn.Sequential):
    """Log-mel [B, 40, M] -> logits [B, classes, M]: dilated convolutions that overlook 1.3 s, longer than any word."""

    def __init__(self, num_classes: int) -> None:
        layers: list[nn.Module] = []
        channels = NUM_MELS
        for dilation in (1, 2, 4, 8, 16):
            conv = nn.Conv1d(channels, 96, 5, padding=2 * dilation, dilation=dilation)
            layers += [conv, nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.1)]
            channels = 96
        super().__init__(*layers, nn.Conv1d(channels, num_classes, 1))


def vary(heard: Tensor, generator: torch.Generator) -> Tensor:
    """Log-mel [B, 40, M] as imperfect speech might have it: tilted, noisy, with a band missing."""
    slope = torch.linspace(-1, 1, NUM_MELS)[None, :, None]
    tilt = 0.05 * torch.randn(len(heard), 1, 1, generator=generator) * slope
    heard = (heard + tilt + 0.05 * torch.randn(heard.shape, generator=generator)).clamp_min(-1.0)
    first = torch.randint(0, NUM_MELS, (len(heard), 1), generator=generator)
    width = torch.randint(0, 6, (len(heard), 1), generator=generator)
    band = torch.arange(NUM_MELS)[None]
    return heard.masked_fill(((band >= first) & (band < first + width))[..., None], -1.0)


def frame_labels(spoken: Sequence[SpokenWord], num_frames: int, *, vocabulary: Sequence[str]) -> Tensor:
    """The class of each 10 ms of a clip [M], int64: 1 + the word's place in `vocabulary`, or 0 between words."""
    labels = torch.zeros(num_frames, dtype=torch.int64)
    times = torch.arange(num_frames) * HOP / RATE_HZ
    for word in spoken:
        labels[(times >= word.start_s) & (times < word.end_s)] = 1 + vocabulary.index(word.word)
    return labels


@dataclass(frozen=True)
class WordJudge:
    """Writes down the words of a sound. vocabulary: what can be said; class 0 of the listener is everything else."""

    listener: Listener
    vocabulary: tuple[str, ...]

    @classmethod
    def train(
        cls,
        waveforms: Tensor,
        spoken: Sequence[Sequence[SpokenWord]],
        *,
        vocabulary: Sequence[str],
        seed: int = 0,
        epochs: int = 6,
    ) -> "WordJudge":
        """A judge of sounds like these, [B, N] at 16 kHz in [-1, 1], in which the `spoken` words are said."""
        heard = hear(waveforms)  # [B, 40, M]
        labels = torch.stack([frame_labels(words, heard.shape[2], vocabulary=vocabulary) for words in spoken])  # [B, M]
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            listener = Listener(1 + len(vocabulary))
            optimizer = torch.optim.AdamW(listener.parameters(), 2e-3, weight_decay=0.05)
            steps = epochs * -(-len(labels) // 32)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
            for _ in range(epochs):
                for rows in torch.randperm(len(labels), generator=generator).split(32):
                    logits = listener(vary(heard[rows], generator))
                    loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        return cls(listener.eval(), tuple(vocabulary))

    @torch.no_grad()
    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """Sounds float32 [N] in [-1, 1] at 16 kHz -> the words of each, in order."""
        counts = [len(waveform) // HOP + 1 for waveform in waveforms]
        padded = pad_sequence([torch.from_numpy(waveform) for waveform in waveforms], batch_first=True)
        found = self.listener(hear(padded)).argmax(1).tolist()  # [B, M]
        return [self.transcribe(classes[:count]) for classes, count in zip(found, counts, strict=True)]

    def score(self, waveforms: Sequence[np.ndarray], transcripts: Sequence[str]) -> tuple[float, float]:
        """Word accuracy of sounds against their own transcripts, and against those of all others (two or more)."""
        said, count = self(waveforms), len(transcripts)
        others = [word_accuracy(said, [*transcripts[k:], *transcripts[:k]]) for k in range(1, count)]
        return word_accuracy(said, transcripts), mean(others)

    def transcribe(self, classes: Sequence[int]) -> str:
        """Classes of frames -> words: runs of a word that last long enough, each once (none is said twice in a row)."""
        runs = [(label, len(list(frames))) for label, frames in groupby(classes)]
        kept = [label for label, length in runs if label and length >= SHORTEST_RUN]
        return " ".join(self.vocabulary[label - 1] for label, _ in groupby(kept))


def word_accuracy(said: Sequence[str], transcripts: Sequence[str]) -> float:
    """1 - edit distance / number of words, over all clips together, at least 0."""
    return max(0.0, 1 - float(word_error_rate(list(said), list(transcripts))))
