"""The configuration: its schema as dataclasses, and how one comes from files and the command line.

Layers, later ones win: this schema with the recipe's own (`recipes/*/config.py`), the recipe's yaml, the size, words.
Nothing here imports torch, so that help, listings and printed configs answer at once.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from avlit.adapter_config import AdapterConfig, AdapterPart
from avlit.config_sections import (
    CheckpointConfig,
    CodecConfig,
    DataConfig,
    EmaConfig,
    ModelConfig,
    OptimizerConfig,
    Reads,
    SampleConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
)
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
from avlit.timing import Timing

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
