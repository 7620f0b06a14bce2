"""`just inspect mouth`: clips' mouth boxes, and JoVA's check that the latent cells under them hold the mouth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from avlit.commands.sample import make_folder
from avlit.config import Config, ConfigError, load_config
from avlit.settings import leaves, nearest

if TYPE_CHECKING:  # a wrong word must not wait for torch
    import numpy as np
    from PIL import Image

    from avlit.metrics.attention import Share
    from avlit.metrics.mouth_damage import MouthDamage
    from data.sample import EncodedSample
    from data.shards import ShardSet

KEYS = (
    "recipe", "size", "out", "clip", "data.root", "data.cache_dir", "data.subsets", "data.num_clips",
    "data.num_frames", "data.height", "data.width", "data.fps", "data.rate_hz",
    "codecs.video", "codecs.video_weights", "train.accelerator", "train.threads",
)  # fmt: skip
EMBEDDED_KEYS = ("data.num_frames", "data.height", "data.width", "data.fps", "data.rate_hz")
"""Prepared shards have their own sizes and rates."""

NUM_MEASURED, NUM_DRAWN, COLUMNS, HEIGHT = 16, 4, 6, 128
"""Clips that are measured and drawn where none is named; frames of a row of the picture, and its pixels."""


@dataclass(frozen=True)
class CheckedClip:
    """A clip's key and boxes, with what zeroing the cells under them did."""

    key: str
    boxes: Sequence[Sequence[tuple[float, float, float, float]]]
    damage: MouthDamage


def inspect_mouth(words: Mapping[str, str]) -> int:
    """`recipe=…` and `out=FILE.png`; `data.root=FOLDER` of shards, else the embedded corpus; `clip=KEY,…` by name."""
    config = read_words_of(words)
    out = read_out(words)
    keys = words["clip"].split(",") if "clip" in words else []

    import torch

    from avlit.codecs.build import build_video_codec
    from avlit.commands.assembly import shard_roots
    from avlit.metrics.mouth_damage import mouth_damage
    from avlit.timing import Timing

    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = "cuda" if config.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    codec = build_video_codec(config.codecs.video, config.codecs.video_weights, device=device)
    shards = open_shards(shard_roots(config), identity=codec.identity)
    subsets = subsets_of(shards, config)
    samples = (named_clip(shards, key, subsets) for key in keys) if keys else clips_with_mouths(shards, subsets)
    make_folder(out.parent)
    checked: list[CheckedClip] = []
    for sample in samples:
        about = sample.annotation
        assert sample.video_latents is not None  # the shards have this codec
        timing = Timing(
            fps=about.fps,
            num_frames=about.num_frames,
            height=about.height,
            width=about.width,
            rate_hz=about.rate_hz,
            temporal_factor=codec.temporal_factor,
            spatial_factor=codec.spatial_factor,
        )
        latents = torch.from_numpy(sample.video_latents).float().to(device)
        try:
            damage = mouth_damage(codec, latents, about.mouth_boxes, timing=timing, sample=sample.key)
        except ValueError as error:
            raise ConfigError(f"clip={sample.key}: {error}; mend its shard, or name other clips in clip=") from error
        checked.append(CheckedClip(sample.key, about.mouth_boxes, damage))
    print(*table(checked), sep="\n")
    draw(checked if keys else checked[:NUM_DRAWN], out)
    print(out)
    return 0


def read_words_of(words: Mapping[str, str]) -> Config:
    """The config that the words name. ConfigError: a word without effect, or a recipe without picture."""
    for key, value in words.items():
        if key in KEYS or key.startswith("data.subsets."):
            continue
        if key == "run":
            raise ConfigError(f"run={value}: no run is needed to look at mouths; name a recipe=… and data.root=…")
        if key in leaves(Config):
            raise ConfigError(f"{key}={value}: has no effect on mouths; leave it out")
        near = nearest(key, KEYS)
        raise ConfigError(f"{key}={value}: no such word{f'; did you mean {near}?' if near else ''}")
    if "recipe" not in words:
        raise ConfigError("recipe=… is missing: a recipe whose video codec the clips are encoded with")
    if "data.root" in words and (idle := [key for key in EMBEDDED_KEYS if key in words]):
        raise ConfigError(f"{idle[0]}={words[idle[0]]}: the clips of data.root have their own sizes; leave it out")
    config = load_config([f"{key}={value}" for key, value in words.items() if key not in ("out", "clip")])
    if config.codecs.video == "none":
        raise ConfigError(
            f"recipe={config.recipe}: sees no video (codecs.video=none), so there are no mouths; name a stage with "
            "picture"
        )
    return config


def read_out(words: Mapping[str, str]) -> Path:
    """The file that is to be written. ConfigError: none is named, it is no picture, or there already."""
    if "out" not in words:
        raise ConfigError("out=… is missing: the picture's file, for example out=mouths.png")
    out = Path(words["out"])
    if out.suffix != ".png":
        raise ConfigError(f"out={out}: the picture is written to a file, for example out={out.stem or 'mouths'}.png")
    if out.exists():
        raise ConfigError(f"out={out}: is there already; give another out=, or remove it")
    return out


def open_shards(roots: Sequence[Path], *, identity: str) -> ShardSet:
    """The shards. ConfigError: they hold sound alone. ShardError: their video codec is not the one of `identity`."""
    from data.shards import ShardSet

    if "video_codec" not in ShardSet.open(roots).identity:
        raise ConfigError(
            f"data.root={','.join(map(str, roots))}: holds sound without picture, so there are no mouths to see"
        )
    return ShardSet.open(roots, {"video_codec": identity})


