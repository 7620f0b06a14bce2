"""Runs a command on several processes of this machine, as torchrun or srun would start them; forked, in no time.

They come from the server of `kill_fuzz`, which has the libraries imported.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.kill_fuzz import ROOT, keep_in_spool, preload


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_torchrun(ranks: int, *, nodes: int = 1) -> list[dict[str, str]]:
    """What torchrun tells each of the processes, `ranks` of them on that many nodes."""
    common = {
        "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks // nodes),
    }  # fmt: skip
    places = [divmod(rank, ranks // nodes) for rank in range(ranks)]
    return [
        {**common, "RANK": str(rank), "GROUP_RANK": str(node), "LOCAL_RANK": str(local)}
        for rank, (node, local) in enumerate(places)
    ]


def as_srun(ranks: int) -> list[dict[str, str]]:
    """What SLURM's srun tells each of the processes on one node."""
    common = {
        "SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(ranks), "SLURM_NODEID": "0",
        "SLURM_NTASKS_PER_NODE": str(ranks), "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_NAME": "train", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [{**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks)]


class Ranks:
    """The processes of one command; `log` holds what they print."""

    def __init__(self, folder: Path, words: Sequence[str], environments: Sequence[Mapping[str, str]]):
        preload()
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        context = multiprocessing.get_context("forkserver")
        self.processes: list[BaseProcess] = [
            context.Process(target=_run, args=(list(words), dict(each), str(self.log))) for each in environments
        ]
        for process in self.processes:
            process.start()

    def end(self, timeout_s: float = 300) -> list[int | None]:
        """Their exit statuses; those that do not end in time are killed."""
        for process in self.processes:
            process.join(timeout_s)
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def printed(self) -> str:
        return self.log.read_text(errors="replace")


def _run(words: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    keep_in_spool()
    from avlit.__main__ import main
    from avlit.launch import dismiss
    from tests.strategy_worker import disturb

    disturb()
    status = main(words)
    dismiss()
    sys.stdout.flush()
    os._exit(status)
