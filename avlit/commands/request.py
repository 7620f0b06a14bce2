"""What a user asks a trained model for: prompts, tracks, images, length and seed, in Python or as words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from avlit.errors import ConfigError
from avlit.settings import nearest

TRACK_KEYS = ("speech", "speech_second", "effects", "music")
STRUCTURE_KEYS = ("depth", "pose")
CONTROL_KEYS = ("reference_image", *STRUCTURE_KEYS)
FILE_KEYS = (*TRACK_KEYS, "reference", "video", *CONTROL_KEYS)
REQUEST_KEYS = (
    "prompt", "prompt.SECONDS", "audio_prompt", *FILE_KEYS, "image.FRAME", "duration_s", "seed", "free_prompts",
)  # fmt: skip
CONTENT_KEYS = ("prompt", "audio_prompt", "image", *FILE_KEYS)
"""Words of which there is one at least in every request, by their part before the dot."""

LAST_FRAME = -1
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One clip to be made.

    prompt: from the beginning on; None gives the model no text, as training's text dropout does. later_prompts:
    seconds -> the prompt from there on. audio_prompt: what is heard and said, for models whose audio branch has a text
    of its own. speech, speech_second, effects, music: sound files that start with the
    picture; None is silence. reference: a sound file with the voice to speak in. video: a file whose frames are given
    whole, so that sound is made for them, or that are refined. reference_image: a picture file of who is seen. depth,
    pose: a video file that shows them frame by frame, one of the two. images: pixel frame -> picture file that the
    frame shows; negative frames count from the end. duration_s: None is the length of the run's clips. seed: of all
    noise; the same seed makes the same clip. free_prompts: a prompt may have another form than those of the training.
    Which of these a run's model takes, `Abilities` says.
    """

    prompt: str | None = None
    later_prompts: Mapping[float, str] = field(default_factory=dict)
    audio_prompt: str | None = None
    speech: Path | None = None
    speech_second: Path | None = None
    effects: Path | None = None
    music: Path | None = None
    reference: Path | None = None
    video: Path | None = None
    reference_image: Path | None = None
    depth: Path | None = None
    pose: Path | None = None
    images: Mapping[int, Path] = field(default_factory=dict)
    duration_s: float | None = None
    seed: int = 0
    free_prompts: bool = False

    def __post_init__(self) -> None:
        later = ((f"prompt.{second:g}", prompt) for second, prompt in self.later_prompts.items())
        for key, text in (("prompt", self.prompt), ("audio_prompt", self.audio_prompt), *later):
            if text is not None and not text.strip():
                raise ConfigError(f"{key}=: is empty; leave it out to sample without a prompt")
        if bad := [second for second in self.later_prompts if not (math.isfinite(second) and second > 0)]:
            raise ConfigError(f"prompt.{bad[0]:g}: seconds must be above 0; `prompt=` is the one from 0 on")
        if self.duration_s is not None and not (math.isfinite(self.duration_s) and self.duration_s > 0):
            raise ConfigError(f"duration_s={self.duration_s:g}: must be a number of seconds above 0")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed={self.seed}: must be a whole number from 0 to {MAX_SEED}")
        if self.depth is not None and self.pose is not None:
            raise ConfigError(f"depth={self.depth} and pose={self.pose}: a clip follows one of the two; leave one out")

    @property
    def tracks(self) -> dict[str, Path]:
        """The tracks that are given, by name."""
        return {name: Path(path) for name in TRACK_KEYS if (path := getattr(self, name)) is not None}

    @property
    def controls(self) -> dict[str, Path]:
        """The pictures that the clip is made after, by their words."""
        return {name: Path(path) for name in CONTROL_KEYS if (path := getattr(self, name)) is not None}

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the clip is made from."""
        named = (getattr(self, name) for name in FILE_KEYS)
        return (*(Path(path) for path in named if path is not None), *map(Path, self.images.values()))

    @property
    def contents(self) -> dict[str, str]:
        """What the clip is to show or sound like, as words: `image.0` -> file, `prompt` -> text."""
        found: dict[str, object] = {"prompt": self.prompt}
        found |= {f"prompt.{second:g}": text for second, text in self.later_prompts.items()}
        found |= {name: getattr(self, name) for name in ("audio_prompt", *FILE_KEYS)}
        found |= {image_word(frame): path for frame, path in self.images.items()}
        return {word: str(value) for word, value in found.items() if value is not None}

    def with_text(self, key: str, text: str) -> Request:
        """The same request with one prompt exchanged; key: prompt or audio_prompt."""
        return replace(self, **{key: text})  # pyright: ignore[reportArgumentType]

    def with_file(self, name: str, path: Path) -> Request:
        """The same request with one file exchanged; name: one of FILE_KEYS."""
        return replace(self, **{name: path})  # pyright: ignore[reportArgumentType]


def image_word(frame: int) -> str:
    """The word that gives the picture of a frame."""
    return "image.last" if frame == LAST_FRAME else f"image.{frame}"


def is_content(key: str) -> bool:
    """Whether a word says what a clip shows or sounds like."""
    return key.partition(".")[0] in CONTENT_KEYS


def is_request_key(key: str) -> bool:
    """Whether a word belongs to a request."""
    return is_content(key) or key in REQUEST_KEYS


def request_from_words(words: Mapping[str, str], *, seed: int) -> Request:
    """Words (`prompt=… prompt.SECONDS=… speech=FILE depth=FILE image.FRAME=FILE duration_s=… seed=…`) -> Request.

    seed: where the words have none. ConfigError names the word and what it must be.
    """
    files: dict[str, Path] = {}
    images: dict[int, Path] = {}
    later: dict[float, str] = {}
    prompt = audio_prompt = None
    duration_s, free_prompts = None, False
    for key, text in words.items():
        name, _, place = key.partition(".")
        if key == "prompt":
            prompt = text
        elif key == "audio_prompt":
            audio_prompt = text
        elif name == "prompt":
            second = _number(key, place, "prompt.SECONDS=TEXT, for example prompt.2.5=…")
            if second in later:
                raise ConfigError(f"{key}: there is a prompt from {second:g} s on already; keep one")
            later[second] = text
        elif name == "image":
            frame = _frame(key, place)
            if frame in images:
                raise ConfigError(f"{key}: frame {frame} has an image already; keep one")
            images[frame] = _path(key, text)
        elif key in FILE_KEYS:
            files[key] = _path(key, text)
        elif key == "duration_s":
            duration_s = _number(f"{key}={text}", text, "a number of seconds above 0")
        elif key == "seed":
            if not text.isdecimal():
                raise ConfigError(f"seed={text}: must be a whole number from 0 to {MAX_SEED}")
            seed = int(text)
        elif key == "free_prompts":
            if text not in ("true", "false"):
                raise ConfigError(f"free_prompts={text}: must be true or false")
            free_prompts = text == "true"
        else:
            near = nearest(key, REQUEST_KEYS)
            raise ConfigError(f"{key}: no such key{f'; did you mean {near}?' if near else ''}")
    if 0.0 in later:
        if prompt is not None:
            raise ConfigError("prompt.0: `prompt=` is the prompt from 0 on; keep one of the two")
        prompt = later.pop(0.0)
    return Request(
        prompt=prompt,
        later_prompts=later,
        audio_prompt=audio_prompt,
        images=images,
        duration_s=duration_s,
        seed=seed,
        free_prompts=free_prompts,
        **files,
    )


def _path(key: str, text: str) -> Path:
    if not text:
        raise ConfigError(f"{key}=: is empty; give a file, or leave it out")
    return Path(text)


def _number(word: str, text: str, wanted: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{word}: must be {wanted}") from None


def _frame(key: str, place: str) -> int:
    if place == "last":
        return LAST_FRAME
    if not re.fullmatch(r"-?\d+", place):
        raise ConfigError(f"{key}: must be image.FRAME=FILE: a frame's number from 0 on, or image.last=FILE")
    return int(place)
