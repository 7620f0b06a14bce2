"""A request laid out on the model's clock: windows, what each is given, and what the user should know beforehand.

Every file is read here once, so that a bad one is found before anything is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from avlit.commands.abilities import Abilities
from avlit.commands.control_files import read_reference_image, read_video
from avlit.commands.request import STRUCTURE_KEYS, Request, image_word
from avlit.commands.soundtrack import MIX_RATE_HZ, Soundtrack, open_soundtrack
from avlit.errors import UserError
from avlit.media import MediaError, audio_length_s, probe, read_audio, read_clip, read_image
from avlit.randomness import numpy_generator
from avlit.timing import Timing
from data.prepare.controls import ASPECT_SLACK
from data.prepare.windows import silence


@dataclass(frozen=True)
class Window:
    """One pass of the sampler over `timing.num_frames` frames.

    start: the clip's frame that it begins with. given: how many of its first frames are the end of the window before,
    0 in the first. count: how many it adds to the clip after those. images: latent frame of the window -> picture.
    seed: of its noise. Of sound alone, start, given and count are 0.
    """

    start: int
    given: int
    count: int
    prompt: str | None
    images: Mapping[int, Path]
    seed: int

    @property
    def first_new(self) -> int:
        """The clip's frame that is the first it adds."""
        return self.start + self.given


@dataclass(frozen=True)
class Plan:
    """All windows of a clip, its sound, and remarks for the screen.

    num_frames: 0 for sound alone. duration_s: how long the clip lasts. audio_prompt: the audio branch's own text.
    reference: a voice to speak in. video: the file whose frames are given. draft: the file that is refined. controls:
    files of `Request.controls`, by their words.
    """

    windows: tuple[Window, ...]
    soundtrack: Soundtrack
    num_frames: int
    duration_s: float
    audio_prompt: str | None
    reference: Path | None
    video: Path | None
    notes: tuple[str, ...]
    draft: Path | None = None
    controls: Mapping[str, Path] = field(default_factory=dict)


def plan_clip(request: Request, abilities: Abilities) -> Plan:
    """Check a request against what the run can do and against its files, and divide it into windows.

    A long clip continues from its own end: each window after the first is given the last 1 + temporal_factor frames of
    the one before (two latent frames, encoded again) and adds the rest. Prompts change where a window adds its first
    frame. UserError names the word that does not fit.
    """
    abilities.refuse_others(request)
    if request.duration_s is not None:
        abilities.refuse_length(request.duration_s)
    notes = _reference_notes(request, abilities)
    notes += [f"{word}: has no effect at {key}=0" for word, key in abilities.idle.items() if word in request.contents]
    said_by = "audio_prompt" if abilities.has_audio_prompt else "prompt"
    if abilities.makes_sound and said_by not in request.contents:
        notes.append(f"without {said_by}= the model is given no text: what is said is its own choice")
    if abilities.makes_video:
        return _plan_video(request, abilities, notes)
    duration_s = abilities.clip_s if request.duration_s is None else request.duration_s
    window = Window(start=0, given=0, count=0, prompt=request.prompt, images={}, seed=request.seed)
    soundtrack = open_soundtrack({}, duration_s=duration_s)
    return Plan((window,), soundtrack, 0, duration_s, request.audio_prompt, request.reference, None, notes=tuple(notes))


