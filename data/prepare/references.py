"""Gives samples up to three other sounds of their speaker, while they pass on their way to the shards."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from data.prepare.report import FileReport
from data.sample import MAX_REFERENCES, EncodedSample

MOST_BYTES, MOST_SAMPLES = 1 << 28, 512
"""What is held back of one speaker and split before the first half of it goes on."""

ROUNDING_S = 1e-6
"""Far less than a sample of sound: two windows that follow each other may seem to overlap by so much."""


@dataclass(frozen=True)
class Utterance:
    """A sample before it is written, and what it was made from.

    start_s, end_s: its place in `file`. num_latents: how many of its audio latents are sound, the rest is silence that
    was added. is_one_voice: one person is heard speaking; else it has no references, as other sounds of its file may be
    another's voice, or none. borrowed_until_s: where in its file the references end that it has been given already.
    """

    sample: EncodedSample
    split: str
    file: FileReport
    start_s: float
    end_s: float
    num_latents: int = 0
    is_one_voice: bool = True
    borrowed_until_s: float = 0.0

    def is_apart(self, other: "Utterance") -> bool:
        """Whether no moment of a file is in both."""
        return (
            self.file is not other.file or min(self.end_s, other.end_s) - max(self.start_s, other.start_s) < ROUNDING_S
        )


class ReferencePool:
    """Holds back the samples of one speaker, so that each is given others: of its split, and apart from it in time.

    Which ones is decided by the samples' keys alone, so it is the same again, and another choice for each sample; those
    that say the same words come last. reference_tokens: most latents of a reference; 0 gives none and holds nothing.
    """

    def __init__(self, *, reference_tokens: int) -> None:
        self._tokens = reference_tokens
        self._held: dict[str, list[Utterance]] = {}

    def add(self, utterance: Utterance) -> Iterator[Utterance]:
        """Takes a sample of the speaker; gives those whose references are settled."""
        if not self._tokens or not utterance.is_one_voice:
            yield utterance
            return
        held = self._held.setdefault(utterance.split, [])
        held.append(utterance)
        if len(held) >= MOST_SAMPLES or len(held) * _size(utterance.sample) >= MOST_BYTES:
            half = -(-len(held) // 2)
            self._held[utterance.split] = held[half:]
            yield from self._referred(held[:half], held)

    def flush(self) -> Iterator[Utterance]:
        """Gives what is left; the next samples are of another speaker."""
        held, self._held = self._held, {}
        for utterances in held.values():
            yield from self._referred(utterances, utterances)

    def _referred(self, utterances: list[Utterance], others: list[Utterance]) -> Iterator[Utterance]:
        for utterance in utterances:
            fitting = [other for other in others if other is not utterance and other.is_apart(utterance)]
            chosen = sorted(fitting, key=lambda other: _rank(utterance.sample, other.sample))[:MAX_REFERENCES]
            yield replace(
                utterance, sample=replace(utterance.sample, references=tuple(self._latents(other) for other in chosen))
            )

    def _latents(self, utterance: Utterance) -> np.ndarray:
        latents = utterance.sample.audio_latents
        assert latents is not None
        return latents[: min(self._tokens, utterance.num_latents)]  # [R, C]


def _rank(sample: EncodedSample, other: EncodedSample) -> tuple[bool, bytes]:
    words = other.annotation.transcript.lower()
    says_the_same = bool(words) and words == sample.annotation.transcript.lower()
    return says_the_same, hashlib.blake2b(f"{sample.key} {other.key}".encode(), digest_size=8).digest()


def _size(sample: EncodedSample) -> int:
    waveform = 0 if sample.waveform is None else sample.waveform.nbytes
    return waveform + sum(array.nbytes for array in sample.arrays.values())
