"""UniTalking's keys and the values that the paper publishes; torch-free, so that configs print at once.

"UniTalking" below is the paper (arXiv 2603.01418), "Ovi" the model whose settings it follows (arXiv 2510.01284),
"chosen" what neither gives.
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
from avlit.models.sizes import TwinWanConfig
from avlit.turns import turn_block

WITHOUT_REFERENCE = {"tr2a": "t2a", "tr2av": "t2av"}
"""What a clip without a reference is trained to do instead."""

SOUND_TASKS = ("t2a", "tr2a")
VIDEO_TASKS = ("t2av", "tv2a", "ti2av", "tr2av")


@dataclass
class UniTalkingCodecs(CodecConfig):
    """What UniTalking reads: sound, and in its second stage the video that goes with it."""

    video: Literal["none", "embedded", "wan2.2"] = setting("embedded", "video codec; none trains on sound alone")
    audio: Literal["embedded", "mmaudio"] = setting("embedded", "codec of the sound that is generated")
    tracks: Literal["none"] = setting("none", "UniTalking is driven by no tracks", fixed=True)


@dataclass
class UniTalkingModel(TwinWanConfig, ModelConfig):
    """The twins' sizes, released weights of the video twin, and what trains."""

    trainable: Literal["audio", "all"] = setting(
        "all", "audio: the audio twin without its text and time embedders (UniTalking, 4.5); all: both twins"
    )


@dataclass
class TaskConfig:
    """Weights of the tasks that clips take turns with, in exact long-run proportions (UniTalking, 4.5; chosen)."""

    t2a: float = setting(0.0, "text to speech", low=0)
    tr2a: float = setting(0.0, "text to speech in the voice of a reference", low=0)
    t2av: float = setting(0.4, "text to video and sound", low=0)
    tv2a: float = setting(0.2, "text and video to sound; the video attends to no sound", low=0)
    ti2av: float = setting(0.2, "text and first frame to video and sound", low=0)
    tr2av: float = setting(0.2, "text to video and sound in the voice of a reference", low=0)

    @property
    def weights(self) -> dict[str, float]:
        """The tasks that are trained, with their weights."""
        return {name: weight for name, weight in asdict(self).items() if weight}


@dataclass
class DropoutConfig:
    """Shares of clips that lose a condition which their task has; guidance contrasts with that (chosen: 0.1 each)."""

    text: float = setting(0.1, "share of clips without text", low=0, high=1)
    image: float = setting(
        0.1,
        "share of the clips of ti2av whose first frame is not given",
        low=0,
        high=1,
        not_with=("tasks.ti2av", 0.0),
    )
    reference: float = setting(0.1, "share of the clips of tr2a and tr2av without the reference", low=0, high=1)


@dataclass
class UniTalkingSample(SampleConfig):
    """UniPC with 50 steps (UniTalking, 5.1); guidance 4 for video and 3 for sound (Ovi)."""

    scheduler: str = setting("UniPCMultistepScheduler", "class of diffusers' schedulers")
    guidance: float = setting(
        4.0, "classifier-free guidance of the video; 1 is none", low=0, not_with=("codecs.video", "none")
    )
    audio_guidance: float = setting(3.0, "classifier-free guidance of the sound; 1 is none", low=0)
    reference_guidance: float | None = setting(
        None, "guidance of the sound by the reference alone, beside the text's; null contrasts both together", low=0
    )


def _data() -> DataConfig:
    """121 frames of 704x1280 at 24 a second, as Wan2.2-TI2V-5B; batch of stage 2 (UniTalking, 5.1); peak chosen."""
    return DataConfig(num_frames=121, height=704, width=1280, fps=24.0, rate_hz=44100, peak=0.7, batch_size=64)


def _optimizer() -> OptimizerConfig:
    """AdamW (UniTalking, 5.1); the numbers are lost in the paper's text: chosen, the learning rate as JoVA's."""
    return OptimizerConfig(lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01, clip=1.0, schedule="constant", warmup=0.01)


def _train() -> TrainConfig:
    """100K steps a stage (UniTalking, 5.1); bf16."""
    return TrainConfig(steps=100_000)


@dataclass
class UniTalkingConfig(Config):
    """A stage of UniTalking; the defaults are those of the second."""

    data: DataConfig = field(default_factory=_data)
    codecs: UniTalkingCodecs = field(default_factory=UniTalkingCodecs)
    model: UniTalkingModel = field(default_factory=UniTalkingModel)
    optimizer: OptimizerConfig = field(default_factory=_optimizer)
    train: TrainConfig = field(default_factory=_train)
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.9999))  # chosen
    sample: UniTalkingSample = field(default_factory=UniTalkingSample)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    flow_shift: float = setting(5.0, "shift of the noise levels, in training and sampling (Wan)", above=0)

    @property
    def adapter_parts(self) -> dict[str, AdapterPart]:
        """The attention of each twin, its reading of a reference voice included; of sound alone the audio twin's."""
        parts = {"audio": AdapterPart(modules=(r"audio\.", r"audio_references\."))}
        if self.codecs.video == "none":
            return parts
        return {"video": AdapterPart(modules=(r"backbone\.", r"video_references\.")), **parts}

    @property
    def own_modules(self) -> tuple[str, ...]:
        """The audio twin, and how references are read: Wan has neither."""
        return ("audio.", "audio_references.", "video_references.", "reference_embedding.")

    @property
    def reads(self) -> Reads:
        """One of the three caption styles (UniTalking, 3.1), or what is heard alone; a reference sound."""
        styles = ("speech",) if self.codecs.video == "none" else ("detailed", "short", "fused")
        return Reads(captions=styles, reference_tokens=self.model.max_reference_tokens)

    @property
    def accepts(self) -> tuple[str, ...]:
        """A prompt, and what the tasks that are trained give: a voice, the first frame, the video (UniTalking, 4.5)."""
        words = {"tr2a": "reference", "tr2av": "reference", "ti2av": "image.0", "tv2a": "video"}
        return ("prompt", *dict.fromkeys(word for task, word in words.items() if task in self.tasks.weights))

    def check(self) -> None:
        """Raise ValueError where the tasks do not fit what is read."""
        super().check()
        tasks = self.tasks.weights
        fitting = SOUND_TASKS if self.codecs.video == "none" else VIDEO_TASKS
        for name in tasks:
            if name not in fitting:
                raise ValueError(
                    f"tasks.{name}={tasks[name]:g}: with codecs.video={self.codecs.video} the tasks are "
                    f"{', '.join(fitting)}; set it to 0"
                )
        if not tasks:
            raise ValueError(f"tasks: every weight is 0; give at least one of {', '.join(fitting)} a weight")
        try:
            turn_block(tasks)
        except ValueError as error:
            raise ValueError(f"tasks: {error}") from error
        if not tasks.keys() & WITHOUT_REFERENCE.keys():
            for key, value, default in (
                ("dropout.reference", self.dropout.reference, DropoutConfig.reference),
                ("sample.reference_guidance", self.sample.reference_guidance, UniTalkingSample.reference_guidance),
            ):
                if value != default:
                    raise ValueError(
                        f"{key}={value:g}: has no effect while no task with a reference has a weight; leave it out, or "
                        "give tasks.tr2a or tasks.tr2av one"
                    )
        if self.codecs.video == "none" and self.model.trainable == "all":
            raise ValueError(
                "model.trainable=all: with codecs.video=none the video twin sees no clip; use model.trainable=audio"
            )
