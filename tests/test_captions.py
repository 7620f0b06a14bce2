"""The words for a clip: templates give the papers' structure, the audio caption leads, and gaps are refused."""

import pytest

from data.captions import (
    Turn,
    audio_caption,
    fused_caption,
    joint_caption,
    mtv_caption,
    split_visual_speech,
    visual_speech_caption,
)

HE = Turn("good  morning", "Person1", "a man in red", "low male")
SHE = Turn("hello moon", "Person2", "a woman", "")


def test_mtv_caption_gives_the_papers_structure() -> None:
    two = mtv_caption(["A man in red", "a woman."], "Person2", "They argue", 2)
    assert two == (
        "Two person conversation. Persons: Person1: A man in red. Person2: a woman. Person2 is speaking. "
        "Scene Description: They argue."
    )
    assert mtv_caption(["A dog"], None, " A dog  barks. ", 0) == "No conversation. Scene Description: A dog barks."
    assert mtv_caption(["A", "B"], None, "Both talk!", 2).endswith("Person2: B. Scene Description: Both talk!")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["A man"], "Person1", "  ", 1), "scene=''"),
        (([" "], "Person1", "A room", 1), "appearance of Person1"),
        ((["A man"], "Person2", "A room", 1), "speaking='Person2'.*Person1"),
        (([], "Person1", "A room", 0), "num_speakers=0"),
        (([], None, "A room", -1), "num_speakers=-1"),
    ],
)
def test_mtv_caption_refuses_what_the_template_cannot_say(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mtv_caption(*arguments)


def test_audio_caption_says_the_words_first_then_the_voice_then_the_rest() -> None:
    assert audio_caption([Turn("hello moon", voice="low male")]) == "Speech: hello moon. Voice: low male."
    assert audio_caption([Turn("Is it you?")]) == "Speech: Is it you?"
    assert audio_caption([SHE, HE], sound="a ball bounces") == (
        "Person2 says: hello moon. Person1 says: good morning. Voices: Person1 low male. Sound: a ball bounces."
    )
    assert audio_caption([HE]) == "Person1 says: good morning. Voices: Person1 low male."
    assert audio_caption([HE, SHE, HE]).count("low male") == 1
    assert audio_caption([], music="slow, in a minor key") == "No speech. Music: slow, in a minor key."
    assert audio_caption([]) == "No speech."


def test_joint_caption_puts_what_is_heard_before_what_is_seen() -> None:
    assert joint_caption("Speech: hi", " A dog. ") == "Speech: hi. A dog."
    assert joint_caption("No speech.", "A dog") == "No speech. A dog."


def test_fused_caption_is_one_sentence() -> None:
    assert fused_caption([HE, SHE], happening="a ball bounces", place="in a room") == (
        'A man in red says "good morning" in a low male voice and a woman says "hello moon" '
        "while a ball bounces in a room."
    )
    assert fused_caption([SHE]) == 'A woman says "hello moon".'
    assert fused_caption([], happening="slow music plays", place="under a sky") == "Slow music plays under a sky."


def test_captions_refuse_what_they_cannot_say() -> None:
    with pytest.raises(ValueError, match="words=''"):
        audio_caption([Turn("  ")])
    with pytest.raises(ValueError, match=r"person=''.*Person1"):
        audio_caption([HE, Turn("hello")])
    with pytest.raises(ValueError, match="words=''"):
        fused_caption([Turn("", look="a man")])
    with pytest.raises(ValueError, match=r"look=''.*'hello'"):
        fused_caption([Turn("hello")])
    with pytest.raises(ValueError, match="happening=''"):
        fused_caption([], place="in a room")
    for audio, video in ((" ", "A dog."), ("No speech.", "")):
        with pytest.raises(ValueError, match="joint caption"):
            joint_caption(audio, video)


def test_visual_speech_caption_is_split_into_what_it_was_made_of() -> None:
    prompt = visual_speech_caption(" A man\n waves.", "good  morning")
    assert prompt == "[VISUAL]: A man waves. [SPEECH]: good morning"
    assert split_visual_speech(prompt) == split_visual_speech(f" {prompt}\n") == ("A man waves.", "good morning")
    assert split_visual_speech(visual_speech_caption("Rain.", "")) == ("Rain.", "No speech.")


@pytest.mark.parametrize(
    "prompt",
    [
        "", "A man waves.", "[VISUAL]: A man waves.", "[SPEECH]: hello", "[VISUAL]: [SPEECH]: hello",
        "[VISUAL]: A man waves. [SPEECH]: ", "[SPEECH]: hello [VISUAL]: A man", "VISUAL: a man SPEECH: hello",
        "Now [VISUAL]: A man. [SPEECH]: hello", "[VISUAL]: A [VISUAL]: man. [SPEECH]: hello",
        "[VISUAL]: A man. [SPEECH]: hello [SPEECH]: there",
    ],
)  # fmt: skip
def test_prompts_of_another_form_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"must be of the form `\[VISUAL\]: what is seen \[SPEECH\]: the words"):
        split_visual_speech(prompt)


def test_visual_speech_caption_refuses_what_could_not_be_split_again() -> None:
    with pytest.raises(ValueError, match="visual=' '"):
        visual_speech_caption(" ", "hello")
    with pytest.raises(ValueError, match=r"speech='\[VISUAL\]: x'"):
        visual_speech_caption("A man", "[VISUAL]: x")
