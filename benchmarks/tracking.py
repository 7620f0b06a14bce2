"""What telling MLflow costs training: a call, and a step that logs, with the server up, away and hanging.

`python -m benchmarks.tracking [steps=1000] [rounds=7] [every=10]`. A step is half a millisecond or so of arithmetic, as
short as a step can be; every tenth logs ten metrics, as training does. "calls" is the share of a step that goes into
the calls; "all" compares with the same steps without a tracker, in turn, so that it has in it what the sender and the
server take from training where they share its cores.
"""

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from avlit.runs import create_run
from avlit.tracking import Tracker
from avlit.tracking.server import free_port, start_server, stop_server, wait_until_up
from avlit.tracking.spool import Progress

METRICS = {f"train/loss/video/noise/{number}": 0.5 for number in range(10)}
SIZE = 256


def steps_s(num_steps: int, every: int, tell: Callable[[int], None]) -> float:
    """Seconds of so many steps, every so many of which tell their metrics."""
    weights = torch.randn(SIZE, SIZE)
    began = time.perf_counter()
    for step in range(num_steps):
        weights = torch.tanh(weights @ weights)
        if step % every == 0:
            tell(step)
    return time.perf_counter() - began


def call_s(num_calls: int, tell: Callable[[int], None]) -> list[float]:
    """Seconds of each call."""
    found = []
    for step in range(num_calls):
        began = time.perf_counter()
        tell(step)
        found.append(time.perf_counter() - began)
    return found


def main(words: list[str]) -> None:
    """Measures and prints the table."""
    given = {key: int(value) for key, value in (word.split("=") for word in words)}
    options = {"steps": 1000, "rounds": 7, "every": 10} | given
    torch.set_num_threads(1)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = free_port(24000)
        with open(folder / "server.log", "wb") as log:
            server = start_server(f"sqlite:///{folder}/mlflow.db", port=port, log=log.fileno())
        try:
            if not wait_until_up(server, port):
                raise RuntimeError((folder / "server.log").read_text())
            print(f"{len(METRICS)} metrics every {options['every']} steps, {options['rounds']} rounds in turn")
            print(
                f"{'server':10}{'a call, µs: median':>20}{'99 %':>8}{'most':>8}{'step, ms':>12}{'calls':>9}{'all':>9}"
            )
            for state in ("up", "hanging", "away"):
                print(f"{state:10}{measure(state, folder, server.pid, port, options)}", flush=True)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGCONT)
            stop_server(server)


def measure(state: str, folder: Path, server: int, port: int, options: dict[str, int]) -> str:
    """One line of the table: a tracker of its own, which has reached the server before it hangs or goes away."""
    tracker = Tracker(create_run(folder / "runs", "bench"), uri=f"http://127.0.0.1:{port}")
    if state != "away":
        while not Progress.read(tracker.run.spool_dir).run:  # the sender's imports are over before a real run logs
            time.sleep(0.1)
    if state == "hanging":
        os.killpg(server, signal.SIGSTOP)
    elif state == "up":
        os.killpg(server, signal.SIGCONT)

    def tell(step: int) -> None:
        tracker.log_metrics(METRICS, step)

    alone, told = [], []
    for turn in range(options["rounds"] + 1):
        steps, every = options["steps"], options["every"]
        pair = steps_s(steps, every, lambda step: None), steps_s(steps, every, tell)
        if turn:  # the first round warms up
            alone.append(pair[0])
            told.append(pair[1])
    calls = sorted(call_s(options["steps"], tell))
    tracker.close(timeout_s=0.1 if state != "up" else 30.0)
    if state == "hanging":  # away comes next
        os.killpg(server, signal.SIGKILL)
    step_s, call = statistics.median(alone) / options["steps"], statistics.median(calls)
    share = statistics.median(with_it / without - 1 for without, with_it in zip(alone, told, strict=True))
    return (
        f"{call * 1e6:20.1f}{calls[int(len(calls) * 0.99)] * 1e6:8.1f}{calls[-1] * 1e6:8.0f}"
        f"{step_s * 1e3:12.3f}{call / options['every'] / step_s:9.2%}{share:9.2%}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
