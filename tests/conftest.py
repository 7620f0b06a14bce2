"""What every test shares: two threads, a fixed seed for code that initialises weights, and no network."""

import os
import sys

import pytest


def pytest_configure() -> None:
    """Before any test file imports torch."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Weights are initialised from torch's global generator; each test then finds it in the same state."""
    torch = sys.modules.get("torch")  # tests of the torch-free half must not import it
    if torch is not None:
        torch.manual_seed(0)
