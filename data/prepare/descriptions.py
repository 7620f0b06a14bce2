"""What a record says about a clip: its captions, subsets, words and voices.

A record's fields: `file` (in a JSONL file), `subset` (a name or a list), and either `caption`, used as it is, or
`scene`, `persons` [{`id`, `appearance`}] and `speaking`, which make a caption in MTV's template, or `captions`
{style: text} (`data.captions.STYLES`), whose first is then the caption. Optional: `captions` beside a caption,
`num_speakers`, `transcript` ("" where nobody speaks), `sound` (what else is heard), `speaker`, `source`. Others are
not read. Sound alone needs no more than a `transcript`.
A clip's transcript leads its `detailed` caption, which is made where the record has no style for picture and sound.
`words` [{`word`, `start_s`, `end_s`}], in seconds of the clip, tell which of them a window holds. A caption of the form
`[VISUAL]: … [SPEECH]: …` is one of style `visual_speech`; else that is made from what is seen and said.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from data.captions import (
    NO_SPEECH,
    PROMPT,
    STYLES,
    Turn,
    audio_caption,
    joint_caption,
    mtv_caption,
    split_visual_speech,
    visual_speech_caption,
)
from data.clip import SUBSETS
from data.prepare.timed_words import TimedWord, timed_words, words_between

SINGLE_PERSON = ("basic_face", "single_character")
JOINT_STYLES = ("detailed", "short", "fused")
"""Captions of picture and sound together, which hold the words that are spoken."""


_WITHOUT_WORDS = ("structured", "video")
_WORDLESS = (NO_SPEECH, "Sound:", "Music:")  # how a `speech` caption begins that holds no words


class Rejected(Exception):
    """Why a clip, a window or a caption is left out, in words for the report."""


@dataclass(frozen=True)
class Description:
    """A clip's caption, its subsets (at least one), what is said and by whom, and where it came from.

    captions: the caption in other styles; with a transcript, `speech` is among them, and of a clip one of JOINT_STYLES.
    is_verbatim: the caption is the transcript's words and nothing else, so it holds for the whole sound only.
    is_one_voice: one person is heard speaking, so that any part of the sound lends its voice to another.
    seen: what the clip shows. spoken: what is said, "" where nobody speaks, None where nobody knows. words: the same
    with their times; with them, `record` is what `in_window` describes anew. sounds: a `speech` caption without words,
    which holds for any part of the clip.
    """

    caption: str
    subsets: tuple[str, ...]
    transcript: str = ""
    origin: str = ""
    speaker: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)
    is_verbatim: bool = False
    is_one_voice: bool = False
    seen: str = ""
    spoken: str | None = None
    words: tuple[TimedWord, ...] = ()
    record: Mapping[object, object] | None = None
    sounds: str = ""

    @property
    def holds_words(self) -> bool:
        """Whether a caption or the transcript holds what is said, so that it is not that of a part of the sound."""
        given = self.captions.get(PROMPT)
        heard = self.captions.get("speech")
        return bool(self.transcript or (heard and not heard.startswith(_WORDLESS))) or (
            given is not None and not given.endswith(NO_SPEECH)
        )

    def in_window(self, start_s: float, end_s: float) -> "Description":
        """The same for a part of a clip whose words have times: a word belongs where its middle is."""
        assert self.record is not None
        said = words_between(self.words, start_s, end_s)
        kept = {style: text for style, text in _captions(self.record).items() if style in _WITHOUT_WORDS}
        changed = {**self.record, "words": None, "transcript": said, "captions": kept or None}
        if _is_prompt(caption := _string(self.record, "caption")):
            changed["caption"] = split_visual_speech(caption)[0]
        try:
            return describe(changed, default_subset=self.subsets[0])
        except ValueError as error:
            raise Rejected(f"of a window, without the captions that hold the whole clip's words: {error}") from error

    def with_prompt(self, *, free: bool) -> "Description":
        """The same with a caption of style PROMPT; Rejected where what is said is not known.

        free: a prompt of another form is taken, and none is made where what is said is not known.
        """
        try:
            if given := self.captions.get(PROMPT):
                if not free:
                    split_visual_speech(given)
                return self
            if self.spoken is not None:
                return replace(self, captions={**self.captions, PROMPT: visual_speech_caption(self.seen, self.spoken)})
        except ValueError as error:
            raise Rejected(f"captions.{PROMPT}: {error}; free_prompts=true takes others as they are") from error
        if free:
            return self
        raise Rejected(
            "what is said is not known, and the recipe's prompts are `[VISUAL]: … [SPEECH]: …`: say it in its "
            '`transcript` ("" for nothing) or write its caption in that form, but of a clip longer than a window with '
            "times in its `words`; free_prompts=true takes others as they are"
        )

    def without_words(self) -> "Description":
        """The same for a part of the sound: no transcript, and no style that begins with what the whole sound says."""
        words = self.captions.get("speech")
        captions = {} if words is None else {s: text for s, text in self.captions.items() if not text.startswith(words)}
        captions.pop(PROMPT, None)
        if self.sounds:
            captions["speech"] = self.sounds
        return replace(self, transcript="", captions=captions, spoken=None)


def describe(record: object, *, default_subset: str, has_picture: bool = True) -> Description:
    """A record -> Description; ValueError names the field and what it must be.

    Subsets: those given; else multiple_characters for two or more persons, single_character for one, sound_event for
    an empty `persons`, and `default_subset` for a record that does not list persons.
    """
    if not isinstance(record, Mapping):
        raise ValueError("a record is a JSON object {…}")
    persons = _persons(record)
    subsets = _subsets(record, persons, default_subset)
    words = timed_words(record.get("words"))
    transcript = " ".join(_string(record, "transcript").split()) or " ".join(each.word for each in words)
    captions = _captions(record)
    sound = " ".join(_string(record, "sound").split())
    sounds = f"Sound: {sound.removesuffix('.')}." if sound else ""
    if transcript and _spoken_words(transcript) not in _spoken_words(captions.get("speech", transcript)):
        raise ValueError("captions.speech: does not hold the words of transcript; write them in, or leave one out")
    if transcript:
        captions = {"speech": audio_caption([Turn(transcript)], sound=sound), **captions}
    elif isinstance(record.get("transcript"), str):  # nobody speaks
        captions = {"speech": audio_caption([], sound=sound), **captions}
    elif sounds:  # nobody knows
        captions = {"speech": sounds, **captions}
    seen, is_verbatim = [], False
    if "caption" in record:
        caption = " ".join(_string(record, "caption").split())
        if not caption:
            raise ValueError("the caption is empty")
    elif "scene" in record:
        looks, scene = [look for _, look in persons or []], _string(record, "scene")
        number, speaking = _speech(record, persons or [], subsets)
        caption = mtv_caption(looks, speaking, scene, number)
        seen = _seen(looks, speaking, scene)
    elif given := next((style for style in STYLES if style in captions and (style != "speech" or not has_picture)), ""):
        caption, is_verbatim = captions[given], given == "speech"
    else:
        needed = "neither caption nor scene" if has_picture else "neither caption nor transcript"
        raise ValueError(f"{needed}; it has {', '.join(map(str, record)) or 'no fields'}")
    if has_picture and "speech" in captions and not captions.keys() & {*JOINT_STYLES}:
        captions["detailed"] = reduce(joint_caption, seen or [caption], captions["speech"])
    if has_picture and PROMPT not in captions and _is_prompt(caption):
        captions[PROMPT] = caption
    speaker = " ".join(_string(record, "speaker").split())
    is_known = bool(words) or isinstance(record.get("transcript"), str) or _num_speakers(record) == 0
    return Description(
        caption,
        subsets,
        transcript,
        _string(record, "source"),
        speaker=speaker,
        captions=captions,
        is_verbatim=is_verbatim,
        is_one_voice=bool(speaker) or _is_one_voice(record, subsets, is_spoken=bool(transcript)),
        seen=reduce(joint_caption, seen or [captions.get("video", caption)]),
        spoken=transcript if is_known else None,
        words=words if has_picture else (),
        record={**record, "subset": list(subsets)} if words and has_picture else None,
        sounds=sounds,
    )


def _captions(record: Mapping[object, object]) -> dict[str, str]:
    """The texts of `captions` by style."""
    given = record.get("captions")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"captions: must be an object {{style: text}} of {', '.join(STYLES)}")
    captions = {}
    for style, text in given.items():
        if style not in STYLES:
            raise ValueError(f"captions.{style}: must be one of {', '.join(STYLES)}")
        captions[style] = " ".join(_string(given, style).split())
        if not captions[style]:
            raise ValueError(f"captions.{style}={text!r}: is empty")
    return captions


def _spoken_words(text: str) -> str:
    """Words alone, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _is_prompt(caption: str) -> bool:
    try:
        split_visual_speech(caption)
    except ValueError:
        return False
    return True


