"""What `just prepare` takes: its schema, with rates, sizes and codecs from the recipe that will train on the shards."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from avlit.config import CodecConfig, Reads, load_config
from avlit.settings import Settings, read_words, setting
from avlit.timing import Timing
from data.clip import SUBSETS


@dataclass
class WindowConfig:
    """What every window looks and sounds like; the defaults are the recipe's."""

    fps: float = setting(24.0, "video frames a second", above=0)
    num_frames: int = setting(49, "frames of a window, 4n+1", low=1)
    height: int = setting(480, "pixels, a multiple of 8", low=8)
    width: int = setting(720, "pixels, a multiple of 8", low=8)
    rate_hz: int = setting(16000, "audio samples a second", low=1000)

    @property
    def timing(self) -> Timing:
        """The same, with all the arithmetic."""
        return Timing(
            fps=self.fps, num_frames=self.num_frames, height=self.height, width=self.width, rate_hz=self.rate_hz
        )

    def check(self) -> None:
        """Raise ValueError where sizes do not fit a causal video codec."""
        try:
            _ = self.timing
        except ValueError as error:
            raise ValueError(f"data.{error}") from error


@dataclass
class PrepareConfig:
    """One preparation. `data` and `codecs` must be those of the training run, so they are taken from its recipe."""

    source: str = setting("", "folder of media files, searched with all its subfolders")
    captions: str | None = setting(None, "JSONL file, one record a clip; null reads NAME.json or NAME.txt beside it")
    out: str = setting("", "folder of the shards, new or empty")
    recipe: str = setting("mtv_stage1", "recipe whose rates, sizes and codecs are taken")
    size: Literal["tiny", "paper"] = setting("tiny", "size of that recipe")
    stride: float | None = setting(None, "seconds from one window's start to the next; null is its length", above=0)
    heldout: float = setting(0.1, "share of the clips kept out of training", low=0, high=0.5)
    separator: Literal["auto", "simple", "deepfilter"] = setting(
        "auto", "splits speech from the rest where a clip has no stems; auto takes deepfilter where it is installed"
    )
    subset: str = setting("single_character", "subset of clips whose caption names none and describes nobody")
    shard_samples: int = setting(256, "most samples of one shard", low=1)
    data: WindowConfig = field(default_factory=WindowConfig)
    codecs: CodecConfig = field(default_factory=CodecConfig)

    @property
    def reads(self) -> Reads:
        """What the recipe's step reads of a sample."""
        return load_config([f"recipe={self.recipe}", f"size={self.size}"]).reads

    @property
    def stride_frames(self) -> int:
        """Frames from one window's start to the next."""
        return self.data.num_frames if self.stride is None else round(self.stride * self.data.fps)

    def check(self) -> None:
        """Raise ValueError for what a type cannot say."""
        for key, example in (("source", "source=my_clips"), ("out", "out=shards")):
            if not getattr(self, key):
                raise ValueError(f"{key}=… is missing: name a folder, for example {example}")
        if not Path(self.source).is_dir():
            raise ValueError(f"source={self.source}: no such folder")
        if self.captions is not None and not Path(self.captions).is_file():
            raise ValueError(f"captions={self.captions}: no such file")
        if self.subset not in SUBSETS:
            raise ValueError(f"subset={self.subset}: must be one of {', '.join(SUBSETS)}")
        if self.stride_frames < 1:
            raise ValueError(
                f"stride={self.stride:g}: shorter than a frame; at data.fps={self.data.fps:g} give at least "
                f"{1 / self.data.fps:.3f}"
            )
        check_out(Path(self.out))


def check_out(out: Path) -> None:
    """Raise ValueError unless `out` is absent or an empty folder: shards are never overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out}: is not empty; give a new folder, nothing is overwritten")


def load_prepare_config(words: Sequence[str]) -> PrepareConfig:
    """The config that `source=… out=… a.b=c …` words describe; ConfigError names key, value and what is allowed."""
    given = read_words(words)
    schema = Settings(PrepareConfig)
    schema.put_words(given)  # a wrong word is said before the recipe's own settings are looked at
    recipe = load_config([f"{key}={given.get(key, schema.node[key])}" for key in ("recipe", "size")])
    settings = Settings(PrepareConfig)
    shared = {name: getattr(recipe.data, name) for name in asdict(WindowConfig())}
    settings.put({"data": shared, "codecs": asdict(recipe.codecs)}, recipe.recipe)
    settings.put_words(given)
    settings.refuse_idle(given)
    return settings.build()
