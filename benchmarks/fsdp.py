"""What torch's FSDP2 costs on one rank, where it shards nothing: a step with it over one without, in turns in one run.

It copies weights and gradients, which is why `strategy=fsdp2` leaves a model on one rank alone (`Sharding`): there a
training step costs what one without it does, and computes the same bits. The
recipe's tiny size at its own batch: forward, backward, clipping, fused AdamW. Times are of the process (its CPU
seconds): on a machine that others use, the clock on the wall measures them.
"""

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from avlit.batch import AVBatch
from avlit.commands.assembly import build_datamodule, build_encoders, build_module, shard_roots
from avlit.config import load_config
from avlit.module import AVModule, build_optimizer
from avlit.strategies import Sharding


class Loop:
    """Steps of one module, with its optimizer."""

    def __init__(self, module: AVModule):
        self.module = module
        self.optimizer = build_optimizer(module.trained_parameters.values(), module.optimizer_config)

    def step(self, batch: AVBatch) -> tuple[float, float]:
        """CPU seconds of the step, and its loss."""
        began = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.module.training_step(batch, 0)["loss"]
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        self.module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        return time.process_time() - began, loss.item()


def main(words: list[str] | None = None) -> None:
    """Prints the median step of both, and the median and the quartiles of the ratios, pair by pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="mtv_stage1")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([f"recipe={options.recipe}", "data.num_clips=32", f"data.cache_dir={folder}/cache"])
        data = build_datamodule(config, shard_roots(config), build_encoders(config))
        batches = list(islice(data.train_dataloader(), options.rounds + 2))
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=0, world_size=1)
        plain, sharded = build_module(config), build_module(config)
        for module in (plain, sharded):
            module.freeze()
        Sharding().shard(sharded.model, init_device_mesh("cpu", (1,)))
        loops = (Loop(plain), Loop(sharded))
        pairs = []
        for number, batch in enumerate(batches):
            order = loops if number % 2 else loops[::-1]
            found = {id(loop): loop.step(batch) for loop in order}
            (without, loss), (with_it, same) = (found[id(loop)] for loop in loops)
            assert loss == same, (number, loss, same)  # FSDP2 on one rank computes the same bits
            if number >= 2:  # the first ones warm both up
                pairs.append((without, with_it))
        dist.destroy_process_group()
    ratios = sorted(with_it / without for without, with_it in pairs)
    quarter = len(ratios) // 4
    print(f"{Path(options.recipe).name}, {sum(p.numel() for p in plain.model.parameters()) / 1e6:.1f} M parameters")
    print(f"plain             {median(without for without, _ in pairs) * 1e3:.0f} ms of CPU a step")
    print(f"fsdp2 on one rank {median(with_it for _, with_it in pairs) * 1e3:.0f} ms of CPU a step")
    print(
        f"ratio             {median(ratios):.3f} (quartiles {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}; "
        "1 as trained)"
    )


if __name__ == "__main__":
    main()
