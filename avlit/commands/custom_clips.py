"""A plain folder of clips to shards for a recipe: prepared once, and found again while nothing about it changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from avlit.commands.assembly import build_encoders, shard_roots
from avlit.config import Config, from_yaml
from avlit.errors import UserError
from avlit.provenance import ROOT
from avlit.runs import find_run
from data.manifest import MANIFEST
from data.prepare.config import PrepareConfig, load_prepare_config
from data.prepare.sources import CLIP_SUFFIXES, SOUND_SUFFIXES
from data.prepare.tables import ClipRow, digest_of, lay_out, read_rows
from data.replay import REPLAY, check_replay, write_replay
from data.shards import ShardSet

if TYPE_CHECKING:
    from avlit.commands.finetune import Finetuning

DEFAULT_REPLAY = 0.5
"""Share of the batches that is clips which the base was trained on, where they can be had."""

SOURCES = (
    "data/encode.py",
    "data/sample.py",
    "data/prepare/*.py",
    "avlit/codecs/*.py",
    "avlit/media.py",
    "avlit/sound.py",
)
"""What decides how a clip is encoded: shards of other code are not found again."""


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds shards already."""
    return (folder / MANIFEST).exists()


def clip_rows(config: Config) -> list[ClipRow]:
    """The clips of `data.root`, a plain folder. UserError: it is none, or something in it is wrong."""
    folder = Path(str(config.data.root))
    if not folder.is_dir():
        raise UserError(f"data.root={folder}: no such folder")
    return read_rows(folder, suffixes=SOUND_SUFFIXES if config.codecs.video == "none" else CLIP_SUFFIXES)


def prepare_config(config: Config, words: Mapping[str, str], *, source: Path, out: Path) -> PrepareConfig:
    """How the clips are prepared for a training config. words: keys of `just prepare`."""
    return load_prepare_config(prepare_words(config, words, source=source, out=out))


def prepare_words(config: Config, words: Mapping[str, str], *, source: Path, out: Path) -> list[str]:
    """What `just prepare` is told."""
    given = {"source": source, "out": out, "recipe": config.recipe, "size": config.size, **words}
    return [f"{key}={value}" for key, value in given.items()]


def prepared(config: Config, rows: list[ClipRow], words: Mapping[str, str], *, cache: Path) -> Path | None:
    """The folder of shards of these clips, prepared now unless they are there; None where no window could be used.

    Found again for the same bytes, captions, codecs, settings and code only.
    """
    from avlit.commands import prepare

    encoders = build_encoders(config)
    key = {
        "clips": digest_of(rows),
        "made with": encoders.identity(fps=config.data.fps, rate_hz=config.data.rate_hz),
        "settings": {k: str(v) for k, v in asdict(prepare_config(config, words, source=ROOT, out=cache / "-")).items()},
        "code": _code_digest(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = cache / f"clips-{digest}"
    shards = folder / "shards"
    if is_prepared(shards):
        print(f"{shards}: prepared before from the same clips, codecs and settings; taken as it is")
        return shards
    lay_out(rows, folder / "clips")
    status = prepare.main(prepare_words(config, words, source=folder / "clips", out=shards))
    shutil.rmtree(folder / "clips")
    if status:
        return None
    (folder / "made_from.json").write_text(json.dumps(key, indent=1, default=str) + "\n", encoding="utf-8")
    return shards


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def replayed(wanted: Finetuning, shards: Path) -> dict[str, str]:
    """Words that mix clips which the base was trained on into those in `shards`; none, and said so, where it cannot be.

    UserError: a share was asked for, and they cannot be had.
    """
    config, share = wanted.config, DEFAULT_REPLAY if wanted.replay is None else wanted.replay
    if not share:
        return {}
    try:
        base, weights = base_data(config)
        own = ShardSet.open(shards)
        check_replay(base.identity, own.manifests[0].identity)
    except UserError as error:
        if wanted.replay is not None:
            raise UserError(f"replay={share:g}: what the base was trained on cannot be mixed in: {error}") from error
        print(f"Trains on these clips alone (replay=0): {error}")
        return {}
    counts = dict.fromkeys(own.subsets, 0.0)
    for _, shard in own.select("train"):
        counts[shard.subset] += shard.samples
    name = hashlib.sha256(repr((base.manifest_hash, sorted(weights.items()), own.manifests[0].identity)).encode())
    out = wanted.cache / f"replay-{name.hexdigest()[:16]}"
    if not is_prepared(out):
        building = out.with_name(f".{out.name}")
        shutil.rmtree(building, ignore_errors=True)
        write_replay(base, building, identity=own.manifests[0].identity, weights=weights)
        building.rename(out)
    counts = {name: count for name, count in counts.items() if count}
    counts[REPLAY] = round(share / (1 - share) * sum(counts.values()), 6)
    print(f"{share:.0%} of every batch are clips that the base was trained on (replay=0 trains without)")
    return {"data.root": f"{shards},{out}", "data.subsets": json.dumps(counts).replace('"', "")}


def base_data(config: Config) -> tuple[ShardSet, dict[str, float]]:
    """The shards that the run under the adapter was trained on, with its subsets' weights; UserError: not to be had."""
    from avlit.commands.adapted import root_of
    from avlit.inherit import resolve_weights

    root = root_of(resolve_weights(config.init)) if config.init else None
    if root is None:
        raise UserError("the base is released weights, whose clips are not here")
    run = find_run(root.path.parents[2], root.path.parents[1])
    theirs = from_yaml(run.read_config(), source=str(run.config_path))
    shards = ShardSet.open(shard_roots(theirs))
    weights = theirs.data.subsets or {name: 1.0 for name in shards.subsets}
    return shards, dict(weights)
