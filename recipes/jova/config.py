"""JoVA's keys and the values that the paper publishes; torch-free, so that configs print at once.

"JoVA" below is the paper (arXiv 2512.13677), "Waver" the model that it starts from (arXiv 2508.15761), "chosen" what
neither gives.
"""

from dataclasses import dataclass, field
from typing import Literal

from avlit.adapter_config import ATTENTION
from avlit.config import (
    AdapterPart,
    CodecConfig,
    Config,
    DataConfig,
    EmaConfig,
    ModelConfig,
    OptimizerConfig,
    Reads,
    SampleConfig,
    TrainConfig,
    setting,
)
from avlit.models.sizes import TwinMMDiTConfig


@dataclass
class JoVACodecs(CodecConfig):
    """What JoVA reads; a branch is trained alone where the other's codec is none."""

    video: Literal["none", "embedded", "wan2.1"] = setting("embedded", "video codec; none trains the audio branch")
    audio: Literal["none", "embedded", "mmaudio"] = setting("embedded", "audio codec; none trains the video branch")
    tracks: Literal["none"] = setting("none", "JoVA is driven by no tracks", fixed=True)
    text: Literal["embedded", "t5"] = setting("embedded", "text encoder (JoVA, 3.1: T5-XXL, and Qwen2.5 beside it)")


@dataclass
class JoVAModel(TwinMMDiTConfig, ModelConfig):
    """The branches' sizes, released weights of both, and what trains."""

    trainable: Literal["video", "audio", "all"] = setting("all", "a branch alone (JoVA, 4.2, first stage), or all")
    duplicate_video: bool = setting(
        False, "start the audio branch as a copy of the video branch, but for its ends (JoVA, 3.2.1)"
    )


@dataclass
class DropoutConfig:
    """Shares of clips that lose a condition; guidance contrasts with that."""

    text: float = setting(0.1, "share of clips without the texts of both branches (chosen)", low=0, high=1)


@dataclass
class JoVASample(SampleConfig):
    """Guidance 10 for both modalities (JoVA, 4.2); sampler and shift chosen, as HunyuanVideo and Waver use them."""

    scheduler: str = setting("FlowMatchEulerDiscreteScheduler", "class of diffusers' schedulers")
    guidance: float = setting(
        10.0, "classifier-free guidance of the video; 1 is none", low=0, not_with=("codecs.video", "none")
    )
    audio_guidance: float = setting(
        10.0, "classifier-free guidance of the sound; 1 is none", low=0, not_with=("codecs.audio", "none")
    )
    flow_shift: float = setting(3.0, "shift of the sampler's noise levels: 3 at 480p, 7 at 720p (Waver)", above=0)


def _data() -> DataConfig:
    """Five seconds of 480x832 at 24 a second (chosen); batch of the joint stage (JoVA, 4.2); peak chosen."""
    return DataConfig(num_frames=121, height=480, width=832, fps=24.0, rate_hz=44100, peak=0.7, batch_size=32)


def _optimizer() -> OptimizerConfig:
    """A fixed learning rate, 5e-5 in the joint stage (JoVA, 4.2); the rest chosen."""
    return OptimizerConfig(lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01, clip=1.0, schedule="constant", warmup=0.0)


def _train() -> TrainConfig:
    """50K steps of the joint stage (JoVA, 4.2); bf16 chosen."""
    return TrainConfig(steps=50_000)


