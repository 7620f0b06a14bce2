"""What `just prepare` takes: its schema, with rates, sizes and codecs from the recipe that will train on the shards."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from avlit.config import CodecConfig, Reads, load_config
from avlit.discovery import recipe_folder, recipe_paths
from avlit.errors import ConfigError
from avlit.settings import Settings, read_words, setting
from avlit.timing import VIDEO_FACTORS, Timing
from data.captions import PROMPT
from data.clip import SUBSETS
from data.prepare.names import NamePattern

SOUND_ALONE = ("codecs.video", "none")
"""What the recipe's codecs are where sound is prepared without picture."""


@dataclass
class WindowConfig:
    """What every window looks and sounds like; the defaults are the recipe's.

    A reference is cut from another sound that was brought to `peak` as a whole, so it may be quieter itself; of a
    reference given to `just sample`, the part that is used is brought to it.
    """

    fps: float = setting(24.0, "video frames a second", above=0)
    num_frames: int = setting(49, "frames of a window, 4n+1; of sound alone, num_frames / fps is the longest", low=1)
    height: int = setting(480, "pixels, a multiple of the video codec's factor, 8 or 16", low=8, not_with=SOUND_ALONE)
    width: int = setting(720, "pixels, a multiple of the video codec's factor, 8 or 16", low=8, not_with=SOUND_ALONE)
    rate_hz: int = setting(16000, "audio samples a second", low=1000)
    peak: float | None = setting(
        None, "loudest sample that every sound is brought to, of 1; null leaves it as recorded", above=0, high=1
    )

    def timing(self, codec: str) -> Timing:
        """The same with all the arithmetic for a video codec; ValueError where the sizes do not fit it."""
        temporal, spatial = VIDEO_FACTORS[codec]
        try:
            return Timing(
                fps=self.fps,
                num_frames=self.num_frames,
                height=self.height,
                width=self.width,
                rate_hz=self.rate_hz,
                temporal_factor=temporal,
                spatial_factor=spatial,
            )
        except ValueError as error:
            raise ValueError(f"data.{error}") from error


