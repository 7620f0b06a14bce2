"""Lip sync of a trained run on held-out clips of every subset with speech, against shuffled speech.

`python -m benchmarks.lip_sync run=RUN [run=RUN …] [clips=48]`: one line a run and subset, then mean and spread over the
runs (runs of several seeds give the seed-to-seed spread).
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from avlit.commands.assembly import build_datamodule, build_encoders, build_module, shard_roots
from avlit.commands.clips import measure_lip_sync
from avlit.config import from_yaml
from avlit.inherit import load_weights_into, resolve_weights
from avlit.runs import find_run

SUBSETS = ("basic_face", "single_character", "multiple_characters", "sound_event", "visual_mood")


def measure(word: str, *, num_clips: int) -> dict[str, tuple[float, float]]:
    """Subset -> (own, shuffled) of one run's newest checkpoint, averaged weights."""
    run = find_run(Path("runs"), word)
    scores = {}
    for subset in SUBSETS:
        config = from_yaml(run.config_path.read_text(), words=[f"data.subsets={{{subset}: 1}}"])
        encoders, module = build_encoders(config), build_module(config)
        load_weights_into(module.model, resolve_weights(run.path), ema=True)
        module.eval()
        clips = build_datamodule(config, shard_roots(config), encoders).heldout_samples(num_clips)
        found = measure_lip_sync(module, clips, encoders=encoders, settings=config.sample, seed=config.seed)
        scores[subset] = (found["val/lip_sync"], found["val/lip_sync_shuffled"])
        print(f"{run.id}  {subset:20}  own {scores[subset][0]:.3f}  shuffled {scores[subset][1]:.3f}", flush=True)
    return scores


def main(words: Sequence[str]) -> None:
    """Measure every `run=` and print the spread."""
    runs = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    num_clips = next((int(word.removeprefix("clips=")) for word in words if word.startswith("clips=")), 48)
    table: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        scores = measure(run, num_clips=num_clips)
        for subset, pair in scores.items():
            table[subset].append(pair)
        table["all"].append((mean(own for own, _ in scores.values()), mean(other for _, other in scores.values())))
    for subset, pairs in table.items():
        text = "  ".join(
            f"{name} {mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
            for name, values in zip(("own", "shuffled"), zip(*pairs, strict=True), strict=True)
        )
        print(f"{subset:20}  {text}  ({len(pairs)} runs)")


if __name__ == "__main__":
    main(sys.argv[1:])
