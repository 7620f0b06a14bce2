"""`just prepare`: raw clips and captions to checked, encoded shards, and a report of what was kept and what was not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from avlit.errors import ConfigError
from data.prepare.config import PrepareConfig, load_prepare_config

if TYPE_CHECKING:  # a wrong word must not wait for torch
    from data.encode import Encoders


def main(words: Sequence[str]) -> int:
    """`source=FOLDER out=FOLDER` and any key of PrepareConfig; status 1 if not one window was kept."""
    config = load_prepare_config(words)

    from data.prepare.preparation import NothingKeptError, Preparation, prepare
    from data.prepare.separation import build_separator

    separator = build_separator(config.separator)
    encoders = encoders_of(config)
    try:
        report = prepare(
            Path(config.source),
            Path(config.out),
            captions=None if config.captions is None else Path(config.captions),
            how=Preparation(
                timing=config.data.timing,
                stride_frames=config.stride_frames,
                heldout=config.heldout,
                default_subset=config.subset,
                shard_samples=config.shard_samples,
            ),
            encoders=encoders,
            separator=separator,
            settings=asdict(config),
        )
    except NothingKeptError as error:
        print("\n".join(error.report.lines()))
        print(f"just prepare: {error}; nothing was written", file=sys.stderr)
        return 1
    print("\n".join(report.lines()))
    print(f"{config.out}: ready for `just train recipe=… size={config.size} data.root={config.out}`")
    return 0


def encoders_of(config: PrepareConfig) -> Encoders:
    """The codecs that the config names, on the GPU where there is one."""
    import torch

    from avlit.commands import assembly

    try:
        return assembly.encoders_of(config.codecs, config.reads, device="cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise ConfigError(str(error)) from error