@dataclass
class PrepareConfig:
    """One preparation. `data` and `codecs` must be those of the training run, so they are taken from its recipe."""

    source: str = setting("", "folder of media files, searched with all its subfolders")
    include: str = setting("*", "glob on file names without their suffix; others are passed over")
    captions: str | None = setting(None, "JSONL file, one record a clip; null reads NAME.json or NAME.txt beside it")
    pattern: str | None = setting(
        None,
        "what file names without their suffix say, for example {digit}_{speaker}_{take}: speaker, and transcript or "
        "digit; other fields are only parsed",
    )
    out: str = setting("", "folder of the shards, new or empty")
    recipe: str = setting("mtv_stage1", "recipe whose rates, sizes and codecs are taken")
    size: Literal["tiny", "paper"] = setting("tiny", "size of that recipe")
    stride: float | None = setting(
        None, "seconds from one window's start to the next; null is its length", above=0, not_with=SOUND_ALONE
    )
    length_step_s: float = setting(
        0.64,
        "seconds; sound alone is followed by silence up to a multiple of this, so that few lengths arise; at most the "
        "recipe's clip",
        low=0.02,
        only_with=SOUND_ALONE,
    )
    heldout: float = setting(0.1, "share of the clips kept out of training", low=0, high=0.5)
    separator: Literal["auto", "simple", "deepfilter"] = setting(
        "auto",
        "splits speech from the rest where a clip has no stems; auto takes deepfilter where it is installed",
        not_with=("codecs.tracks", "none"),
    )
    measure_latents: bool = setting(
        False,
        "first measures each latent channel's mean and std over the sources' sound, and leaves them beside the weights "
        "for every later use of them; once",
        only_with=("codecs.audio", "mmaudio"),
    )
    mouths: Literal["auto", "none", "facemesh"] = setting(
        "auto", "finds mouths, for a loss on them; auto takes facemesh where it is installed", not_with=SOUND_ALONE
    )
    annotators: str = setting(
        "",
        "names of installed annotators, with commas; each makes depth, pose or reference_image of clips without a file "
        "for it (NAME.depth.mp4, NAME.pose.mp4, NAME.mask.png)",
        not_with=SOUND_ALONE,
    )
    free_prompts: bool = setting(
        False, "also takes captions that are not of the form `[VISUAL]: … [SPEECH]: …`, where the recipe reads that one"
    )
    subset: str = setting("single_character", "subset of clips whose caption names none and describes nobody")
    shard_samples: int = setting(256, "most samples of one shard", low=1)
    data: WindowConfig = field(default_factory=WindowConfig)
    codecs: CodecConfig = field(default_factory=CodecConfig)

    @property
    def reads(self) -> Reads:
        """What the recipe's step reads of a sample."""
        words = [f"recipe={self.recipe}", f"size={self.size}", f"codecs.video={self.codecs.video}"]
        return load_config(words).reads

    @property
    def is_sound_alone(self) -> bool:
        """Whether the shards hold no picture: the recipe's codecs have none for it."""
        return self.codecs.video == "none"

    @property
    def timing(self) -> Timing:
        """Sizes and rates of a window."""
        return self.data.timing(self.codecs.video)

    @property
    def name_pattern(self) -> NamePattern | None:
        """What reads file names, where that is asked for."""
        return None if self.pattern is None else NamePattern(self.pattern)

    @property
    def stride_frames(self) -> int:
        """Frames from one window's start to the next."""
        return self.data.num_frames if self.stride is None else round(self.stride * self.data.fps)

    def check(self) -> None:
        """Raise ValueError for what a type cannot say."""
        for key, example in (("source", "source=my_clips"), ("out", "out=shards")):
            if not getattr(self, key):
                raise ValueError(f"{key}=… is missing: name a folder, for example {example}")
        if self.data.peak is not None and self.codecs.audio == "none":
            raise ValueError(
                f"data.peak={self.data.peak:g}: recipe={self.recipe} generates no sound, so it is left as recorded; "
                "leave it out"
            )
        if self.annotators and not self.reads.controls:
            raise ValueError(f"annotators={self.annotators}: recipe={self.recipe} reads no controls; leave it out")
        if self.free_prompts and PROMPT not in self.reads.captions:
            raise ValueError(f"free_prompts=true: recipe={self.recipe} reads captions of any form; leave it out")
        if not Path(self.source).is_dir():
            raise ValueError(f"source={self.source}: no such folder")
        if self.captions is not None and not Path(self.captions).is_file():
            raise ValueError(f"captions={self.captions}: no such file")
        _ = self.timing, self.name_pattern
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


def check_picture(recipe: str, *, size: str, codec: str) -> None:
    """Raise ConfigError where `codecs.video` takes a recipe's picture away, or gives one where there is sound alone."""
    is_sound_alone = codec == "none"
    if _is_sound_alone(recipe, size) == is_sound_alone:
        return
    folder = recipe_folder(recipe)
    fitting = [
        key
        for key, path in recipe_paths().items()
        if path.parent == folder and _is_sound_alone(key, size) == is_sound_alone
    ]
    need, other = ("needs picture", "sound alone") if is_sound_alone else ("is for sound alone", "picture and sound")
    names = " or ".join(f"recipe={key}" for key in fitting)
    raise ConfigError(
        f"codecs.video={codec}: recipe={recipe} {need}; " + (f"for {other} use {names}" if fitting else "leave it out")
    )


def _is_sound_alone(recipe: str, size: str) -> bool:
    return load_config([f"recipe={recipe}", f"size={size}"]).codecs.video == "none"


def load_prepare_config(words: Sequence[str]) -> PrepareConfig:
    """The config that `source=… out=… a.b=c …` words describe; ConfigError names key, value and what is allowed."""
    given = read_words(words)
    schema = Settings(PrepareConfig)
    schema.put_words(given)  # a wrong word is said before the recipe's own settings are looked at
    codecs = [f"{key}={text}" for key, text in given.items() if key.startswith("codecs.")]
    key, size = (given.get(key, str(schema.node[key])) for key in ("recipe", "size"))
    if "codecs.video" in given:
        check_picture(key, size=size, codec=given["codecs.video"])
    recipe = load_config([f"recipe={key}", f"size={size}", *codecs])
    settings = Settings(PrepareConfig)
    shared = {name: getattr(recipe.data, name) for name in asdict(WindowConfig())}
    settings.put({"data": shared, "codecs": asdict(recipe.codecs)}, recipe.recipe)
    settings.put_words(given)
    settings.refuse_idle(given)
    return settings.build()
