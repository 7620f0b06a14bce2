"""What a finished run of a paper's table is worth: its own last metrics, and those of clips sampled for held-out ones.

The lip sync, words and picture are those of the same clips: the true first frame is given, so that places and looks
are the true clip's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch

from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
from avlit.commands.clips import SampledClip, clips_that_speak, lip_sync_of, sample_clips
from avlit.commands.generation import load_trained, run_config
from avlit.commands.sample import newest_checkpoint
from avlit.metrics.picture import psnr
from avlit.metrics.word_judge import RATE_HZ, WordJudge
from avlit.mouth_mask import mouth_mask
from avlit.runs import Run
from avlit.sound import resample
from avlit.timing import Timing
from data.datamodule import HeldoutClip
from data.encode import Encoders

SAMPLED = ("lip_sync", "lip_sync_shuffled", "words", "words_shuffled", "picture_psnr")
"""What `measure_run` adds to what the run logged itself."""


def measure_run(
    run: Run, *, judge: Callable[[], WordJudge], num_clips: int, on_step: Callable[[], None] | None = None
) -> dict[str, float]:
    """The run's last metrics and, on the embedded corpus, those of SAMPLED that its codecs allow.

    judge: asked for where there is sound to hear. num_clips: held-out clips, of which those with one speaker count.
    """
    config = run_config(run, [f"runs_dir={run.path.parent}"])
    metrics = json.loads(run.metrics_path.read_text(encoding="utf-8")) if run.metrics_path.exists() else {}
    module, encoders = load_trained(config, newest_checkpoint(run, config)), build_encoders(config)
    clips = build_datamodule(config, shard_roots(config), encoders).heldout_samples(num_clips)
    clips = clips_that_speak(clips, makes_sound=encoders.audio is not None)
    if len(clips) < 2:
        return metrics
    has_video = encoders.video is not None
    made = sample_clips(
        module,
        clips,
        encoders=encoders,
        settings=config.sample,
        seed=config.seed,
        gives_first_frame=has_video,
        on_step=on_step,
    )
    if has_video:
        measured = lip_sync_of(clips, made)
        metrics |= {name.removeprefix("val/"): value for name, value in measured.items()}
        metrics["picture_psnr"] = picture_psnr(clips, made, encoders=encoders)
    if encoders.audio is not None:
        sounds = [resample(each.waveform, each.rate_hz, RATE_HZ) for each in made]
        own, shuffled = judge().score(sounds, [clip.annotation.transcript for clip in clips])
        metrics |= {"words": own, "words_shuffled": shuffled}
    return metrics


@torch.no_grad()
def picture_psnr(clips: Sequence[HeldoutClip], sampled: Sequence[SampledClip], *, encoders: Encoders) -> float:
    """Mean PSNR in dB to the true clips as the codec returns them, outside mouth boxes, without the first frame."""
    assert encoders.video is not None
    found = []
    for clip, made in zip(clips, sampled, strict=True):
        about = clip.annotation
        assert made.video is not None and clip.batch.video_latents is not None
        truth = encoders.video.decode(clip.batch.video_latents.float())[0].clamp(-1, 1).cpu()
        pixels = Timing(
            fps=about.fps,
            num_frames=about.num_frames,
            height=about.height,
            width=about.width,
            rate_hz=about.rate_hz,
            temporal_factor=1,
            spatial_factor=1,
        )
        counted = ~mouth_mask(about.mouth_boxes, timing=pixels, sample=clip.batch.keys[0])
        counted[0] = False
        found.append(psnr(made.video, truth, counted=counted))
    return sum(found) / len(found)
