"""MTV's text template, written once: the corpus and `just prepare` both caption their clips with it."""

from collections.abc import Sequence

NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


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


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…")) else text + "."