def _speech(
    record: Mapping[object, object], persons: list[tuple[str, str]], subsets: Sequence[str]
) -> tuple[int, str | None]:
    """How many people are heard, and who of them speaks, as the template names persons (Person1, …), or None.

    The number is `num_speakers` where it is given. Else nobody without persons; everybody in multiple_characters;
    one in the single-person subsets or where `speaking` names one; nobody in sound_event and visual_mood alone.
    """
    speaking = record.get("speaking")
    names = [name for name, _ in persons]
    if speaking is not None and speaking not in names:
        raise ValueError(f"speaking={speaking!r}: must be one of {', '.join(names) or '(no persons)'}, or null")
    template_name = None if speaking is None else f"Person{names.index(str(speaking)) + 1}"
    if (given := _num_speakers(record)) is not None:
        number = given
    elif not persons:
        number = 0
    elif "multiple_characters" in subsets:
        number = len(persons)
    else:
        number = int(speaking is not None or any(subset in SINGLE_PERSON for subset in subsets))
    return number, template_name


def _num_speakers(record: Mapping[object, object]) -> int | None:
    number = record.get("num_speakers")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
        raise ValueError(f"num_speakers={number!r}: must be a whole number")
    return number


def _is_one_voice(record: Mapping[object, object], subsets: Sequence[str], *, is_spoken: bool) -> bool:
    """Whether one person is heard, as far as the record says: `num_speakers` where it is given, else the subsets."""
    if (given := _num_speakers(record)) is not None:
        return given == 1
    if "multiple_characters" in subsets:
        return False
    return is_spoken or record.get("speaking") is not None or any(subset in SINGLE_PERSON for subset in subsets)