@dataclass
class JoVAConfig(Config):
    """A stage of JoVA; the defaults are those of the joint one."""

    data: DataConfig = field(default_factory=_data)
    codecs: JoVACodecs = field(default_factory=JoVACodecs)
    model: JoVAModel = field(default_factory=JoVAModel)
    optimizer: OptimizerConfig = field(default_factory=_optimizer)
    train: TrainConfig = field(default_factory=_train)
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.9999))  # chosen
    sample: JoVASample = field(default_factory=JoVASample)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    mouth_weight: float | None = setting(
        5.0,
        "lambda, the factor of the mouth loss (JoVA, Eq. 6, Table 3); 0 measures it only, null reads no mouth boxes",
        low=0,
    )
    image_share: float = setting(
        0.2, "share of clips whose first frame is given as reference image (Waver)", low=0, high=1
    )
    flow_shift: float = setting(1.0, "shift of the noise levels in training; 1 is t ~ U[0, 1] (JoVA, 3.1)", above=0)

    @property
    def is_joint(self) -> bool:
        """Whether both branches are trained together."""
        return "none" not in (self.codecs.video, self.codecs.audio)

    @property
    def adapter_parts(self) -> dict[str, AdapterPart]:
        """The attention of each branch that is there, over latents and over text."""
        targets = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        parts = {
            "video": AdapterPart(modules=(r"backbone\.(transformer|single_transformer)_blocks\.",), targets=targets),
            "audio": AdapterPart(modules=(r"audio\.(transformer|single_transformer)_blocks\.",), targets=targets),
        }
        return {name: part for name, part in parts.items() if getattr(self.codecs, name) != "none"}

    @property
    def own_modules(self) -> tuple[str, ...]:
        """What is new in JoVA: the audio branch's ends, and the linear layers of fusion "cross_linear"."""
        return ("audio.x_embedder.", "audio.proj_out.", "video_adapters.", "audio_adapters.")

    @property
    def reads(self) -> Reads:
        """What is seen for the video branch, what is heard and said for the audio branch; mouths (JoVA, 3.3)."""
        if not self.is_joint:
            return Reads(captions=("speech",) if self.codecs.video == "none" else ("video",))
        return Reads(captions=("video",), audio_captions=("speech",), mouths=self.mouth_weight is not None)

    @property
    def accepts(self) -> tuple[str, ...]:
        """A prompt for each branch, and a reference image where clips were trained with one."""
        words = ["prompt"]
        if self.is_joint:
            words.append("audio_prompt")
        if self.codecs.video != "none" and self.image_share:
            words.append("image.0")
        return tuple(words)

    def check(self) -> None:
        """Raise ValueError where the branches that are trained and the codecs do not fit."""
        if self.codecs.video == self.codecs.audio == "none":
            raise ValueError("codecs.video=none: codecs.audio is none, too; one of the two must make latents")
        super().check()
        self.model.check()
        wanted = "audio" if self.codecs.video == "none" else "video" if self.codecs.audio == "none" else "all"
        if not self.is_joint and self.model.trainable != wanted:
            raise ValueError(
                f"model.trainable={self.model.trainable}: with codecs.video={self.codecs.video} and "
                f"codecs.audio={self.codecs.audio} only the {wanted} branch sees a clip; use model.trainable={wanted}"
            )
        if self.is_joint and self.model.fusion == "cross_linear" and self.model.trainable != "all":
            raise ValueError(
                f"model.trainable={self.model.trainable}: with model.fusion=cross_linear the branches meet through "
                "linear layers of neither, which start at zero; use model.trainable=all"
            )
        if self.model.duplicate_video and self.model.trainable != "audio":
            raise ValueError(
                f"model.duplicate_video=true: the audio branch starts as a copy where it is trained alone, and here "
                f"model.trainable={self.model.trainable}; leave it out"
            )
        if self.sample.sync_clips and not (self.is_joint and self.image_share):
            reason = "image_share=0: no reference image was trained" if self.is_joint else "a branch alone has no pair"
            raise ValueError(
                f"sample.sync_clips={self.sample.sync_clips}: lip sync is that of a picture and its sound, whose first "
                f"frame is given, and {reason}; set sample.sync_clips=0"
            )
        if self.mouth_weight is not None and not self.is_joint:
            raise ValueError(
                f"mouth_weight={self.mouth_weight:g}: is for the joint stage (JoVA, Eq. 6), and "
                f"codecs.{'video' if self.codecs.video == 'none' else 'audio'} is none; set it to null"
            )
        if self.image_share and (self.codecs.video == "none" or not self.model.image_channels):
            reason = "codecs.video is none" if self.codecs.video == "none" else "model.image_channels is 0"
            raise ValueError(f"image_share={self.image_share:g}: no reference image is read, as {reason}; set it to 0")
