"""What the people of a clip say: their turns, the transcript, and other utterances of the same voice as references."""

from collections.abc import Collection
from itertools import groupby, pairwise

import numpy as np

from data.captions import Turn
from data.corpus.scenes import Scene
from data.corpus.settings import CorpusSettings
from data.corpus.voice import VOCABULARY, Timbre, Utterance, plan_utterance, synthesise

NUM_REFERENCES = 3
"""References of a clip: UniTalking takes at most three."""

REFERENCE_MARGIN_S = 0.03


def plan_speech(scene: Scene, rng: np.random.Generator) -> list[Utterance]:
    """What each person says; two persons take turns of a second or two, in random order."""
    end_s = scene.settings.duration_s
    margin_s = min(0.06, 0.1 * end_s)
    if len(scene.persons) < 2:
        start_s = margin_s + float(rng.uniform(0, 0.12 * end_s if end_s < 2 else 0.25))
        return [plan_utterance(rng, [(start_s, end_s - margin_s)]) for _ in scene.persons]
    turns: tuple[list, list] = ([], [])
    speaker = int(rng.integers(2))
    num_turns = max(2, round(end_s / 1.4))
    cuts = np.arange(num_turns + 1.0)
    cuts[1:-1] += rng.uniform(-0.15, 0.15, num_turns - 1)
    cuts *= end_s / num_turns
    gap_s = min(0.1, 0.05 * end_s)
    for start, end in pairwise(cuts):
        turns[speaker].append((start + gap_s / 2, end - gap_s))
        speaker = 1 - speaker
    return [plan_utterance(rng, turn) for turn in turns]


def main_speaker(utterances: list[Utterance]) -> int:
    """Who speaks longest."""
    return int(np.argmax([sum(word.end_s - word.start_s for word in said.words) for said in utterances]))


def transcript(utterances: list[Utterance]) -> str:
    """All words, person by person."""
    if len(utterances) < 2:
        return " ".join(said.text for said in utterances)
    return " ".join(f"Person{number}: {said.text}." for number, said in enumerate(utterances, 1))


def spoken_turns(scene: Scene, utterances: list[Utterance]) -> list[Turn]:
    """The turns in the order they are spoken, with who speaks and how that voice sounds."""
    spoken = sorted((word.start_s, person, word.word) for person, said in enumerate(utterances) for word in said.words)
    turns = []
    for number, words in groupby(spoken, key=lambda word: word[1]):
        person = scene.persons[number].person
        name = f"Person{number + 1}" if len(scene.persons) > 1 else ""
        turns.append(Turn(" ".join(word for _, _, word in words), name, person.look, person.voice))
    return turns


def plan_reference(taken: Collection[str], rng: np.random.Generator, settings: CorpusSettings) -> Utterance:
    """Something else to say: none of the taken words, at most `settings.reference_s` long, nearly from the start on.

    Where nearly the whole vocabulary is taken, it is the same words in another order.
    """
    others = [word for word in VOCABULARY if word not in taken]
    turn = (REFERENCE_MARGIN_S, settings.reference_s - REFERENCE_MARGIN_S)
    return plan_utterance(rng, [turn], others if len(others) > 3 else tuple(VOCABULARY))


def speak_reference(
    timbre: Timbre, utterances: list[Utterance], rng: np.random.Generator, settings: CorpusSettings
) -> np.ndarray:
    """A voice saying something that the clip does not: float32 [N'] in [-1, 1], cut where the last word ends."""
    taken = {word.word for said in utterances for word in said.words}
    said = plan_reference(taken, rng, settings)
    num_samples = round((said.words[-1].end_s + REFERENCE_MARGIN_S) * settings.rate_hz)
    return synthesise(said, timbre, rng, rate_hz=settings.rate_hz, num_samples=num_samples)
