"""The sections of a configuration, each a dataclass whose fields say what they mean and what they may be.

`avlit.config` joins them, recipes add their own. Nothing here imports torch.
"""

import re
from dataclasses import dataclass, fields
from typing import Literal

from avlit.settings import setting
from avlit.timing import VIDEO_FACTORS, Timing

UNWEIGHTED = ("none", "embedded")
"""Codecs that read no folder of weights."""


@dataclass(frozen=True)
class Reads:
    """What of a sample a recipe's step reads besides the latents and features of the codecs that it names.

    captions: styles of caption, one of which is drawn for each clip and step; a clip that has none of them gives the
    caption that every clip has. audio_captions: the same for the audio branch, where it has a text of its own.
    reference_tokens: most latents of the reference sound, 0 for none; own_reference: `just prepare` cuts it from the
    clip's own file, where the clip is not. mouths: where the clip shows mouths. controls: reference_image, depth and
    pose, any of them, as latents of the video codec.
    """

    captions: tuple[str, ...] = ("caption",)
    audio_captions: tuple[str, ...] = ()
    reference_tokens: int = 0
    own_reference: bool = False
    mouths: bool = False
    controls: tuple[str, ...] = ()


@dataclass
class DataConfig:
    """Where clips come from and what they look like."""

    root: str | None = setting(
        None, "folder of shards, or several (of other sizes, say) with commas; null is the embedded corpus"
    )
    subsets: dict[str, float] = setting(
        factory=dict, about="weight of each subset in the mix; empty mixes all by their number of clips", low=0
    )
    batch_size: int = setting(24, "clips of one optimizer step, over all devices and accumulated micro-batches", low=1)
    buckets: dict[str, int] = setting(
        factory=dict,
        about="shape FRAMESxHEIGHTxWIDTH, or length in ms -> its own batch size; shapes not named take batch_size",
        low=1,
    )
    num_frames: int = setting(49, "frames of a clip, 4n+1", low=1)
    height: int = setting(480, "pixels, a multiple of 8", low=8)
    width: int = setting(720, "pixels, a multiple of 8", low=8)
    fps: float = setting(24.0, "video frames a second", above=0)
    rate_hz: int = setting(16000, "audio samples a second", low=1000)
    peak: float | None = setting(
        None,
        "loudest sample that `just prepare` brings every sound to, of 1; null leaves it as recorded. Recordings that "
        "differ in level are learnt unevenly. The embedded corpus keeps its own levels",
        above=0,
        high=1,
        not_with=("data.root", None),
    )
    num_clips: int = setting(1024, "training clips of each subset", low=1, only_with=("data.root", None))
    cache_dir: str = setting("cache", "folder for the encoded embedded corpus", only_with=("data.root", None))
    workers: int = setting(0, "reading processes; 0 is one thread, which is fastest for encoded clips", low=0)
    prefetch: int = setting(4, "batches read ahead", low=1)
    max_bad: float = setting(0.001, "share of unreadable clips at which training stops", low=0, high=1)
    timeout_s: float = setting(300.0, "seconds without a batch after which a read is taken to hang", above=0)
    max_restarts: int = setting(
        3, "times that reading processes are started again when they die or hang", low=0, not_with=("data.workers", 0)
    )

    def check(self) -> None:
        """Raise ValueError for what a type cannot say."""
        for shape in self.buckets:
            if not re.fullmatch(r"\d+x\d+x\d+|\d+ms", shape):
                raise ValueError(
                    f"data.buckets.{shape}: a shape is FRAMESxHEIGHTxWIDTH, for example 49x480x720, or the length of "
                    "sound without picture, for example 640ms"
                )
        if self.subsets and not any(self.subsets.values()):
            raise ValueError("data.subsets: every weight is 0; give at least one subset a weight")

    def timing(self, codec: str) -> Timing:
        """The configured clip's arithmetic with a video codec; ValueError where its sizes do not fit the codec."""
        try:
            return self._timing(codec, self.num_frames, self.height, self.width)
        except ValueError as error:
            raise ValueError(f"data.{error}") from error

    def check_sizes(self, codec: str) -> None:
        """Raise ValueError where a size does not fit a video codec."""
        self.timing(codec)
        for shape in self.buckets:
            if "x" in shape:
                try:
                    self._timing(codec, *map(int, shape.split("x")))
                except ValueError as error:
                    raise ValueError(f"data.buckets: {error}") from error

    def _timing(self, codec: str, num_frames: int, height: int, width: int) -> Timing:
        temporal, spatial = VIDEO_FACTORS[codec]
        return Timing(
            fps=self.fps,
            num_frames=num_frames,
            height=height,
            width=width,
            rate_hz=self.rate_hz,
            temporal_factor=temporal,
            spatial_factor=spatial,
        )


@dataclass
class CodecConfig:
    """What turns pixels, sound and text into latents and features; a recipe leaves out what it does not read."""

    video: Literal["none", "embedded", "cogvideox", "wan2.1", "wan2.2", "ltx2"] = setting(
        "none", "video codec; embedded needs no weights"
    )
    audio: Literal["none", "embedded", "mmaudio", "ltx2"] = setting("none", "codec of the sound that is generated")
    tracks: Literal["none", "embedded", "wav2vec2"] = setting("none", "encoder of the audio tracks that drive video")
    text: Literal["embedded", "t5", "umt5", "gemma"] = setting("embedded", "text encoder")
    video_weights: str | None = setting(None, "folder of the video codec", not_with=("codecs.video", UNWEIGHTED))
    audio_weights: str | None = setting(None, "folder of the audio codec", not_with=("codecs.audio", UNWEIGHTED))
    tracks_weights: str | None = setting(None, "folder of the track encoder", not_with=("codecs.tracks", UNWEIGHTED))
    text_weights: str | None = setting(None, "folder of the text encoder", not_with=("codecs.text", UNWEIGHTED))


