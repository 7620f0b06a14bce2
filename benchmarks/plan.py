"""What `just plan` predicts of a step's memory against what real steps take, for every recipe at several small sizes.

`python -m benchmarks.plan [recipe=KEY] [KEY=VALUE …]`. Each row trains three steps on a CPU through Lightning, with the
recipe's callbacks that hold tensors (EMA), and takes the most bytes that PyTorch's allocator had given out at once, by
its own events. Nothing is random but the weights: batches are zeros.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from avlit.commands.assembly import build_module
from avlit.commands.estimate import drawn_module
from avlit.commands.session import quieten_lightning
from avlit.config import Config, load_config, recipe_keys
from avlit.dry_run import blank_batch, dry_run
from avlit.estimate import dtypes_at_rest, memory_of, micro_batch_of
from avlit.models.backbones import LayerRun
from avlit.strategies import plan_strategy
from callbacks.ema import EMA

STEPS = 3
MB = 1e6

VARIANTS: dict[str, tuple[str, ...]] = {
    "tiny, 4 clips": ("data.batch_size=4",),
    "1 clip": ("data.batch_size=1",),
    "128 pixels": ("data.batch_size=2", "data.height=128", "data.width=128"),
    "checkpointing": ("data.batch_size=4", "strategy.activation_checkpointing=blocks"),
    "accumulated": ("data.batch_size=4", "train.accumulate=2"),
    "bf16": ("data.batch_size=4", "precision=bf16"),
}
"""Name -> words; all of a recipe's first stage or of its last are measured so, of the others the first alone."""


def predicted(config: Config) -> float:
    """Bytes that a plan gives to one process on a CPU."""
    module = drawn_module(config)
    cost = dry_run(
        module,
        blank_batch(config, micro_batch_of(config)),
        is_bf16=config.precision == "bf16",
        run=LayerRun(config.strategy.activation_checkpointing),
        dtypes=dtypes_at_rest(module, config),
        is_gpu=False,
    )
    return memory_of(module, config, cost, is_gpu=False).total


def measured(config: Config) -> float:
    """Most bytes that the allocator gave out at once while real steps were trained."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        _train(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate(size for _, size in changes))


def _train(config: Config) -> None:
    module = build_module(config)
    module.freeze()
    for parameter, dtype in dtypes_at_rest(module, config).items():
        parameter.data = parameter.data.to(dtype)
    plan_strategy(config).apply(module)
    batches = [blank_batch(config, micro_batch_of(config), device="cpu")] * (STEPS * config.train.accumulate)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        max_steps=STEPS,
        accumulate_grad_batches=config.train.accumulate,
        callbacks=[EMA(decay=config.ema.decay, every=config.ema.every)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # Lightning would take a bare list for a list of loaders.
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]


def main(words: Sequence[str]) -> None:
    """Print each row as it is known, and the largest error."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    quieten_lightning()
    only = [word.partition("=")[2] for word in words if word.startswith("recipe=")]
    more = [word for word in words if not word.startswith("recipe=")]
    worst, seen = 0.0, set[str]()
    print(f"{'recipe':<20} {'size':<15} {'predicted':>10} {'measured':>10} {'error':>7}  (MB)")
    for key in only or reversed(recipe_keys()):  # last stages first
        paper = key.partition("_")[0]
        names = list(VARIANTS)[:1] if paper in seen and not only else list(VARIANTS)
        seen.add(paper)
        for name in names:
            config = load_config([f"recipe={key}", "train.accelerator=cpu", *VARIANTS[name], *more])
            plan, real = predicted(config), measured(config)
            worst = max(worst, abs(plan / real - 1))
            print(f"{key:<20} {name:<15} {plan / MB:>10.1f} {real / MB:>10.1f} {plan / real - 1:>+7.1%}", flush=True)
    print(f"largest error {worst:.1%} (goal: under 15%)")


if __name__ == "__main__":
    main(sys.argv[1:])
