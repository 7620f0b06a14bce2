"""MLflow's page on this machine, for one store."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from avlit.errors import UserError

HOST = "127.0.0.1"  # whoever reaches the page can change and read everything: never beyond this machine


def free_port(first: int, *, tries: int = 100) -> int:
    """The first port from `first` on that nothing listens on; UserError when there is none."""
    for port in range(first, min(first + tries, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just given up is free
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise UserError(f"port={first}: this port and the {tries} after it are taken or not allowed; give another")


def start_server(store: str, *, port: int, log: int | None = None) -> subprocess.Popen[bytes]:
    """MLflow's server on `store` (sqlite:///FILE). log: where its output goes, a file descriptor."""
    artifacts = Path(store.removeprefix("sqlite:///")).parent / "mlruns"
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", HOST, "--port", str(port)),
            *("--backend-store-uri", store, "--default-artifact-root", artifacts.as_uri()),
        ],
        # Its jobs are for agents: eight processes more, and an interface without authentication.
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # it has a child of its own: `stop_server` ends both
    )


def wait_until_up(server: subprocess.Popen[bytes], port: int, *, timeout_s: float = 60.0) -> bool:
    """Whether the server answers; False when it ended or `timeout_s` are over."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=1):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End a server that `start_server` made, and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