@dataclass
class ModelConfig:
    """What every recipe's model section has; a recipe adds its network's sizes."""

    weights: str | None = setting(None, "folder of released weights to start from; null starts from scratch")


@dataclass
class OptimizerConfig:
    """The update rule and its schedule."""

    name: Literal["adamw"] = setting("adamw", "update rule")
    lr: float = setting(1e-4, "peak learning rate", above=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "decay of the two moments", low=0, high=0.999999)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", low=0)
    clip: float = setting(1.0, "gradient norm above which gradients are scaled down", above=0)
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "learning rate after the warm-up")
    warmup: float = setting(0.0, "share of the steps over which the learning rate rises", low=0, high=1)
    final: float = setting(
        0.0, "last learning rate as a share of the peak", low=0, high=1, not_with=("optimizer.schedule", "constant")
    )
    states: Literal["fp32", "8bit"] = setting(
        "fp32", "moments of large tensors: 8bit takes a quarter of the memory (torchao, `pip install avlit[states]`)"
    )


@dataclass
class StrategyConfig:
    """How devices share a run, and what is done to make it fit; docs/strategies.md says what goes with what."""

    name: Literal["auto", "ddp", "fsdp2"] = setting(
        "auto", "ddp: a copy on each device; fsdp2: sharded; auto: fsdp2 on several GPUs, ddp on several CPU processes"
    )
    shard: Literal["full", "grads", "node"] = setting(
        "full",
        "what of fsdp2 is sharded: full, also the weights; grads, gradients and moments alone, weights once a step "
        "(faster, more memory); node, as full but within a node, with a copy on each node",
        not_with=("strategy.name", "ddp"),
    )
    activation_checkpointing: Literal["none", "blocks", "selective"] = setting(
        "blocks",
        "activations computed again in the backward pass: blocks, all within a block; selective, all but the results "
        "of attention and of every second matrix product",
    )
    cpu_offload: bool = setting(
        False,
        "keep shards, gradients and moments in the host's memory (GPUs, fsdp2)",
        not_with=("strategy.name", "ddp"),
    )


@dataclass
class TrainConfig:
    """Length and machinery of a run."""

    steps: int = setting(1000, "optimizer steps", low=1)
    accumulate: int = setting(1, "micro-batches of one optimizer step", low=1)
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", "where to train")
    devices: int = setting(1, "GPUs, or processes on a CPU", low=1)
    threads: int = setting(0, "CPU threads; 0 is all cores", low=0)
    log_every: int = setting(10, "optimizer steps between log points", low=1)
    max_nonfinite: int = setting(10, "updates left out in a row, as not finite, at which training stops", low=1)
    on_nonfinite: Literal["stop", "roll_back"] = setting(
        "stop", "then: stop, or roll_back to the last checkpoint before them and go on with the next clips"
    )
    max_roll_backs: int = setting(
        3, "times that a run is rolled back before it stops", low=1, not_with=("train.on_nonfinite", "stop")
    )


@dataclass
class EmaConfig:
    """The moving average of the weights."""

    decay: float = setting(0.0, "share of the average that one update keeps; 0 is off", low=0, high=0.999999)
    every: int = setting(1, "optimizer steps between updates of the average", low=1, not_with=("ema.decay", 0.0))


@dataclass
class CheckpointConfig:
    """What a run leaves on disk."""

    every: int = setting(500, "optimizer steps between checkpoints; there is always one at the end", low=1)
    keep: int = setting(2, "newest checkpoints that are kept", low=1)
    keep_every: int = setting(0, "also keep those whose step is a multiple of this; 0 is none", low=0)
    best: str | None = setting(
        None, "also keep the one with the lowest value of this held-out metric, for example val/loss/video"
    )


@dataclass
class SampleConfig:
    """Sample clips made during training and at its end."""

    every: int = setting(0, "optimizer steps between sample clips; 0 is only at the end", low=0)
    count: int = setting(2, "clips made each time; 0 makes none", low=0)
    sync_clips: int = setting(32, "held-out clips whose lip sync is measured at the end, on the embedded corpus", low=0)
    steps: int = setting(50, "steps of the sampler", low=1)
    guidance: float = setting(1.0, "classifier-free guidance; 1 is none", low=0)
    scheduler: str = setting("DDIMScheduler", "class of diffusers' schedulers")

    @property
    def of_one_clip(self) -> tuple[str, ...]:
        """The keys that say how a clip is sampled; the others say when and how many."""
        return tuple(each.name for each in fields(self) if each.name not in ("every", "count", "sync_clips"))


@dataclass
class ValidationConfig:
    """Loss on held-out clips."""

    every: int = setting(500, "optimizer steps between measurements, besides the first and the last step", low=1)
    clips: int = setting(32, "held-out clips; 0 measures nothing", low=0)


@dataclass
class TrackingConfig:
    """Where a run is recorded."""

    uri: str | None = setting(None, "MLflow store or server; null is a file beside the runs, offline no store")
    experiment: str = setting("avlit", "MLflow experiment")
