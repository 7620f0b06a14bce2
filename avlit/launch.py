"""Processes of one run that torchrun or SLURM's srun started: who is which rank, and how they learn what to train.

`just train` starts further processes by itself on one machine. Where something else has started them, on any number of
nodes, the first makes the run and tells the others its folder, session after session.
"""

import atexit
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avlit.errors import ConfigError

END = ""
"""What the first rank tells the others after its last session."""
GONE = "avlit/gone"
"""Key in the ranks' common store: how many have heard it."""
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Launch:
    """This process among those that `launcher` started. rank, world_size: over all nodes; local_*: on this node."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_size


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Who this process is; None where nothing started several. ConfigError: the nodes have not equally many."""

    def number(name: str) -> int:
        return int(environment[name])

    if "TORCHELASTIC_RUN_ID" in environment:
        local = number("LOCAL_RANK"), number("LOCAL_WORLD_SIZE")
        launch = Launch("torchrun", number("RANK"), number("WORLD_SIZE"), *local)
    elif "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        if "SLURM_NTASKS_PER_NODE" not in environment:
            raise ConfigError("srun: says nothing of SLURM_NTASKS_PER_NODE; give sbatch or srun --ntasks-per-node=…")
        local = number("SLURM_LOCALID"), number("SLURM_NTASKS_PER_NODE")
        launch = Launch("srun", number("SLURM_PROCID"), number("SLURM_NTASKS"), *local)
    else:
        return None
    if launch.world_size % launch.local_size:
        raise ConfigError(
            f"{launch.launcher}: started {launch.world_size} processes, {launch.local_size} on this node; all nodes "
            "must have equally many"
        )
    return launch


def cluster_environment(launch: Launch | None) -> Any:
    """Lightning's part of it: whether processes are there, and under which ranks."""
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if launch is None:
        return LightningEnvironment()
    return TorchElasticEnvironment() if launch.launcher == "torchrun" else SLURMEnvironment(auto_requeue=False)


def connect(launch: Launch) -> None:
    """Let the ranks know each other, once in a process."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    environment = cluster_environment(launch)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size)
    if launch.rank == 0:
        atexit.register(dismiss)


def tell(run: str) -> None:
    """Tell the other ranks the folder of the run that they are to join now; END to let them go."""
    store = _store()
    store.set(f"avlit/session/{store.add('avlit/sessions', 1)}", run)


def runs_told() -> Iterator[Path]:
    """The folders that the first rank tells, as they come, until it is done or gone."""
    store, number = _store(), 0
    while True:
        number += 1
        key = f"avlit/session/{number}"
        while not store.check([key]):
            time.sleep(0.1)
        if (told := store.get(key).decode()) == END:
            return
        yield Path(told)


def dismiss() -> None:
    """Let the other ranks go, and part from them; the first keeps what they read from until they have heard it."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    if dist.get_rank() == 0:
        tell(END)
        limit = time.monotonic() + PATIENCE_S
        while _store().add(GONE, 0) < dist.get_world_size() - 1 and time.monotonic() < limit:
            time.sleep(0.05)
    else:
        _store().add(GONE, 1)
    dist.destroy_process_group()


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()
