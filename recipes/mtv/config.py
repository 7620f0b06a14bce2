"""MTV's keys and the values that the paper and its code publish; torch-free, so that configs print at once.

"MTV" below is the paper (arXiv 2506.08003), "code" its published training code, "chosen" what neither gives.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from avlit.adapter_config import ATTENTION
from avlit.config import (
    AdapterPart,
    CodecConfig,
    Config,
    EmaConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
    setting,
)
from avlit.models.sizes import MSTControlNetConfig


@dataclass
class MTVModel(MSTControlNetConfig, ModelConfig):
    """The MST-ControlNet's sizes, released weights, and what trains."""

    trainable: Literal["paper", "control", "all"] = setting(
        "paper", "paper: control and backbone attention (MTV, 4.3); control: backbone frozen (W/o TB); all"
    )


@dataclass
class MTVCodecs(CodecConfig):
    """What MTV reads: video that three tracks drive; their sound is the clip's, so none is generated."""

    video: Literal["embedded", "cogvideox", "wan2.1"] = setting("embedded", "video codec; embedded needs no weights")
    audio: Literal["none"] = setting("none", "MTV generates no sound", fixed=True)
    tracks: Literal["embedded", "wav2vec2"] = setting("embedded", "encoder of the audio tracks")


@dataclass
class DropoutConfig:
    """Shares of clips that lose a condition, which guidance later contrasts with."""

    text: float = setting(0.1, "share of clips without text (code)", low=0, high=1)
    tracks: float = setting(0.05, "share of clips without any audio track (code)", low=0, high=1)


@dataclass
class KeyframeConfig:
    """Shares of clips that are given some of their latent frames clean (code); the rest is given none."""

    image_head: float = setting(0.22, "the first frame", low=0, high=1)
    image_tail: float = setting(0.005, "the last frame", low=0, high=1)
    image_head_tail: float = setting(0.005, "the first and the last frame", low=0, high=1)
    random: float = setting(0.01, "a random half of the frames", low=0, high=1)
    interpolate: float = setting(0.002, "every other frame", low=0, high=1)
    quarter_random: float = setting(0.002, "a random quarter of the frames", low=0, high=1)
    quarter_head: float = setting(0.002, "the first quarter", low=0, high=1)
    quarter_tail: float = setting(0.002, "the last quarter", low=0, high=1)
    quarter_head_tail: float = setting(0.002, "the first and the last quarter", low=0, high=1)

    def check(self) -> None:
        """Raise ValueError where the shares exceed the clips."""
        total = sum(getattr(self, each.name) for each in fields(self))
        if total > 1:
            raise ValueError(f"keyframes: the shares add up to {total:g}; they must not exceed 1")


def _optimizer() -> OptimizerConfig:
    """MTV, Section 4.3: learning rate; the rest from the code."""
    return OptimizerConfig(
        lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4, clip=0.1, schedule="linear", warmup=0.01, final=0.1
    )


def _train() -> TrainConfig:
    """MTV, Section 4.3: 40K steps a stage; bf16 from the code."""
    return TrainConfig(steps=40_000)


def _sample() -> SampleConfig:
    """The code: SDE-DPM++ 2M, 50 steps, constant guidance 3.5."""
    return SampleConfig(steps=50, guidance=3.5, scheduler="CogVideoXDPMScheduler")


@dataclass
class MTVConfig(Config):
    """A stage of MTV. Clips of 49 frames, 480x720, 24 a second, 24 in a batch (MTV, Section 4.3) are the core's own."""

    codecs: MTVCodecs = field(default_factory=MTVCodecs)
    model: MTVModel = field(default_factory=MTVModel)
    optimizer: OptimizerConfig = field(default_factory=_optimizer)
    train: TrainConfig = field(default_factory=_train)
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.9999))  # chosen
    sample: SampleConfig = field(default_factory=_sample)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    keyframes: KeyframeConfig = field(default_factory=KeyframeConfig)
    flow_shift: float = setting(
        5.0, "shift of Wan's noise levels (chosen: Wan's own)", above=0, only_with=("model.variant", "wan")
    )
    snr_shift: float = setting(
        1.0, "shift of CogVideoX's noise schedule: 1 is 5B, 3 is 2B", above=0, not_with=("model.variant", "wan")
    )

    @property
    def adapter_parts(self) -> dict[str, AdapterPart]:
        """The backbone's attention, and that of the ControlNet.

        At `tiny` all layers: what that model lacks for photographs is in every one, for it has seen drawings alone.
        """
        video, control = ATTENTION, ("to_q", "to_kv", "to_qkv", "to_out")
        if self.size == "tiny":
            video = (*video, "net.0.proj", "net.2", "linear", "text_proj", "proj_out")
            control = (*control, "style", "mlp.0", "mlp.2")
        return {
            "video": AdapterPart(modules=(r"backbone\.",), targets=video),
            "controlnet": AdapterPart(modules=(r"injections\.", r"control\."), targets=control),
        }

    @property
    def own_modules(self) -> tuple[str, ...]:
        """The MST-ControlNet."""
        return ("control.", "injections.")

    @property
    def accepts(self) -> tuple[str, ...]:
        """Prompts in turn, the tracks that drive the video, and pictures at any frame."""
        return ("prompt", "prompt.SECONDS", "speech", "speech_second", "effects", "music", "image.FRAME")

    def check(self) -> None:
        """Raise ValueError where the sampler does not fit what the backbone predicts."""
        super().check()
        if self.model.variant == "wan" and self.sample.scheduler.startswith(("CogVideoX", "DDIM", "DDPM")):
            raise ValueError(
                f"sample.scheduler={self.sample.scheduler}: model.variant=wan predicts the velocity of a flow; "
                "use sample.scheduler=UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler"
            )
