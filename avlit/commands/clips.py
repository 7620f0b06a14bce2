"""Samples clips for held-out conditions, writes them with their sound, and measures lip sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from avlit.batch import concatenate
from avlit.config import SampleConfig
from avlit.media import contact_sheet, write_mp4, write_sound
from avlit.metrics.lip_sync import lip_sync, mouth_aperture, speech_envelope
from avlit.module import AVModule
from avlit.ranks import is_sharded
from avlit.sound import fit
from data.datamodule import HeldoutClip

if TYPE_CHECKING:
    from data.encode import Encoders

SAMPLING_BATCH = 16


@dataclass(frozen=True)
class SampledClip:
    """What a model made for a held-out clip's conditions.

    video [3, F, H, W] in [-1, 1] on the CPU, None for sound alone. waveform: float32 [N] in [-1, 1] at rate_hz, as
    long as the clip: generated, or else the sound that drove the video (has_own_sound False).
    """

    video: Tensor | None
    waveform: np.ndarray
    rate_hz: int
    has_own_sound: bool


@torch.no_grad()
def sample_clips(
    module: AVModule,
    clips: Sequence[HeldoutClip],
    *,
    encoders: Encoders,
    settings: SampleConfig,
    seed: int,
    gives_first_frame: bool = False,
    on_step: Callable[[], None] | None = None,
) -> list[SampledClip]:
    """Generated clips in the order of the held-out ones; clip i has seed `seed` + i.

    gives_first_frame: the true first latent frame is given, so that place and looks are the true clip's.
    on_step: called after every step of the sampler, for each batch of clips.
    """
    made: dict[int, SampledClip] = {}
    for shape in dict.fromkeys(clip.annotation.shape for clip in clips):  # clips of one size go together
        numbers = [number for number, clip in enumerate(clips) if clip.annotation.shape == shape]
        for part in (numbers[i : i + SAMPLING_BATCH] for i in range(0, len(numbers), SAMPLING_BATCH)):
            batch = concatenate([clips[number].batch for number in part]).to(module.device)
            keyframes = None
            if gives_first_frame:  # as ti2av was trained: without a reference
                batch = replace(batch, reference=None, has_reference=(False,) * len(batch.has_reference))
            if gives_first_frame and batch.video_latents is not None:
                keyframes = torch.zeros(len(part), batch.video_latents.shape[2], dtype=torch.bool, device=module.device)
                keyframes[:, 0] = True
            with precision_of_training(module):
                latents = module.sample(
                    batch,
                    seeds=[seed + number for number in part],
                    settings=settings,
                    keyframes=keyframes,
                    on_step=on_step,
                )
            videos: list[Tensor | None] = [None] * len(part)
            if latents.video is not None and encoders.video is not None:
                videos = list(encoders.video.decode(latents.video.float()).clamp(-1, 1).cpu())
            for row, number in enumerate(part):
                waveform, rate_hz = clips[number].waveform, clips[number].rate_hz
                if latents.audio is not None and encoders.audio is not None:
                    rate_hz = encoders.audio.rate_hz
                    sound = encoders.audio.decode(latents.audio[row : row + 1].float())[0].clamp(-1, 1).cpu().numpy()
                    waveform = fit(sound, round(batch.duration_s * rate_hz))
                made[number] = SampledClip(videos[row], waveform, rate_hz, latents.audio is not None)
    return [made[number] for number in range(len(clips))]


def precision_of_training(module: AVModule) -> AbstractContextManager[object]:
    """For a module that is in training, where frozen layers and the units of a sharded model may be bfloat16."""
    is_lowered = is_sharded(module.model) or any(p.dtype == torch.bfloat16 for p in module.model.parameters())
    return module.trainer.precision_plugin.forward_context() if module._trainer and is_lowered else nullcontext()


def to_frames(video: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


def write_clips(
    module: AVModule,
    clips: Sequence[HeldoutClip],
    *,
    encoders: Encoders,
    settings: SampleConfig,
    seed: int,
    folder: Path | None,
    on_step: Callable[[], None] | None = None,
) -> list[Path]:
    """Sample, and write an MP4, or a WAV of sound alone, for each clip, and a contact sheet of all.

    folder: None on ranks that only sample with the first one, since the model is sharded.
    """
    sampled = sample_clips(module, clips, encoders=encoders, settings=settings, seed=seed, on_step=on_step)
    if folder is None:
        return []
    frames = [None if made.video is None else to_frames(made.video) for made in sampled]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (clip, made, each) in enumerate(zip(clips, sampled, frames, strict=True)):
        path = folder / f"{number:02d}-{clip.batch.keys[0]}"  # keys may recur in another shard folder
        if each is None:
            paths.append(path.with_suffix(".wav"))
            write_sound(paths[-1], made.waveform, rate_hz=made.rate_hz)
        else:
            paths.append(path.with_suffix(".mp4"))
            write_mp4(paths[-1], each, fps=clip.annotation.fps, waveform=made.waveform, rate_hz=made.rate_hz)
    sheet = folder / "contact_sheet.png"
    contact_sheet(
        sheet,
        frames,
        waveforms=[made.waveform for made in sampled],
        rate_hz=sampled[0].rate_hz,
        labels=[f"{clip.batch.keys[0]}: {clip.batch.captions[0]}" for clip in clips],
    )
    return [*paths, sheet]


def measure_lip_sync(
    module: AVModule,
    clips: Sequence[HeldoutClip],
    *,
    encoders: Encoders,
    settings: SampleConfig,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Lip sync of generated clips with their own and with other clips' speech, on the embedded corpus.

    Speech is what drove the video, or what was generated with it. The first latent frame is given, so that the true
    clip's mouth boxes say where the mouths are; it is left out of the measurement. Every speaking person counts once,
    but where speech is generated only clips with one speaker are measured: it is one sound. Empty where fewer than two
    speak.
    """
    clips = clips_that_speak(clips, makes_sound=encoders.audio is not None)
    if not clips or encoders.video is None:
        return {}
    sampled = sample_clips(
        module, clips, encoders=encoders, settings=settings, seed=seed, gives_first_frame=True, on_step=on_step
    )
    return lip_sync_of(clips, sampled)


def clips_that_speak(clips: Sequence[HeldoutClip], *, makes_sound: bool) -> list[HeldoutClip]:
    """The clips of the embedded corpus in which someone speaks; one alone where the speech is generated."""
    return [
        clip
        for clip in clips
        if (persons := clip.annotation.truth.get("speech_envelope"))
        and isinstance(persons, list)
        and not (makes_sound and len(persons) > 1)
    ]


def lip_sync_of(clips: Sequence[HeldoutClip], sampled: Sequence[SampledClip]) -> dict[str, float]:
    """Lip sync of clips that were sampled for held-out ones that speak; see `measure_lip_sync`."""
    apertures, envelopes = [], []
    for clip, made in zip(clips, sampled, strict=True):
        assert made.video is not None
        speech = clip.annotation.truth["speech_envelope"]
        assert isinstance(speech, list)
        for person, envelope in enumerate(speech):
            boxes = [frame[person] for frame in clip.annotation.mouth_boxes]
            aperture = mouth_aperture(made.video[None], torch.tensor(boxes, dtype=torch.float32)[None])[0]
            heard = speech_envelope(made.waveform, num_frames=len(envelope)) if made.has_own_sound else envelope
            apertures.append(aperture[1:].numpy())
            envelopes.append(np.array(heard[1:]))
    if len(apertures) < 2:
        return {}
    own, shuffled = lip_sync(np.stack(apertures), np.stack(envelopes))
    return {"val/lip_sync": own, "val/lip_sync_shuffled": shuffled}
