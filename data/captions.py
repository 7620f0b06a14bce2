"""The words for a clip, written once: the corpus and `just prepare` caption their clips with these templates."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")

STYLES: Mapping[str, str] = MappingProxyType({
    "structured": "MTV's template: the persons, who speaks, the scene (MTV, Section 4.2)",
    "detailed": "the audio caption, then a detailed video caption (UniTalking, Section 3.1, a)",
    "short": "the audio caption, then a short video caption (UniTalking, Section 3.1, b)",
    "fused": "one sentence of what is seen and heard together (UniTalking, Section 3.1, c)",
    "speech": "the audio caption alone, the words that are said first (UniTalking, stage 1; JoVA's audio branch)",
    "video": "the video caption alone (JoVA's video branch)",
    "visual_speech": "what is seen and the words that are said, `[VISUAL]: … [SPEECH]: …` (MMControl, Section 3.1)",
})  # fmt: skip
"""The caption styles and what each says; a clip has any of them."""

PROMPT = "visual_speech"
"""The style that has a form of its own, so that what is said can be told from what is seen."""


NO_SPEECH = "No speech."
"""What a caption says where nobody speaks."""

_VISUAL_SPEECH = re.compile(r"\s*\[VISUAL\]:\s*(?P<visual>\S.*?)\s*\[SPEECH\]:\s*(?P<speech>\S.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """What one person says in one go: the words verbatim, who says them and in which voice, where that is known.

    person: the identifier ("Person1"), needed where several people speak. look: a noun phrase ("a man in red").
    voice: adjectives that go before "voice" ("low male").
    """

    words: str
    person: str = ""
    look: str = ""
    voice: str = ""


def audio_caption(turns: Sequence[Turn], *, sound: str = "", music: str = "") -> str:
    """What is heard: the words first and verbatim, then the voices, then other sounds: `Speech: hi. Voice: low male.`

    turns: in the order they are spoken; none: "No speech." sound: a clause ("a ball bounces"). music: its kind.
    The words lead because text encoders cut at the end, and so that they stand at the same places with and without
    a video caption behind: what is learnt about them from speech alone carries over.
    Raises ValueError for a turn without words, or one of several without its person.
    """
    if not turns:
        parts = [NO_SPEECH]
    elif len(turns) == 1 and not turns[0].person:
        parts = [f"Speech: {_sentence(_words(turns[0]))}"]
        if turns[0].voice:
            parts.append(f"Voice: {_sentence(turns[0].voice)}")
    else:
        if any(not turn.person for turn in turns):
            raise ValueError("person='': with several turns each names who speaks, Person1, Person2 and so on")
        parts = [f"{turn.person} says: {_sentence(_words(turn))}" for turn in turns]
        voices = {turn.person: turn.voice for turn in turns if turn.voice}
        if voices:
            parts.append(f"Voices: {', '.join(f'{person} {voice}' for person, voice in voices.items())}.")
    parts += [f"{name}: {_sentence(clause)}" for name, clause in (("Sound", sound), ("Music", music)) if clause]
    return " ".join(parts)


def joint_caption(audio: str, video: str) -> str:
    """An audio caption and a video caption, detailed or short, as one text; the audio leads (see audio_caption).

    Raises ValueError where either is empty.
    """
    for name, caption in (("audio", audio), ("video", video)):
        if not caption.strip():
            raise ValueError(f"{name}={caption!r}: a joint caption has words for what is heard and for what is seen")
    return f"{_sentence(audio.strip())} {_sentence(video.strip())}"


def visual_speech_caption(visual: str, speech: str) -> str:
    """A video caption and the words that are said, none for nobody speaking, as one prompt (MMControl, Section 3.1).

    Raises ValueError where nothing is said of what is seen, or where either holds a mark of the format.
    """
    words = {"visual": " ".join(visual.split()), "speech": " ".join(speech.split())}
    if not words["visual"]:
        raise ValueError(f"visual={visual!r}: a prompt says what is seen")
    for name, text in words.items():
        if mark := next((mark for mark in ("[VISUAL]:", "[SPEECH]:") if mark in text), None):
            raise ValueError(f"{name}={text!r}: holds {mark}, which the prompt itself puts before its parts")
    return f"[VISUAL]: {words['visual']} [SPEECH]: {words['speech'] or NO_SPEECH}"


def split_visual_speech(prompt: str) -> tuple[str, str]:
    """`[VISUAL]: A room. [SPEECH]: hello` -> ("A room.", "hello"); ValueError for a prompt of another form."""
    found = _VISUAL_SPEECH.fullmatch(prompt)
    if found is None or len(re.findall(r"\[(?:VISUAL|SPEECH)\]:", prompt)) > 2:
        raise ValueError(
            f"{prompt!r}: must be of the form `[VISUAL]: what is seen [SPEECH]: the words that are said`, with "
            f"{NO_SPEECH!r} where nobody speaks"
        )
    return found["visual"], found["speech"]


def fused_caption(turns: Sequence[Turn], *, happening: str = "", place: str = "") -> str:
    """What is seen and heard as one sentence: `A man in red says "hi" in a low male voice while a ball bounces …`

    turns: in the order they are spoken, each with its look. happening: a clause ("a ball bounces").
    place: where, with its preposition ("in a grey room").
    Raises ValueError where there is neither turn nor happening, or for a turn without words or look.
    """
    if not turns and not happening:
        raise ValueError("happening='': nobody speaks, so the sentence needs a clause that says what happens")
    spoken = []
    for turn in turns:
        if not turn.look:
            raise ValueError(f"look='' of the turn {turn.words!r}: say in a few words who is seen speaking")
        voice = f" in a {turn.voice} voice" if turn.voice else ""
        spoken.append(f'{turn.look} says "{_words(turn)}"{voice}')
    clauses = [clause for clause in (" and ".join(spoken), happening) if clause]
    sentence = f"{' while '.join(clauses)} {place}".strip()
    return _sentence(sentence[0].upper() + sentence[1:])


def mtv_caption(appearances: Sequence[str], speaking: str | None, scene: str, num_speakers: int) -> str:
    """The caption of a clip in MTV's structure (MTV, Section 4.2, "Text structure"; Figure 2 e).

    appearances: one noun phrase a person, in the order Person1, Person2, ...; may be fewer or more than the speakers.
    speaking: the identifier of who speaks ("Person1"), or None where nobody is singled out.
    num_speakers: people whose speech is heard; with 0 only the scene is described, as the paper says.
    Raises ValueError for an empty scene or appearance, a speaker nobody described, or a speaker among 0 speakers.
    """
    scene = " ".join(scene.split())
    if not scene:
        raise ValueError("scene='': the template ends with a scene description; give one sentence about the whole clip")
    if num_speakers < 0:
        raise ValueError(f"num_speakers={num_speakers}: give the number of people heard speaking, 0 or more")
    if num_speakers == 0:
        if speaking is not None:
            raise ValueError(f"speaking={speaking!r} with num_speakers=0: name no speaker, or count the one who speaks")
        return f"No conversation. Scene Description: {_sentence(scene)}"
    count = NUMBERS[num_speakers] if num_speakers < len(NUMBERS) else str(num_speakers)
    parts = [f"{count} person conversation."]
    names = [f"Person{number}" for number in range(1, len(appearances) + 1)]
    if appearances:
        parts.append("Persons:")
    for name, appearance in zip(names, appearances, strict=True):
        phrase = " ".join(appearance.split())
        if not phrase:
            raise ValueError(f"appearance of {name} is empty: describe the person in a few words")
        parts.append(f"{name}: {_sentence(phrase)}")
    if speaking is not None:
        if names and speaking not in names:
            raise ValueError(f"speaking={speaking!r}: not one of the described persons {', '.join(names)}")
        parts.append(f"{speaking} is speaking.")
    parts.append(f"Scene Description: {_sentence(scene)}")
    return " ".join(parts)


def _words(turn: Turn) -> str:
    words = " ".join(turn.words.split())
    if not words:
        raise ValueError("words='': a turn holds the words that are spoken; leave out a turn without any")
    return words


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…")) else text + "."
