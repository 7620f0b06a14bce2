"""MMControl's keys and the values that the paper publishes; torch-free, so that configs print at once.

"MMControl" below is the paper (arXiv 2604.19679), "LTX-2" the released model and its pipeline (arXiv 2601.03233),
"ltx-trainer" LTX-2's own training code, "chosen" what none of them gives.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

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
from avlit.models.sizes import LTX2Config
from avlit.turns import turn_block

BACKBONE = ("model.trainable", "backbone")
FIRST_STAGE, SECOND_STAGE = ("sample.stages", "first"), ("sample.stages", "second")


@dataclass
class MMControlCodecs(CodecConfig):
    """What MMControl reads: video and sound that belong together, in the latents of its backbone."""

    video: Literal["embedded", "ltx2"] = setting("embedded", "video codec, of clips, references, depth and pose")
    audio: Literal["embedded", "ltx2"] = setting("embedded", "codec of the sound that is generated and of voices")
    tracks: Literal["none"] = setting("none", "MMControl is driven by no tracks", fixed=True)
    text: Literal["embedded", "gemma"] = setting("embedded", "text encoder (LTX-2: Gemma 3, with connectors)")


@dataclass
class MMControlModel(LTX2Config, ModelConfig):
    """The backbone's and the bypass's sizes, released weights of the backbone, and what trains."""

    trainable: Literal["backbone", "bypass"] = setting(
        "bypass", "the backbone without controls, or a bypass beside the frozen one (MMControl, 3.3)", fixed=True
    )


@dataclass
class TaskConfig:
    """Weights of the tasks that clips take turns with, in exact long-run proportions (MMControl, 4.1; uniform: chosen).

    Each has a reference image, besides.
    """

    audio: float = setting(1.0, "reference image and voice", low=0, not_with=BACKBONE)
    depth: float = setting(1.0, "reference image and depth", low=0, not_with=BACKBONE)
    pose: float = setting(1.0, "reference image and pose", low=0, not_with=BACKBONE)

    @property
    def weights(self) -> dict[str, float]:
        """The tasks that are trained, with their weights."""
        return {name: weight for name, weight in asdict(self).items() if weight}


@dataclass
class DropoutConfig:
    """Shares of clips that lose a condition, each on its own (chosen)."""

    text: float = setting(0.1, "share of clips without text; guidance contrasts with that (chosen)", low=0, high=1)
    visual: float = setting(
        0.1, "share of clips without image, depth and pose (MMControl, 4.1)", low=0, high=1, not_with=BACKBONE
    )
    acoustic: float = setting(
        0.1, "share of clips without the voice (MMControl, 4.1)", low=0, high=1, not_with=BACKBONE
    )


@dataclass
class MMControlSample(SampleConfig):
    """40 steps with guidance 3 for video and 7 for sound (LTX-2); both passes are controlled (chosen)."""

    scheduler: str = setting("FlowMatchEulerDiscreteScheduler", "class of diffusers' schedulers", not_with=SECOND_STAGE)
    steps: int = setting(40, "steps of the sampler", low=1, not_with=SECOND_STAGE)
    guidance: float = setting(
        3.0, "classifier-free guidance of the video by the text; 1 is none", low=0, not_with=SECOND_STAGE
    )
    audio_guidance: float = setting(
        7.0, "classifier-free guidance of the sound by the text; 1 is none", low=0, not_with=SECOND_STAGE
    )
    visual_scale: float = setting(
        1.0, "weight of the visual controls' hints, 0 for none (MMControl, Eq. 5)", low=0, not_with=BACKBONE
    )
    acoustic_scale: float = setting(
        1.0, "weight of the acoustic controls' hints, 0 for none (MMControl, Eq. 5)", low=0, not_with=BACKBONE
    )
    stages: Literal["first", "both", "second"] = setting(
        "first",
        "what `just sample` makes of a request: a clip of the run's size; also refined to twice its height and width "
        "(MMControl, 3.4); or a video= of the run's size refined alone",
    )
    upsampler_weights: str | None = setting(
        None, "folder with latent_upsampler/; null is codecs.video_weights", not_with=FIRST_STAGE
    )
    distilled_lora: str | None = setting(
        None, "file of LTX-2's distilled LoRA, for the backbone of the second stage", not_with=FIRST_STAGE
    )
    sync_clips: int = setting(0, "stays 0: lip sync is measured with a first frame given, which this cannot be", low=0)


def _data() -> DataConfig:
    """49 frames (MMControl, 4.1) of 512x768 at 25 a second (chosen); 4 devices of 2 clips, twice (MMControl, 4.1)."""
    return DataConfig(num_frames=49, height=512, width=768, fps=25.0, rate_hz=24000, batch_size=16)


def _optimizer() -> OptimizerConfig:
    """AdamW and cosine (MMControl, 4.1); the peak is lost in the paper's text: chosen, as ltx-trainer; the rest chosen.

    The warm-up is 200 steps of 7,200.
    """
    return OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01, clip=1.0, schedule="cosine", warmup=0.0278)


def _train() -> TrainConfig:
    """7,200 steps (MMControl, 4.1); bf16 as ltx-trainer."""
    return TrainConfig(steps=7200)


@dataclass
class MMControlConfig(Config):
    """A stage of MMControl; the defaults are those of the bypass."""

    data: DataConfig = field(default_factory=_data)
    codecs: MMControlCodecs = field(default_factory=MMControlCodecs)
    model: MMControlModel = field(default_factory=MMControlModel)
    optimizer: OptimizerConfig = field(default_factory=_optimizer)
    train: TrainConfig = field(default_factory=_train)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sample: MMControlSample = field(default_factory=MMControlSample)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    reference_tokens: int = setting(
        50, "latents of the reference voice, 2 s (chosen); 0 reads none", low=0, not_with=BACKBONE
    )

    @property
    def has_controls(self) -> bool:
        """Whether the bypass is there, and with it the controls."""
        return self.model.trainable == "bypass"

    @property
    def adapter_parts(self) -> dict[str, AdapterPart]:
        """The attention of the bypass, which the rest then stays out of, or of the backbone's two streams."""
        block, is_alone = r"backbone\.transformer_blocks\.\d+\.", not self.has_controls
        parts = {
            "video": AdapterPart(modules=(block + r"(attn1|attn2|ff|audio_to_video_attn)\.",), is_default=is_alone),
            "audio": AdapterPart(
                modules=(block + r"(audio_attn1|audio_attn2|audio_ff|video_to_audio_attn)\.",), is_default=is_alone
            ),
        }
        return parts if is_alone else {"bypass": AdapterPart(modules=(r"bypass\.",)), **parts}

    @property
    def own_modules(self) -> tuple[str, ...]:
        """The bypass."""
        return ("bypass.",) if self.has_controls else ()

    @property
    def reads(self) -> Reads:
        """Prompts of what is seen and said (MMControl, 3.1); what the tasks that are trained are controlled by."""
        if not self.has_controls:
            return Reads(captions=("visual_speech",))
        structures = tuple(name for name in ("depth", "pose") if name in self.tasks.weights)
        return Reads(
            captions=("visual_speech",),
            controls=("reference_image", *structures),
            reference_tokens=self.reference_tokens,
            own_reference=self.reference_tokens > 0,
        )

    @property
    def accepts(self) -> tuple[str, ...]:
        """A prompt, what the tasks that are trained are controlled by, and for the second stage what it refines."""
        reads = self.reads
        voice = ("reference",) if reads.reference_tokens else ()
        draft = ("video",) if self.sample.stages == "second" else ()
        return ("prompt", *voice, *reads.controls, *draft)

    def check(self) -> None:
        """Raise ValueError where the tasks do not fit what is read."""
        super().check()
        self.model.check()
        if self.sample.sync_clips:
            raise ValueError(
                f"sample.sync_clips={self.sample.sync_clips}: lip sync is measured with a first frame given, which "
                "MMControl's sampler does not take; set it to 0"
            )
        self._check_stages()
        if not self.has_controls:
            return
        tasks = self.tasks.weights
        if not tasks:
            raise ValueError("tasks: every weight is 0; give at least one of audio, depth, pose a weight")
        try:
            turn_block(tasks)
        except ValueError as error:
            raise ValueError(f"tasks: {error}") from error
        if "audio" not in tasks and self.dropout.acoustic != DropoutConfig.acoustic:
            raise ValueError(
                f"dropout.acoustic={self.dropout.acoustic:g}: has no effect while tasks.audio=0, as no clip has a "
                "voice; leave it out, or give tasks.audio a weight"
            )
        if bool(self.reference_tokens) != ("audio" in tasks):
            raise ValueError(
                f"reference_tokens={self.reference_tokens}: with tasks.audio={self.tasks.audio:g} "
                + ("a voice is read; set it to 1 or more" if "audio" in tasks else "no voice is read; set it to 0")
            )

    def _check_stages(self) -> None:
        sample = self.sample
        if sample.stages == "first":
            return
        if self.codecs.video != "ltx2":
            raise ValueError(
                f"sample.stages={sample.stages}: the second stage enlarges latents of LTX-2's video codec; "
                f"codecs.video={self.codecs.video} has no upsampler; set it to first"
            )
        if sample.distilled_lora is None:
            raise ValueError(
                f"sample.stages={sample.stages}: needs sample.distilled_lora=FILE, such as LTX-2's "
                "ltx-2-19b-distilled-lora-384.safetensors"
            )
