"""What an adapter changed: losses and clips of the model under it, and with it, on the same clips and noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from avlit.batch import AVBatch
from avlit.checkpoints import Checkpoint, load_checkpoint
from avlit.commands.adapted import go_on_with, root_of, stand_on
from avlit.commands.assembly import build_datamodule, build_encoders, build_module, shard_roots
from avlit.commands.clips import write_clips
from avlit.config import Config, from_yaml
from avlit.errors import UserError
from avlit.inherit import load_weights_into
from avlit.module import AVModule
from avlit.randomness import Draws
from avlit.runs import Run, find_run
from data.replay import REPLAY

NUM_CLIPS = 32
"""Most clips of a set whose loss is measured."""


@dataclass(frozen=True)
class Change:
    """A loss of the model under the adapter, and with it."""

    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.before:.4f} before, {self.after:.4f} after ({self.after / self.before - 1:+.0%})"


def compare_with_base(config: Config, run: Run, checkpoint: Checkpoint) -> dict[str, Change]:
    """Write `samples/before` and `samples/after` of a finished run; returns the losses of each set of clips.

    own: what it was trained on; heldout: of the same folder, kept apart; unrelated: held-out clips of what the base was
    trained on, where that is known and there.
    """
    encoders = build_encoders(config)
    own = replace(config.data, subsets={k: weight for k, weight in config.data.subsets.items() if k != REPLAY})
    data = build_datamodule(replace(config, data=own), shard_roots(config), encoders)
    size = config.data.batch_size
    sets = {"own": data.heldout_batches(NUM_CLIPS, size, split="train")}
    sets["heldout"] = data.heldout_batches(NUM_CLIPS, size) if config.validation.clips else []
    sets["unrelated"] = unrelated_batches(checkpoint, config)
    clips = data.heldout_samples(config.sample.count) if config.sample.count else []

    module = build_module(config)
    start = run.init_checkpoint
    source = load_checkpoint(start) if start is not None else None
    stand_on(module, config, root_of(source) if source else None)
    if source and source.state.adapter:
        go_on_with(module, source)
    module.eval().to("cuda" if config.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    losses: dict[str, dict[str, float]] = {}
    for name in ("before", "after"):
        if name == "after":
            load_weights_into(module.model, checkpoint, ema=True, base_model=module.base_model)
        losses[name] = {key: mean_loss(module, batches) for key, batches in sets.items() if batches}
        if clips:
            folder = run.samples_dir / name
            write_clips(module, clips, encoders=encoders, settings=config.sample, seed=config.seed, folder=folder)
    return {key: Change(losses["before"][key], losses["after"][key]) for key in losses["before"]}


def unrelated_batches(checkpoint: Checkpoint, config: Config) -> list[AVBatch]:
    """Held-out clips of what the base was trained on; empty, and said so, where they cannot be had."""
    try:
        root = root_of(checkpoint)
        if root is None:
            raise UserError("the base is released weights")
        base = find_run(root.path.parents[2], root.path.parents[1])
        theirs = from_yaml(base.read_config(), source=str(base.config_path))
        encoders = build_encoders(config)  # its conditions must be what this model reads
        data = build_datamodule(replace(config, data=theirs.data), shard_roots(theirs), encoders)
        return data.heldout_batches(NUM_CLIPS, config.data.batch_size)
    except UserError as error:
        print(f"Whether the base has forgotten anything is not measured: {error}")
        return []


@torch.no_grad()
def mean_loss(module: AVModule, batches: list[AVBatch]) -> float:
    """The mean over clips of the recipe's whole loss, with the same noise at every call."""
    total, count = 0.0, 0
    for batch in batches:
        on_device = batch.to(module.device)
        losses = module.step(on_device, Draws(0, on_device.step, on_device.slots, is_training=False))
        total, count = total + float(losses.total) * len(batch), count + len(batch)
    return total / count
