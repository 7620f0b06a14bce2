"""Samples clips for given prompts and tracks, writes them with the sound that drove them, and measures lip sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avlit.batch import concatenate
from avlit.codecs import VideoCodec
from avlit.config import SampleConfig
from avlit.media import contact_sheet, write_mp4
from avlit.metrics.lip_sync import lip_sync, mouth_aperture
from avlit.module import AVModule
from data.datamodule import HeldoutClip

SAMPLING_BATCH = 16


def sample_videos(
    module: AVModule,
    clips: Sequence[HeldoutClip],
    *,
    codec: VideoCodec,
    settings: SampleConfig,
    seed: int,
    gives_first_frame: bool = False,
    on_step: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Generated videos [3, F, H, W] in [-1, 1], on the CPU, in the order of the clips; clip i has seed `seed` + i.

    gives_first_frame: the true first latent frame is given, so that place and looks are the true clip's.
    on_step: called after every step of the sampler, for each batch of clips.
    """
    videos: dict[int, Tensor] = {}
    for shape in dict.fromkeys(clip.annotation.shape for clip in clips):  # clips of one size go together
        numbers = [number for number, clip in enumerate(clips) if clip.annotation.shape == shape]
        for part in (numbers[i : i + SAMPLING_BATCH] for i in range(0, len(numbers), SAMPLING_BATCH)):
            batch = concatenate([clips[number].batch for number in part]).to(module.device)
            keyframes = None
            if gives_first_frame:
                keyframes = torch.zeros(len(part), batch.video_latents.shape[2], dtype=torch.bool, device=module.device)
                keyframes[:, 0] = True
            latents = module.sample(
                batch,
                seeds=[seed + number for number in part],
                steps=settings.steps,
                guidance=settings.guidance,
                scheduler=settings.scheduler,
                keyframes=keyframes,
                on_step=on_step,
            )
            videos |= zip(part, codec.decode(latents.float()).clamp(-1, 1).cpu(), strict=True)
    return [videos[number] for number in range(len(clips))]


def to_frames(video: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


def write_clips(
    module: AVModule,
    clips: Sequence[HeldoutClip],
    *,
    codec: VideoCodec,
    settings: SampleConfig,
    seed: int,
    folder: Path,
    on_step: Callable[[], None] | None = None,
) -> list[Path]:
    """Sample, and write one MP4 with sound a clip and a contact sheet of all with their spectrograms."""
    videos = sample_videos(module, clips, codec=codec, settings=settings, seed=seed, on_step=on_step)
    frames = [to_frames(video) for video in videos]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (clip, each) in enumerate(zip(clips, frames, strict=True)):
        paths.append(folder / f"{number:02d}-{clip.batch.keys[0]}.mp4")  # keys may recur in another shard folder
        write_mp4(paths[-1], each, fps=clip.annotation.fps, waveform=clip.waveform, rate_hz=clip.rate_hz)
    sheet = folder / "contact_sheet.png"
    contact_sheet(
        sheet,
        frames,
        waveforms=[clip.waveform for clip in clips],
        rate_hz=clips[0].rate_hz,
        labels=[f"{clip.batch.keys[0]}: {clip.annotation.caption}" for clip in clips],
    )
    return [*paths, sheet]


def measure_lip_sync(
    module: AVModule,
    clips: Sequence[HeldoutClip],
    *,
    codec: VideoCodec,
    settings: SampleConfig,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Lip sync of generated clips with their own and with other clips' speech, on the embedded corpus.

    The first latent frame is given, so that the true clip's mouth boxes say where the mouths are; it is left out of
    the measurement. Every speaking person counts once. Empty where fewer than two speak.
    """
    clips = [clip for clip in clips if clip.annotation.truth.get("speech_envelope")]
    if not clips:
        return {}
    videos = sample_videos(
        module, clips, codec=codec, settings=settings, seed=seed, gives_first_frame=True, on_step=on_step
    )
    apertures, envelopes = [], []
    for clip, each in zip(clips, videos, strict=True):
        speech = clip.annotation.truth["speech_envelope"]
        assert isinstance(speech, list)
        for person, envelope in enumerate(speech):
            boxes = [frame[person] for frame in clip.annotation.mouth_boxes]
            aperture = mouth_aperture(each[None], torch.tensor(boxes, dtype=torch.float32)[None])[0]
            apertures.append(aperture[1:].numpy())
            envelopes.append(np.array(envelope[1:]))
    if len(apertures) < 2:
        return {}
    own, shuffled = lip_sync(np.stack(apertures), np.stack(envelopes))
    return {"val/lip_sync": own, "val/lip_sync_shuffled": shuffled}