def _plan_video(request: Request, abilities: Abilities, notes: list[str]) -> Plan:
    timing = abilities.timing
    asked = timing.num_frames if request.duration_s is None else max(1, round(request.duration_s * timing.fps))
    found = [asked]
    for name in ("video", *STRUCTURE_KEYS):
        if (path := getattr(request, name)) is not None:
            is_draft = name == "video" and abilities.is_draft_given
            found.append(_given_frames(name, Path(path), request.duration_s, asked, timing, notes))
            if is_draft or name != "video":
                notes += _shape_notes(name, Path(path), timing)
            if is_draft and probe(path).audio_channels is None:
                notes.append("video: has no sound; the clip stays silent")
    num_frames = min(found)
    if request.reference_image is not None:
        notes += _reference_image_notes(request.reference_image, timing)
    given = 1 + timing.temporal_factor
    added = timing.num_frames - given
    if num_frames > timing.num_frames and added < 1:
        raise UserError(
            f"duration_s={request.duration_s:g}: the run's clips of {timing.num_frames} frames are too short to go on "
            f"from {given} of them; at most {timing.duration_s:.2f} s here"
        )
    starts = [0, *range(added, num_frames - given, added)] if num_frames > timing.num_frames else [0]
    first_new = [0, *(start + given for start in starts[1:])]
    prompts, prompt_notes = _prompts(request, first_new, timing)
    images = _images(request, num_frames, starts, timing)
    windows = tuple(
        Window(
            start=start,
            given=new - start,
            count=(first_new[number + 1] if number + 1 < len(starts) else num_frames) - new,
            prompt=prompts[number],
            images=images[number],
            seed=window_seed(request.seed, number),
        )
        for number, (start, new) in enumerate(zip(starts, first_new, strict=True))
    )
    duration_s = num_frames / timing.fps
    soundtrack = open_soundtrack(request.tracks, duration_s=duration_s)
    notes += [*prompt_notes, *_sound_notes(soundtrack, duration_s, timing)]
    return Plan(
        windows,
        soundtrack,
        num_frames,
        duration_s,
        request.audio_prompt,
        request.reference,
        None if abilities.is_draft_given else request.video,
        notes=tuple(notes),
        draft=request.video if abilities.is_draft_given else None,
        controls=request.controls,
    )


def window_seed(seed: int, number: int) -> int:
    """The seed of a window's noise, a function of the clip's seed and the window's number; the first has the clip's."""
    return seed if number == 0 else int(numpy_generator(seed, "window", number).integers(2**63))


def _prompts(request: Request, first_new: list[int], timing: Timing) -> tuple[list[str | None], list[str]]:
    """The prompt of each window, and from when on each later one is in force."""
    changes = sorted(request.later_prompts.items())
    begins_s = [frame / timing.fps for frame in first_new]
    in_force = [max((i for i, (second, _) in enumerate(changes) if second <= begin + 1e-6), default=-1)
                for begin in begins_s]  # fmt: skip
    notes = []
    for number, (second, _) in enumerate(changes):
        if number not in in_force:
            shown = ", ".join(f"{begin:.2f}" for begin in begins_s[:6]) + (", …" if len(begins_s) > 6 else "")
            raise UserError(
                f"prompt.{second:g}: would never be in force: a prompt changes where a window begins, here at {shown} s"
                "; move it, or make the clip longer with duration_s="
            )
        notes.append(f"prompt.{second:g} is in force from {begins_s[in_force.index(number)]:.2f} s on")
    return [request.prompt if number < 0 else changes[number][1] for number in in_force], notes


def _images(request: Request, num_frames: int, starts: list[int], timing: Timing) -> list[dict[int, Path]]:
    """The pictures of each window by latent frame."""
    found: list[dict[int, tuple[str, Path]]] = [{} for _ in starts]
    for frame, path in request.images.items():
        key = image_word(frame)
        place = num_frames + frame if frame < 0 else frame
        if not 0 <= place < num_frames:
            needed_s = (-frame if frame < 0 else frame + 1) / timing.fps
            raise UserError(
                f"{key}: the clip has the frames 0 to {num_frames - 1}; choose one of them, or make it longer with "
                f"duration_s={needed_s:.2f}"
            )
        # the window that adds the frame, not a later one that is given it
        number = 0 if place < timing.num_frames else 1 + (place - timing.num_frames) // starts[1]
        latent = timing.latent_frame_of(place - starts[number])
        if latent in found[number]:
            other = found[number][latent][0]
            raise UserError(
                f"{other} and {key}: both lie in the same latent frame of {timing.temporal_factor} frames, which can "
                "show one picture; move them apart"
            )
        found[number][latent] = key, Path(path)
        try:
            read_image(path, size=(timing.height, timing.width))
        except MediaError as error:
            raise MediaError(f"{key}={error}") from error
    return [{latent: path for latent, (_, path) in each.items()} for each in found]


