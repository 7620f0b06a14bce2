"""The command line: help, listings and configs without torch, and mistakes as one clean message."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from avlit.__main__ import COMMANDS, MODULES, main
from avlit.config import from_yaml, load_config

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "lightning", "diffusers", "transformers", "mlflow")


@pytest.mark.parametrize(
    "words",
    [["--help"], [], ["train", "--help"], ["recipes"], ["config", "recipe=mtv_stage3", "size=paper"], ["trian"],
     ["train", "recipe=mtv_stag3"]],
)  # fmt: skip
def test_what_must_answer_at_once_imports_nothing_heavy(words: list[str]):
    script = (
        "import sys\nfrom avlit.__main__ import main\nmain(sys.argv[1:])\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1:] == ["heavy: []"], done.stderr


def test_a_mistake_is_one_message_and_status_two():
    done = subprocess.run(
        [sys.executable, "-m", "avlit", "config", "recipe=mtv_stag3"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "just config: recipe=mtv_stag3: no such recipe; did you mean mtv_stage3?\n"


def test_unknown_command_proposes_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["trian"]) == 2
    assert "trian: no such command; did you mean train?" in capsys.readouterr().err


def test_help_lists_every_command_and_each_one_exists(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, about in COMMANDS.items():
        assert any(line.split() == [name, *about.split()] for line in lines)
        assert importlib.util.find_spec(f"avlit.commands.{MODULES.get(name, name)}") is not None


def test_recipes_lists_each_with_its_line(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {key: about for key, about in rows}["mtv_stage3"] == load_config(["recipe=mtv_stage3"]).about
    assert main(["recipes", "size=tiny"]) == 2


def test_printed_config_reads_back_as_the_config(capsys: pytest.CaptureFixture[str]):
    words = ["recipe=mtv_stage2", "size=paper", "run_name=a # b", "data.subsets={x: 1, y: 2}"]
    assert main(["config", *words]) == 0
    assert from_yaml(capsys.readouterr().out) == load_config(words)
