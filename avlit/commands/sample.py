"""`just sample`: clips from a trained run, written as MP4 with the sound that drove them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avlit.commands.assembly import build_datamodule, build_encoders, build_module, shard_roots
from avlit.config import ConfigError, from_yaml
from avlit.inherit import load_weights_into, resolve_weights
from avlit.runs import find_run
from avlit.settings import read_words


def main(words: Sequence[str]) -> int:
    """`run=RUN` (`last`, an id, a folder), `out=FOLDER`, `seed=N` and any config key, for example sample.guidance=5.

    The clips are the first held-out ones of the run's data (`sample.count`), with their prompts and tracks.
    """
    given = read_words(words)
    if "run" not in given:
        raise ConfigError("run=… is missing: run=last, the id of a run, or its folder")
    run = find_run(Path(given.get("runs_dir", "runs")), given.pop("run"))
    out = given.pop("out", None)
    rest = [f"{key}={value}" for key, value in given.items()]
    config = from_yaml(run.config_path.read_text(encoding="utf-8"), words=rest, source=str(run.config_path))
    if config.sample.count < 1:
        raise ConfigError(f"sample.count={config.sample.count}: nothing to sample; give 1 or more")
    checkpoint = resolve_weights(run.path, runs_dir=Path(config.runs_dir))
    folder = Path(out) if out else run.samples_dir / f"step-{checkpoint.step:08d}-seed-{config.seed}"
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"out={folder}: is not empty; give another folder or another seed=")
    roots = shard_roots(config)

    import torch

    from avlit.commands.clips import write_clips

    encoders = build_encoders(config)
    module = build_module(config)
    if config.model.weights:
        print(f"model.weights: {module.load_released(config.model.weights)}")
    report = load_weights_into(module.model, checkpoint, ema=True, base_model=module.base_model)
    print(f"Step {checkpoint.step}: {report}")
    module.eval().to("cuda" if config.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    clips = build_datamodule(config, roots, encoders).heldout_samples(config.sample.count)
    paths = write_clips(module, clips, codec=encoders.video, settings=config.sample, seed=config.seed, folder=folder)
    for path in paths:
        print(path)
    return 0
