"""What a model's controls do: held-out clips sampled from the same noise with the controls of others, row by row.

Every clip keeps its prompt and its depth; it is given the reference image of the next clip and the voice of the one
after that, so that neither can be guessed from anything else, nor from one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
from avlit.commands.clips import SampledClip, clips_that_speak, sample_clips, to_frames
from avlit.commands.corpus_judge import person_of
from avlit.commands.generation import load_trained, run_config
from avlit.commands.sample import newest_checkpoint
from avlit.control_grid import Column, control_grid
from avlit.errors import UserError
from avlit.metrics.picture_judge import PictureJudge, identity_agreement
from avlit.metrics.timbre import pitch_following, pitch_hz
from avlit.runs import Run
from data.datamodule import HeldoutClip
from data.encode import Encoders

LEAST_CLIPS = 3
"""Clips that it takes for each to have the image and the voice of two others."""

TRUE_CLIPS = "true clips"
"""What stands in the place of a row for the true clips, measured against their own person, voice and depth."""

GRID_CLIPS = 6


@dataclass(frozen=True)
class ControlledClip:
    """A clip with controls of others, and what they ask for.

    person: attributes of the reference image's person. voice_hz: pitch of the reference voice. depth [F, H, W] in
    [0, 1], of the clip itself, None where the run knows no depth.
    """

    clip: HeldoutClip
    person: Mapping[str, str]
    voice_hz: float
    depth: Tensor | None


@dataclass(frozen=True)
class Row:
    """How clips are sampled: words of `sample.*`, and the controls they are given, by the names of `Config.accepts`."""

    words: tuple[str, ...]
    given: tuple[str, ...]


def measure_controls(
    run: Run, rows: Mapping[str, Row], *, judge: Callable[[], PictureJudge], num_clips: int, grid: Path | None = None
) -> dict[str, dict[str, float]]:
    """Each row's metrics, and those of TRUE_CLIPS: identity, timbre and depth against what the controls ask for.

    grid: a picture of some of the clips under every row. UserError: too few held-out clips show one person who speaks.
    """
    config = run_config(run, [f"runs_dir={run.path.parent}"])
    module, encoders = load_trained(config, newest_checkpoint(run, config)), build_encoders(config)
    clips = build_datamodule(config, shard_roots(config), encoders).heldout_samples(num_clips)
    clips = [clip for clip in clips_that_speak(clips, makes_sound=True) if len(clip.annotation.mouth_boxes[0]) == 1]
    if len(clips) < LEAST_CLIPS:
        raise UserError(
            f"run={run.id}: {len(clips)} of {num_clips} held-out clips have one person who speaks, and their controls "
            f"are swapped among {LEAST_CLIPS} or more; give a larger clips="
        )
    asked, seen_by = with_controls_of_others(clips, encoders), judge()
    results, columns = {}, [_reference_column(asked, encoders)]
    for name, row in rows.items():
        print(f"  {name}: {len(asked)} clips with {', '.join(row.given) or 'no controls'}", flush=True)
        made = sample_clips(
            module,
            [replace(each.clip, batch=given_only(each.clip.batch, row.given)) for each in asked],
            encoders=encoders,
            settings=run_config(run, row.words).sample,
            seed=config.seed,
        )
        results[name] = measure_row(made, asked, seen_by)
        columns.append(_column(name, made))
    results[TRUE_CLIPS] = measure_row(
        true_clips(clips, encoders), [asked_of(clip, encoders) for clip in clips], seen_by
    )
    for name, row in rows.items():
        if "depth" in row.given and (without := _without_depth(rows, row)) is not None:
            results[name]["depth_ratio"] = results[name]["depth_error"] / results[without]["depth_error"]
    if grid is not None:
        control_grid(grid, columns)
    return results


def with_controls_of_others(clips: Sequence[HeldoutClip], encoders: Encoders) -> list[ControlledClip]:
    """Clips of one size with the reference image of the next and the voice of the one after; three or more."""
    assert len(clips) >= LEAST_CLIPS
    found = []
    for number, clip in enumerate(clips):
        image, voice = clips[(number + 1) % len(clips)], clips[(number + 2) % len(clips)]
        batch = replace(
            clip.batch,
            reference_image=image.batch.reference_image,
            has_reference_image=image.batch.has_reference_image,
            reference=voice.batch.reference,
            has_reference=voice.batch.has_reference,
        )
        own = asked_of(clip, encoders)
        found.append(
            replace(
                own,
                clip=replace(clip, batch=batch),
                person=person_of(image.annotation.truth),
                voice_hz=_voice_hz(voice),
            )
        )
    return found


def asked_of(clip: HeldoutClip, encoders: Encoders) -> ControlledClip:
    """A clip with its own controls."""
    assert encoders.video is not None
    depth = None
    if clip.batch.depth is not None:
        with torch.no_grad():  # grey, white is nearest
            depth = (encoders.video.decode(clip.batch.depth.float())[0].mean(0).cpu().clamp(-1, 1) + 1) / 2  # [F, H, W]
    return ControlledClip(clip, person_of(clip.annotation.truth), _voice_hz(clip), depth)


def given_only(batch: AVBatch, given: Sequence[str]) -> AVBatch:
    """The batch with the given ones of its controls, and without the others."""
    none = (False,) * len(batch)
    flags = ("has_reference_image", "has_reference", "has_depth", "has_pose")
    return replace(batch, **{flag: none for flag in flags if flag.removeprefix("has_") not in given})


def measure_row(made: Sequence[SampledClip], asked: Sequence[ControlledClip], judge: PictureJudge) -> dict[str, float]:
    """Metrics of sampled clips against what their controls ask for; those that could not be measured are left out."""
    videos = [each.video for each in made]
    assert all(video is not None for video in videos)
    identity, by_chance = identity_agreement(
        [judge.person(v) for v in videos if v is not None], [a.person for a in asked]
    )
    pitch = pitch_following([pitch_hz(m.waveform, m.rate_hz) for m in made], [a.voice_hz for a in asked])
    metrics = {
        "identity": identity,
        "identity_shuffled": by_chance,
        "pitch_error": pitch.error,
        "pitch_error_shuffled": pitch.error_shuffled,
        "pitch_correlation": pitch.correlation,
        "voiced": pitch.voiced,
    }
    errors = [
        judge.depth_error(video, each.depth)
        for video, each in zip(videos, asked, strict=True)
        if video is not None and each.depth is not None
    ]
    if errors:
        metrics["depth_error"] = fmean(errors)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


@torch.no_grad()
def true_clips(clips: Sequence[HeldoutClip], encoders: Encoders) -> list[SampledClip]:
    """The clips themselves, as the codecs return them."""
    found = []
    for clip in clips:
        video, audio = clip.batch.video_latents, clip.batch.audio_latents
        assert video is not None and audio is not None and encoders.video is not None and encoders.audio is not None
        sound = encoders.audio.decode(audio.float())[0].clamp(-1, 1).cpu().numpy()
        shown = encoders.video.decode(video.float())[0].clamp(-1, 1).cpu()
        found.append(SampledClip(shown, sound, encoders.audio.rate_hz, has_own_sound=True))
    return found


def _voice_hz(clip: HeldoutClip) -> float:
    timbre = clip.annotation.truth["timbre"]
    assert isinstance(timbre, list)
    return float(timbre[0]["f0_hz"])


def _without_depth(rows: Mapping[str, Row], row: Row) -> str | None:
    """The row that differs from this one in its depth alone."""
    twin = Row(row.words, tuple(name for name in row.given if name != "depth"))
    return next((name for name, each in rows.items() if each == twin), None)


@torch.no_grad()
def _reference_column(asked: Sequence[ControlledClip], encoders: Encoders) -> Column:
    assert encoders.video is not None
    pictures = []
    for each in asked[:GRID_CLIPS]:
        image = each.clip.batch.reference_image
        assert image is not None
        pictures.append(to_frames(encoders.video.decode(image.float())[0].clamp(-1, 1).cpu())[0])
    return Column("references", pictures, [f"{each.voice_hz:.0f} Hz" for each in asked[:GRID_CLIPS]])


def _column(name: str, made: Sequence[SampledClip]) -> Column:
    pictures, notes = [], []
    for each in made[:GRID_CLIPS]:
        assert each.video is not None
        frames = to_frames(each.video)
        pictures.append(frames[len(frames) // 2])
        pitch = pitch_hz(each.waveform, each.rate_hz)
        notes.append("no voice" if math.isnan(pitch) else f"{pitch:.0f} Hz")
    return Column(name, pictures, notes)