def _seen(looks: Sequence[str], speaking: str | None, scene: str) -> list[str]:
    """What a clip shows, sentence by sentence: persons, who of several is speaking, the scene."""
    if len(looks) > 1:
        looks = [f"Person{number}: {look}" for number, look in enumerate(looks, start=1)]
        looks += [f"{speaking} is speaking"] if speaking else []
    return [" ".join(text.split()) for text in (*looks, scene)]


def _persons(record: Mapping[object, object]) -> list[tuple[str, str]] | None:
    """(identifier, appearance) of each person, or None where the record does not list them."""
    if record.get("persons") is None:
        return None
    listed, persons = record["persons"], []
    if not isinstance(listed, list):
        raise ValueError("persons: must be a list of {id, appearance}")
    for number, person in enumerate(listed, start=1):
        if not isinstance(person, Mapping):
            raise ValueError(f"persons: entry {number} must be {{id, appearance}}")
        persons.append((str(person.get("id", f"Person{number}")), _string(person, "appearance")))
    if len({name for name, _ in persons}) < len(persons):
        raise ValueError("persons: two have the same id")
    return persons


def _subsets(
    record: Mapping[object, object], persons: list[tuple[str, str]] | None, default_subset: str
) -> tuple[str, ...]:
    given = record.get("subset")
    listed = given if isinstance(given, list) else [] if given is None else [given]
    for name in listed:
        if name not in SUBSETS:
            raise ValueError(f"subset={name!r}: must be one of {', '.join(SUBSETS)}")
    if listed:
        return tuple(name for name in SUBSETS if name in listed)
    if persons is None:
        return (default_subset,)
    return (("sound_event", "single_character")[len(persons)] if len(persons) < 2 else "multiple_characters",)


def _string(record: Mapping, field: str) -> str:
    value = record.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{field}={value!r}: must be text")
    return value