def subsets_of(shards: ShardSet, config: Config) -> tuple[str, ...]:
    """The subsets that are looked at. ConfigError: the shards lack one."""
    if unknown := [name for name in config.data.subsets if name not in shards.subsets]:
        raise ConfigError(f"data.subsets.{unknown[0]}: the shards hold {', '.join(shards.subsets) or 'nothing'}")
    return tuple(config.data.subsets) or shards.subsets


def named_clip(shards: ShardSet, key: str, subsets: Sequence[str]) -> EncodedSample:
    """The clip of that key, held-out ones first; of a corpus under way only held-out ones, which are there soon."""
    from data.sample import DamagedSample

    known: list[str] = []
    for split in ("heldout",) if shards.is_growing else ("heldout", "train"):
        for number, shard in shards.select(split):
            if shard.subset not in subsets:
                continue
            keys = [shards.key(number, index) for index in range(shard.samples)]
            if key in keys:
                try:
                    sample = shards.read(number, keys.index(key))
                except DamagedSample as damage:
                    raise ConfigError(f"clip={key}: {damage}; prepare it again, or give another") from damage
                if not any(sample.annotation.mouth_boxes):
                    raise ConfigError(
                        f"clip={key}: has no mouth boxes: no face was found in it, or `just prepare` looked for none"
                    )
                return sample
            known += keys
    near = nearest(key, known)
    raise ConfigError(
        f"clip={key}: no such clip in {', '.join(map(str, shards.roots))}; "
        + (f"did you mean {near}?" if near else f"the first is {known[0]}" if known else "there is none")
    )


def clips_with_mouths(shards: ShardSet, subsets: Sequence[str]) -> list[EncodedSample]:
    """The first held-out clips with mouth boxes, of the subsets by turns. ConfigError: there is none among them."""
    from data.sample import DamagedSample

    places = [
        [(number, index) for number, shard in shards.select("heldout") if shard.subset == subset
         for index in range(shard.samples)]
        for subset in subsets
    ]  # fmt: skip
    found: list[EncodedSample] = []
    by_turns = [place for turn in zip_longest(*places) for place in turn if place is not None]
    for place in by_turns:
        try:
            sample = shards.read(*place)
        except DamagedSample as damage:
            print(f"damaged clip left out: {damage}")
            continue
        if any(sample.annotation.mouth_boxes):
            found.append(sample)
            if len(found) == NUM_MEASURED:
                return found
    if not found:
        root = ",".join(map(str, shards.roots))
        raise ConfigError(
            f"data.root={root}: none of its {len(by_turns)} held-out clips has mouth boxes; "
            "no face was found in them, or `just prepare` looked for none"
        )
    return found


def table(clips: Sequence[CheckedClip]) -> list[str]:
    """A line for each clip and their mean: damage inside the boxes, and inside the boxes grown by a latent cell."""
    width = max(len("mean of 99 clips"), *(len(clip.key) for clip in clips))
    heads = ("in mouth boxes", "area of them", "in grown boxes", "area of them")
    lines = ["Damage by zeroing the latent cells of mouths:", " " * width + "".join(f"  {head}" for head in heads)]
    rows = [(clip.key, clip.damage.in_boxes, clip.damage.in_grown) for clip in clips]
    lines += [_line(name, [inside, grown], heads, width) for name, inside, grown in rows]
    harmed = [(inside, grown) for _, inside, grown in rows if inside is not None and grown is not None]
    if harmed:
        means = [_mean([pair[part] for pair in harmed]) for part in (0, 1)]
        lines.append(_line(f"mean of {len(harmed)} clips", means, heads, width))
    return lines


def _mean(shares: Sequence[Share]) -> Share:
    return type(shares[0])(mean(share.found for share in shares), mean(share.chance for share in shares))


def _line(name: str, shares: Sequence[Share | None], heads: Sequence[str], width: int) -> str:
    cells = [value for share in shares for value in ((share.found, share.chance) if share else (None, None))]
    texts = ["no damage" if value is None else f"{value:.1%}" for value in cells]
    return f"{name:<{width}}" + "".join(f"  {text:>{len(head)}}" for text, head in zip(texts, heads, strict=True))


def draw(clips: Sequence[CheckedClip], path: Path) -> None:
    """A PNG: of every clip four rows of frames: boxes, as decoded, decoded without the mouth's cells, difference."""
    from PIL import Image

    sheets = [_sheet(clip) for clip in clips]
    page = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    part = path.with_name(f"{path.name}.part")
    page.save(part, format="PNG")
    part.replace(path)


def _sheet(clip: CheckedClip) -> Image.Image:
    import numpy as np
    from PIL import Image

    from avlit.commands.clips import to_frames
    from avlit.contact_sheet import label_strip
    from avlit.mouth_mask import draw_boxes

    decoded = to_frames(clip.damage.decoded)  # [F, H, W, 3]
    strength = clip.damage.difference.sqrt()
    strength = (255 * strength / strength.max().clamp_min(1e-12)).byte().numpy()
    rows: dict[str, np.ndarray] = {
        f"{clip.key}: mouth boxes": draw_boxes(decoded, clip.boxes),
        "decoded": decoded,
        "decoded, the latents of mouths zeroed": to_frames(clip.damage.masked),
        "difference of the two": np.repeat(strength[..., None], 3, axis=3),
    }
    height, width = decoded.shape[1:3]
    columns = min(COLUMNS, len(decoded))
    shown = ((np.arange(columns) + 0.5) * len(decoded) / columns).astype(int)
    size = (max(1, round(width * HEIGHT / height)), HEIGHT)
    lines: list[np.ndarray] = []
    for label, frames in rows.items():
        pictures = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames[shown]]
        lines += [
            label_strip(label, width=size[0] * columns),
            np.concatenate([np.asarray(p) for p in pictures], axis=1),
        ]
    return Image.fromarray(np.concatenate(lines))
