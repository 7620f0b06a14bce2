"""Held-out clips and media files as metrics see them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from avlit.commands.clips import SampledClip, to_frames
from avlit.errors import ConfigError
from avlit.media import probe, read_audio, read_clip
from avlit.metrics.clip import Clip, Sound
from data.datamodule import HeldoutClip
from data.sample import Annotation

if TYPE_CHECKING:
    from data.encode import Encoders

VIDEOS, SOUNDS = (".mp4", ".mov", ".mkv", ".webm", ".avi"), (".wav", ".flac", ".ogg", ".mp3")


def asked_for(about: Annotation, *, key: str, prompt: str | None) -> Clip:
    """What a clip is to show and to say, as far as its annotation knows it; no picture and no sound yet."""
    truth = cast("Mapping[str, Any]", about.truth)
    speech, timbres, persons = (truth.get(name) for name in ("speech_envelope", "timbre", "identity"))
    return Clip(
        key=key,
        fps=about.fps,
        prompt=prompt,
        transcript=about.transcript,
        speech_envelopes=tuple(np.array(each, np.float64) for each in speech) if speech else None,
        num_speakers=None if speech is None else len(speech),
        event_times_s=tuple(truth["event_times_s"]) if truth.get("event_times_s") else None,
        music_mode=truth.get("mode"),
        brightness=np.array(truth["brightness"], np.float64) if truth.get("brightness") else None,
        person=persons[0] if persons and len(persons) == 1 else None,
        voice_hz=timbres[0]["f0_hz"] if timbres and len(timbres) == 1 else None,
    )


@torch.no_grad()
def of_heldout(
    clip: HeldoutClip, made: SampledClip, *, encoders: Encoders, is_first_given: bool
) -> tuple[Clip, Clip]:  # fmt: skip
    """What was sampled for a held-out clip, and the clip itself as the video codec returns it.

    is_first_given: the true first frame was given, so that mouths are where they are in the true clip.
    """
    about, batch = clip.annotation, clip.batch
    known = asked_for(about, key=batch.keys[0], prompt=batch.captions[0])
    boxes = about.mouth_boxes or None
    has_picture = encoders.video is not None and batch.video_latents is not None
    has_places = is_first_given or any((*batch.has_depth, *batch.has_pose))
    known = replace(
        known,
        num_given=1 if is_first_given and has_picture else 0,
        mouth_boxes=boxes if is_first_given else None,
        pose_boxes=boxes if has_places else None,
        depth=_depth(clip, encoders),
        reference_image=_picture(batch.reference_image, batch.has_reference_image, encoders),
        reference_voice=_voice(clip, encoders),
    )
    frames = None
    if has_picture:
        assert encoders.video is not None and batch.video_latents is not None
        frames = to_frames(encoders.video.decode(batch.video_latents.float())[0].clamp(-1, 1).cpu())
    true = replace(
        known,
        frames=frames,
        waveform=clip.waveform,
        rate_hz=clip.rate_hz,
        has_own_sound=made.has_own_sound,
        mouth_boxes=boxes,
        pose_boxes=None,
    )
    shown = replace(
        known,
        frames=None if made.video is None else to_frames(made.video),
        waveform=made.waveform,
        rate_hz=made.rate_hz,
        has_own_sound=made.has_own_sound,
        real=true,
    )
    return shown, true


def _depth(clip: HeldoutClip, encoders: Encoders) -> np.ndarray | None:
    """The depth that was given, [F, H, W] in [0, 1]; grey, white is nearest."""
    if not any(clip.batch.has_depth) or clip.batch.depth is None or encoders.video is None:
        return None
    return (encoders.video.decode(clip.batch.depth.float())[0].mean(0).cpu().clamp(-1, 1).numpy() + 1) / 2


def _picture(latents: torch.Tensor | None, has: Sequence[bool], encoders: Encoders) -> np.ndarray | None:
    if latents is None or not any(has) or encoders.video is None:
        return None
    return to_frames(encoders.video.decode(latents.float())[0].clamp(-1, 1).cpu())[0]


def _voice(clip: HeldoutClip, encoders: Encoders) -> Sound | None:
    """The reference voice as the audio codec returns it."""
    if clip.batch.reference is None or not any(clip.batch.has_reference) or encoders.audio is None:
        return None
    latents = clip.batch.reference
    length = int(latents[0].abs().sum(-1).gt(0).sum())  # zeros are padding
    sound = encoders.audio.decode(latents[:, :length].float())[0].clamp(-1, 1).cpu().numpy()
    return Sound(sound, encoders.audio.rate_hz)


def media_in(folder: Path) -> list[Path]:
    """Videos and sounds of a folder, by name. ConfigError: it is none, or has none."""
    if not folder.is_dir():
        raise ConfigError(f"clips_dir={folder}: there is no such folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS + SOUNDS)
    if not found:
        raise ConfigError(f"clips_dir={folder}: holds no clip ({', '.join(VIDEOS + SOUNDS)})")
    return found


def of_file(path: Path, *, about: Mapping[str, str], real: Path | None) -> Clip:
    """A media file with what a record says of it: caption, transcript, reference_audio. MediaError: it is broken."""
    info = probe(path)
    frames, fps, waveform = None, info.fps or 0.0, None
    if info.picture_s is not None:
        clip = read_clip(path, rate_hz=info.rate_hz)
        frames, fps, waveform = clip.frames, clip.fps, clip.waveform
    elif info.rate_hz is not None:
        waveform = read_audio(path, info.rate_hz)
    voice = None
    if "reference_audio" in about:
        spoken = path.parent / about["reference_audio"]
        rate_hz = probe(spoken).rate_hz or 0
        voice = Sound(read_audio(spoken, rate_hz), rate_hz)
    return Clip(
        key=path.stem,
        fps=fps,
        frames=frames,
        waveform=waveform,
        rate_hz=info.rate_hz or 0,
        prompt=about.get("caption"),
        transcript=about.get("transcript"),
        reference_voice=voice,
        real=None if real is None else of_file(real, about={}, real=None),
    )


RECORD = ("file", "caption", "transcript", "reference_audio")


def read_records(path: Path | None) -> dict[str, dict[str, str]]:
    """File name -> what is said of it, from lines of JSON with the keys of RECORD. ConfigError: a line is not one."""
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"captions={path}: cannot be read ({error})") from error
    found: dict[str, dict[str, str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"captions={path}, line {number}: is not JSON ({error})") from error
        if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
            raise ConfigError(
                f"captions={path}, line {number}: must be an object of texts, with the keys {', '.join(RECORD)}; other "
                "descriptions, such as MTV's, are what `just prepare` reads"
            )
        if unknown := [key for key in record if key not in RECORD]:
            raise ConfigError(f"captions={path}, line {number}: {unknown[0]} is not one of {', '.join(RECORD)}")
        if "file" not in record:
            raise ConfigError(f"captions={path}, line {number}: file is missing, the clip's file name")
        found[record["file"]] = record
    return found
