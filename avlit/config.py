"""The configuration: its schema as dataclasses, and how one comes from files and the command line.

Layers, later ones win: this schema with the recipe's own (`recipes/*/config.py`), the recipe's yaml, the size, words.
Nothing here imports torch, so that help, listings and printed configs answer at once.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from avlit.adapter_config import AdapterConfig, AdapterPart
from avlit.discovery import (
    RECIPES,
    curriculum_keys,
    listing,
    recipe_folder,
    recipe_keys,
    recipe_module,
    recipe_paths,
    recipe_yaml,
    size_yaml,
)
from avlit.errors import ConfigError
from avlit.settings import Settings, read_words, read_yaml, setting
from avlit.timing import VIDEO_FACTORS, Timing

__all__ = [
    "AdapterConfig",
    "AdapterPart",
    "CheckpointConfig",
    "CodecConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EmaConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Reads",
    "SampleConfig",
    "StrategyConfig",
    "TrackingConfig",
    "TrainConfig",
    "ValidationConfig",
    "curriculum_keys",
    "from_yaml",
    "load_config",
    "recipe_folder",
    "recipe_keys",
    "recipe_module",
    "setting",
    "to_yaml",
]


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


@dataclass
class Config:
    """Everything that a run is made from. A recipe's own Config overrides defaults and adds sections."""

    recipe: str = setting("", "what is trained", fixed=True)
    about: str = setting("", "one line on the recipe", fixed=True)
    order: int = setting(0, "place in the paper's curriculum, from 1; 0 is none", low=0, fixed=True)
    size: str = setting("tiny", "tiny, paper, or another of the recipe's sizes", fixed=True)
    seed: int = setting(0, "of every random number", low=0)
    init: str | None = setting(None, "run or folder whose weights the run starts from")
    run_name: str | None = setting(None, "name of the run; null makes one from recipe and time")
    runs_dir: str = setting("runs", "folder of the runs")
    precision: Literal["bf16", "fp32"] = setting("bf16", "arithmetic of the forward pass; what is trained stays fp32")
    attention: Literal["auto", "sdpa", "flash_attn", "flex"] = setting(
        "auto",
        "what computes attention in the layers: torch's sdpa, flash-attn (a GPU, bf16), torch's flex (a GPU); "
        "auto is flash_attn where it can be imported and used, else sdpa",
    )
    compile: Literal["none", "blocks"] = setting("none", "blocks: compile a layer of each kind, once for all layers")
    data: DataConfig = field(default_factory=DataConfig)
    codecs: CodecConfig = field(default_factory=CodecConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    @property
    def adapter_parts(self) -> dict[str, AdapterPart]:
        """Name -> part of the model that `adapter.modality` may name."""
        return {"model": AdapterPart(modules=("",))}

    @property
    def own_modules(self) -> tuple[str, ...]:
        """Beginnings of the names of what no released model has, the recipe's own: what `adapter=own` trains."""
        return ()

    @property
    def reads(self) -> Reads:
        """What of a sample the recipe's step reads."""
        return Reads()

    @property
    def accepts(self) -> tuple[str, ...]:
        """Words of `just sample` that say what a clip shows or sounds like and that the recipe's sampler can use.

        `image.FRAME` is a picture at any frame, `image.0` at the first alone; `prompt.SECONDS` is for recipes that make
        clips of any length.
        """
        return ("prompt",)

    @property
    def timing(self) -> Timing:
        """Sizes and rates of the configured clip."""
        return self.data.timing(self.codecs.video)

    def check(self) -> None:
        """Raise ValueError where sections do not fit each other."""
        self.data.check_sizes(self.codecs.video)
        if self.data.peak is not None and self.codecs.audio == "none":
            raise ValueError(
                f"data.peak={self.data.peak:g}: this recipe generates no sound (codecs.audio=none); leave it"
            )
        self._check_adapter()
        saves, best = self.checkpoint, self.checkpoint.best
        if best and (not self.validation.clips or saves.every % self.validation.every):
            raise ValueError(
                f"checkpoint.best={best}: needs a measurement wherever a checkpoint is saved; set validation.clips "
                f"above 0 and checkpoint.every={saves.every} to a multiple of validation.every={self.validation.every}"
            )
        if saves.keep_every % saves.every:
            raise ValueError(
                f"checkpoint.keep_every={saves.keep_every}: must be a multiple of checkpoint.every={saves.every}"
            )
        parts = self.train.devices * self.train.accumulate
        sizes = {"data.batch_size": self.data.batch_size}
        sizes |= {f"data.buckets.{shape}": size for shape, size in self.data.buckets.items()}
        for key, size in sizes.items():
            if size % parts:
                per_device = size // self.train.devices
                other = f", or set train.accumulate={per_device}" if not size % self.train.devices else ""
                raise ValueError(
                    f"{key}={size}: must be a multiple of train.devices * train.accumulate = {parts}; "
                    f"the nearest above is {-(-size // parts) * parts}{other}"
                )

    def _check_adapter(self) -> None:
        if not self.adapter.is_on:
            return
        self.adapter.chosen(self.adapter_parts)
        if self.adapter.kind == "own" and not self.own_modules:
            raise ValueError(
                f"adapter=own: recipe={self.recipe} has no modules besides its backbone; take adapter=lora"
            )
        if self.init is None and self.model.weights is None:
            raise ValueError(
                f"adapter={self.adapter.kind}: needs trained weights to stand on; give init=RUN, or released ones as "
                "model.weights=FOLDER"
            )


def load_config(words: Sequence[str], *, root: Path = RECIPES) -> Config:
    """The config that `recipe=… size=… a.b=c …` words describe, as the recipe's own dataclass.

    ConfigError names key, value and what is allowed. root: the folder that holds the recipes.
    """
    given = read_words(words)
    if "recipe" not in given:
        raise ConfigError(f"recipe=… is missing; {listing(recipe_paths(root))}")
    key, size = given.pop("recipe"), given.pop("size", "tiny")
    values, source = recipe_yaml(key, root)
    settings = Settings(_schema(key, root))
    settings.put(values, source)
    for layer, origin in size_yaml(key, size, root):
        settings.put(layer, origin)
    settings.put({"recipe": key, "size": size}, "command line")
    return _finish(settings, given)


def from_yaml(text: str, *, words: Sequence[str] = (), source: str = "config.yaml", root: Path = RECIPES) -> Config:
    """A config that `to_yaml` wrote, with further words over it; recipe and size stay those of the text."""
    values = _moved(read_yaml(text, source))
    given = read_words(words)
    for fixed in ("recipe", "size"):
        if fixed in given and given.pop(fixed) != str(values.get(fixed)):
            raise ConfigError(f"{fixed}: the run was made with {fixed}={values.get(fixed)}, which stays; leave it out")
    settings = Settings(_schema(str(values.get("recipe", "")), root))
    settings.put(values, source)
    return _finish(settings, given)


def _moved(values: dict[str, Any]) -> dict[str, Any]:
    """What a run trained before these keys moved says, under the keys of today."""
    train = values.get("train")
    if isinstance(train, dict):
        for old, new in (("precision", "precision"), ("strategy", "strategy"), ("gradient_checkpointing", None)):
            if old not in train:
                continue
            value = train.pop(old)
            if new is not None:
                values.setdefault(new, value)
            else:
                name = values.get("strategy", "auto")
                values["strategy"] = {"name": name, "activation_checkpointing": "blocks" if value else "none"}
    return values


def to_yaml(config: Config) -> str:
    """Every key with its value, as `from_yaml` reads it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _finish(settings: Settings, words: dict[str, str]) -> Config:
    settings.put_words(words)
    settings.refuse_idle(words)
    return settings.build()


def _schema(key: str, root: Path) -> type[Config]:
    """The one Config class that the recipe's `config.py` defines, or the core's where it has no such file."""
    folder = recipe_folder(key, root)
    if not (folder / "config.py").is_file():
        return Config
    module: Any = importlib.import_module(f"recipes.{folder.name}.config")
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Config) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ConfigError(f"recipe={key}: {folder / 'config.py'} must define one subclass of Config, found {len(own)}")
    return own[0]
