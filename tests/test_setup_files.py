"""Set-up: dependency files agree, the Justfile passes words on and installs once, CI calls what the README names."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from avlit.__main__ import COMMANDS

REPOSITORY = Path(__file__).parents[1]


def real_just() -> str | None:
    """The program itself: a shim of a Python manager would put its own folder, with the real uv, first on PATH."""
    found = shutil.which("just")
    if found is None:
        return None
    ask = [found, "--justfile", "/dev/stdin", "--evaluate", "path"]
    return subprocess.run(ask, input="path := just_executable()\n", capture_output=True, text=True).stdout.strip()


JUST = real_just()
needs_just = pytest.mark.skipif(JUST is None, reason="just is not on PATH: pip install rust-just")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the set-up files, whose `uv` and Python only record how they are called, in `calls`."""
    root, tools = tmp_path / "a checkout", tmp_path / "tools"  # a space, as in many home folders
    root.mkdir()
    tools.mkdir()
    for name in ("Justfile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, root)
    write_script(
        tools / "uv",
        'printf "uv %s\\n" "$*" >> calls',
        'case "$1" in',
        '  venv) mkdir -p .venv/bin && cp "$(dirname "$0")/python" .venv/bin/python ;;',
        "  pip) [ ! -e broken ] ;;",
        "esac",
    )
    write_script(tools / "python", 'for word in "$@"; do printf "[%s]" "$word" >> calls; done', "echo >> calls")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return root


def write_script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def just(checkout: Path, *words: str) -> tuple[int, list[str]]:
    """Exit status of `just WORDS`, and the calls it made."""
    calls = checkout / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run([str(JUST), *words], cwd=checkout, capture_output=True, text=True, timeout=60)
    return done.returncode, calls.read_text("utf-8").splitlines() if calls.exists() else []


def test_conda_environment_equals_the_project(project: dict[str, Any]):
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text("utf-8"))
    python, pip, packages = environment["dependencies"]
    assert python == f"python{project['requires-python']}"
    assert pip == "pip"
    assert packages["pip"] == project["dependencies"] + project["optional-dependencies"]["dev"]


def test_every_dependency_is_locked_with_hashes_within_its_bounds(project: dict[str, Any]):
    text = (REPOSITORY / "constraints.txt").read_text("utf-8")
    locked: dict[str, list[str]] = {}
    for name, version, rest in re.findall(r"^([\w.\[\]-]+)==([^ ;\\]+)((?:.*\\\n)+.*)$", text, re.MULTILINE):
        assert "--hash=sha256:" in rest, name
        locked.setdefault(canonicalize_name(name.split("[")[0]), []).append(version)
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        versions = locked[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in versions), line
    assert "setuptools" in locked, "the project itself is installed with it, without fetching another"


def test_known_bad_releases_are_excluded(project: dict[str, Any]):
    lightning = next(Requirement(line) for line in project["dependencies"] if line.startswith("lightning"))
    assert not any(lightning.specifier.contains(version) for version in ("2.6.0", "2.6.2", "2.6.3"))


def test_no_setup_file_names_a_host(project: dict[str, Any]):
    for name in ("constraints.txt", "environment.yml", "Justfile", "pyproject.toml", ".ci/run"):
        text = (REPOSITORY / name).read_text("utf-8")
        assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host", text), name


def test_licence_is_the_one_declared(project: dict[str, Any]):
    text = (REPOSITORY / "LICENSE").read_text("utf-8")
    assert project["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in text
    assert "END OF TERMS AND CONDITIONS" in text


@needs_just
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_words_reach_a_command_unchanged(checkout: Path, command: str):
    words = ["recipe=mtv_stage3", "a.b=c", "prompt=two words", "data.subsets={x: 1}", "run_name=$HOME 'q'", "--help"]
    just(checkout, "setup")
    status, calls = just(checkout, command, *words)
    assert status == 0
    assert calls == ["".join(f"[{word}]" for word in ("-m", "avlit", command, *words))]


@needs_just
def test_first_command_makes_the_environment_and_later_ones_do_not(checkout: Path):
    status, calls = just(checkout, "recipes")
    assert status == 0
    assert [call.split()[1] for call in calls if call.startswith("uv") and "--version" not in call] == [
        "venv",
        "pip",
        "pip",
    ]
    assert any("--require-hashes -r constraints.txt" in call for call in calls)
    assert any("--no-deps --no-build-isolation --editable ." in call for call in calls)
    assert calls[-1] == "[-m][avlit][recipes]"
    assert just(checkout, "recipes") == (0, ["[-m][avlit][recipes]"])


@needs_just
@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_dependencies_bring_the_environment_up_to_date(checkout: Path, name: str):
    just(checkout, "setup")
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    _, calls = just(checkout, "setup")
    assert [call for call in calls if call.startswith("uv pip")]
    assert not [call for call in calls if call.startswith("uv venv")], "what is there is kept"
    assert just(checkout, "setup") == (0, [])


@needs_just
def test_a_failed_installation_is_tried_again(checkout: Path):
    (checkout / "broken").touch()
    status, calls = just(checkout, "recipes")
    assert status != 0
    assert "[-m][avlit][recipes]" not in calls
    (checkout / "broken").unlink()
    assert just(checkout, "recipes")[1][-1] == "[-m][avlit][recipes]"


@needs_just
def test_status_of_a_command_is_the_status_of_just(checkout: Path):
    just(checkout, "setup")
    write_script(checkout / ".venv" / "bin" / "python", "exit 2")
    assert just(checkout, "train")[0] == 2


@needs_just
def test_just_alone_lists_the_commands_without_making_an_environment(checkout: Path):
    listed = subprocess.run([str(JUST)], cwd=checkout, capture_output=True, text=True, timeout=60, check=True).stdout
    for name, about in COMMANDS.items():
        assert re.search(rf"^ +{name} .*# {re.escape(about)}$", listed, re.MULTILINE), name
    assert not (checkout / "calls").exists()


def test_ci_runs_the_tests_as_the_readme_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", tmp_path / ".ci")
    write_script(tmp_path / "just", f'[ "$1" = --version ] || echo "$@" >> "{tmp_path}/calls"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    subprocess.run([str(tmp_path / ".ci" / "run")], cwd="/", check=True, timeout=60)
    calls = (tmp_path / "calls").read_text("utf-8").splitlines()
    assert calls == ["lint", "test"]
    assert "\njust test\n" in (REPOSITORY / "README.md").read_text("utf-8")