def _given_frames(
    name: str, path: Path, duration_s: float | None, num_frames: int, timing: Timing, notes: list[str]
) -> int:
    """How many of `num_frames` a video has, be it given, refined or followed. duration_s: as asked for."""
    try:
        found = len(read_video(path, timing))
        length_s = probe(path).duration_s
    except MediaError as error:
        raise MediaError(f"{name}={error}") from error
    if found == 1 < timing.num_frames and name in STRUCTURE_KEYS:
        raise UserError(f"{name}={path}: shows one picture; a clip follows a video, frame by frame")
    if duration_s is not None and num_frames > found:
        raise UserError(
            f"duration_s={duration_s:g}: {name}={path} has {found / timing.fps:.2f} s at the run's "
            f"{timing.fps:g} frames a second; at most that"
        )
    if length_s > (num_frames + 0.5) / timing.fps:
        notes.append(f"{name}: the clip of {num_frames / timing.fps:.2f} s uses the beginning of its {length_s:.2f} s")
    if found < timing.num_frames:
        notes.append(
            f"{name}: {found / timing.fps:.2f} s for a model of {timing.duration_s:.2f} s; its last frame is held "
            "for the rest, which is cut off afterwards"
        )
    return min(num_frames, found)


def _shape_notes(name: str, path: Path, timing: Timing) -> list[str]:
    """That a video of another shape than the clip's is cut."""
    height, width = read_clip(path, rate_hz=None, duration_s=1e-3).frames.shape[1:3]
    return _cut_note(name, height, width, timing)


def _reference_image_notes(path: Path, timing: Timing) -> list[str]:
    try:
        read_reference_image(path, timing)
        height, width = read_image(path, size=None).shape[:2]
    except MediaError as error:
        raise MediaError(f"reference_image={error}") from error
    return _cut_note("reference_image", height, width, timing)


def _cut_note(name: str, height: int, width: int, timing: Timing) -> list[str]:
    if abs(width * timing.height / (height * timing.width) - 1) <= ASPECT_SLACK:
        return []
    return [
        f"{name}: {width}x{height} pixels are of another shape than the clip's {timing.width}x{timing.height}; what "
        "does not fit is cut off around the centre"
    ]


def _reference_notes(request: Request, abilities: Abilities) -> list[str]:
    """How much of the reference is used."""
    if request.reference is None:
        return []
    try:
        length_s = audio_length_s(request.reference)
    except MediaError as error:
        raise MediaError(f"reference={error}") from error
    if length_s * abilities.latents_per_s < 1:
        raise UserError(
            f"reference={request.reference}: {length_s:.3f} s of sound are less than one of the "
            f"{abilities.latents_per_s:g} latents a second that the model reads it as"
        )
    used = read_audio(request.reference, MIX_RATE_HZ, duration_s=abilities.reference_s)
    if why := silence(used):
        raise UserError(
            f"reference={request.reference}: the {min(length_s, abilities.reference_s):.2f} s that the model reads of "
            f"it are {why}; cut it to begin with the voice, or leave it out"
        )
    if length_s <= abilities.reference_s:
        return [f"reference: all of its {length_s:.2f} s are used"]
    return [f"reference: the first {abilities.reference_s:.2f} of its {length_s:.2f} s are used"]


def _sound_notes(soundtrack: Soundtrack, duration_s: float, timing: Timing) -> list[str]:
    notes = []
    for name, length_s in soundtrack.lengths_s.items():
        if length_s < duration_s - 0.5 / timing.fps:
            notes.append(f"{name}: {length_s:.2f} s of sound for a clip of {duration_s:.2f} s; silence follows it")
        elif length_s > duration_s + 0.5 / timing.fps:
            notes.append(
                f"{name}: the clip of {duration_s:.2f} s uses the beginning of its {length_s:.2f} s; "
                f"duration_s={length_s:.2f} would use all of it"
            )
    if soundtrack.gain < 1:
        notes.append(
            f"the tracks together are louder than full scale: their mix is turned down to {soundtrack.gain:.2f}"
        )
    return notes
