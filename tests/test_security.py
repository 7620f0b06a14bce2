"""Hostile checkpoints, configs, weights and run folders: nothing in them runs, and no secret of ours gets out.

A payload makes a folder, the canary; where the canary appears, code has run. Shards: test_shards.py and others.
"""

import ast
import builtins
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from avlit.__main__ import main
from avlit.checkpoints import load_checkpoint
from avlit.codecs.build import build_text_encoder, build_track_encoder, build_video_codec
from avlit.commands.first_weights import newest_checkpoint
from avlit.commit import CheckpointError, commit
from avlit.config import load_config, to_yaml
from avlit.errors import UserError
from avlit.inherit import resolve_weights
from avlit.runs import Run, create_run, find_run

ROOT = Path(__file__).parents[1]
SECRET = "canary-of-the-environment"


class Payload:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (str(self.canary), 0o700)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """Fails the test at its end if code has run."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a file that we read has run"


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def code(canary: Path) -> str:
    return f"import os\nos.mkdir({str(canary)!r})\nclass Evil:\n    register_for_auto_class = print\n"


def test_the_payloads_bite(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path / "canary"))
    exec(code(tmp_path / "other"))
    assert (tmp_path / "canary").exists() and (tmp_path / "other").exists()


# --- checkpoints ----------------------------------------------------------------------------------------------------

STATE = {"step": 1, "position": 8, "seed": 0, "recipe": "mtv_stage1"}


def commit_files(folder: Path, **files: bytes | str) -> Path:
    """A checkpoint with a manifest that agrees with its files, as an attacker would make it."""
    contents = {"weights": save({"a.weight": torch.ones(2)}), "state": json.dumps(STATE)} | files

    def writer(content: bytes | str) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)

    suffixes = {"state": "json"}
    named = {f"{stem}.{suffixes.get(stem, 'safetensors')}": writer(content) for stem, content in contents.items()}
    return commit(folder, 1, named)


@pytest.mark.parametrize("part", ["weights", "ema", "optimizer"])
def test_a_torch_archive_named_safetensors_is_refused(tmp_path: Path, canary: Path, part: str) -> None:
    torch.save({"a.weight": Payload(canary)}, tmp_path / "archive.pt")
    path = commit_files(tmp_path / "checkpoints", **{part: (tmp_path / "archive.pt").read_bytes()})
    with pytest.raises(CheckpointError, match=rf"{part}\.safetensors cannot be read"):
        getattr(load_checkpoint(path), part)()


def test_keys_of_a_state_that_name_classes_are_only_text(tmp_path: Path, canary: Path) -> None:
    makes = {"args": [str(canary)], "__reduce__": ["os.mkdir", str(canary)]}
    names = {"__class__": "os.mkdir", "_target_": "os.mkdir", "py/object": "os.mkdir", "__init__": makes}
    path = commit_files(tmp_path / "checkpoints", state=json.dumps(STATE | names | {"extra": names}))
    state = load_checkpoint(path).state
    assert type(state).__name__ == "CheckpointState" and state.extra == names
    assert not names.keys() & vars(state).keys()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"extra":' * 100_000,
        "null",
        "[]",
        '"step"',
        "{}",
        '{"step": ' + "9" * 10_000 + "}",
        json.dumps(STATE | {"lineage": 3}),
        json.dumps(STATE | {"lineage": [["a"]]}),
        json.dumps({"lineage": [["a", float("inf")]]} | STATE),
        json.dumps({"lineage": [["a", -1]]} | STATE),
        json.dumps(STATE | {"step": True}),
        json.dumps(STATE | {"step": 1.0}),
        json.dumps(STATE | {"step": -1}),
        json.dumps(STATE | {"seed": "0"}),
        json.dumps(STATE | {"recipe": None}),
        json.dumps({"run": 3} | STATE),
        json.dumps({"base_model": {}} | STATE),
        json.dumps({"versions": {"torch": 2}} | STATE),
        json.dumps({"counters": {"skipped": "0"}} | STATE),
        json.dumps({"counters": {"skipped": float("nan")}} | STATE),
        json.dumps({"counters": {"skipped": 10**400}} | STATE),
        json.dumps({"counters": [1]} | STATE),
        json.dumps({"extra": []} | STATE),
        json.dumps({"optimizer": {"groups": 3}} | STATE),
        json.dumps({"optimizer": {"groups": [["a"], [3]]}} | STATE),
        json.dumps({"optimizer": {"scalars": {"a": 3}}} | STATE),
        json.dumps({"optimizer": {"scalars": {"a": {"step": "x"}}}} | STATE),
        b"\xff\xfe",
        pickle.dumps(STATE),
    ],
    ids=lambda text: repr(text[:40]),
)
def test_a_senseless_state_is_a_clear_error(tmp_path: Path, text: str | bytes) -> None:
    path = commit_files(tmp_path / "checkpoints", state=text)
    with pytest.raises(CheckpointError, match=r"step-00000001: state\.json cannot be read"):
        load_checkpoint(path)


def test_a_state_of_another_step_than_its_folder_is_refused(tmp_path: Path) -> None:
    path = commit_files(tmp_path / "checkpoints", state=json.dumps(STATE | {"step": 2}))
    with pytest.raises(CheckpointError, match=r"step-00000001: state\.json is of step 2"):
        load_checkpoint(path)


def test_files_that_the_manifest_does_not_list_are_not_opened(tmp_path: Path, canary: Path) -> None:
    path = commit_files(tmp_path / "checkpoints")
    for name in ("data.pkl", "optimizer.pt", ".metadata", "model.ckpt"):
        (path / name).write_bytes(pickled(canary))
    (path / "conftest.py").write_text(code(canary))
    checkpoint = load_checkpoint(path)
    assert checkpoint.weights()["a.weight"].tolist() == [1.0, 1.0]
    assert checkpoint.optimizer() == {}


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_a_manifest_that_is_no_plain_file_is_not_read(tmp_path: Path, kind: str) -> None:
    path = commit_files(tmp_path / "checkpoints")
    manifest = path / "COMMIT.json"
    manifest.rename(tmp_path / "elsewhere.json")
    if kind == "link":
        manifest.symlink_to(tmp_path / "elsewhere.json")
    elif kind == "fifo":
        os.mkfifo(manifest)  # reading it would wait for ever
    else:
        manifest.mkdir()
    with pytest.raises(CheckpointError, match=r"COMMIT\.json is not a plain file"):
        load_checkpoint(path)


@pytest.mark.parametrize("size", ["1e999", "-1", "true", '"16"', "1.5", "null", "9" * 5000])
def test_a_size_that_is_no_size_is_a_clear_error(tmp_path: Path, size: str) -> None:
    path = commit_files(tmp_path / "checkpoints")
    files = ", ".join(f'"{name}": {{"size": {size}, "digest": "0"}}' for name in ("weights.safetensors", "state.json"))
    manifest = f'{{"format": 1, "step": 1, "algorithm": "xxh3_128", "files": {{{files}}}}}'
    (path / "COMMIT.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"step-00000001: "):
        load_checkpoint(path)


def test_init_opens_neither_a_distributed_checkpoint_nor_one_of_lightning(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_distributed({"a": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickled(canary))
    (tmp_path / "last.ckpt").write_bytes(pickled(canary))
    for name in ("dcp", "last.ckpt"):
        for init in (name, str(tmp_path / name)):
            with pytest.raises(UserError, match=name):
                resolve_weights(init, runs_dir=tmp_path / "runs")


# --- run folders and their configs ----------------------------------------------------------------------------------


@pytest.fixture
def hostile_run(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run folder from elsewhere, with a recipe of its own in it, and the folder one is in."""
    monkeypatch.setenv("SECRET", SECRET)
    run = create_run(tmp_path / "runs", "mtv_stage1")
    commit_files(run.checkpoints_dir)
    for folder in (run.path / "recipes" / "evil", run.path / "evil"):
        (folder / "sizes").mkdir(parents=True)
        for name in ("recipe.py", "config.py", "__init__.py"):
            (folder / name).write_text(code(canary))
        (folder / "evil.yaml").write_text("about: Evil.\norder: 1\n")
        (folder / "sizes" / "tiny.yaml").write_text("seed: 1\n")
    monkeypatch.chdir(run.path)
    return run


def config_text() -> str:
    return to_yaml(load_config(["recipe=mtv_stage1"]))


def recipe(name: str) -> Callable[[Path], str]:
    return lambda _: config_text().replace("recipe: mtv_stage1", f"recipe: {name}")


def with_lines(lines: str) -> Callable[[Path], str]:
    return lambda canary: f"{config_text()}\n{lines.replace('CANARY', str(canary))}\n"


def run_name(value: str) -> Callable[[Path], str]:
    return lambda canary: config_text().replace("run_name: null", f"run_name: {value.replace('CANARY', str(canary))}")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
HOSTILE_CONFIGS = [
    pytest.param(run_name("${oc.env:SECRET}"), "is not evaluated here", id="environment"),
    pytest.param(run_name("'x ${oc.decode:${oc.env:SECRET}} y'"), "is not evaluated here", id="decode"),
    pytest.param(run_name("${oc.create:${oc.env:SECRET}}"), "is not evaluated here", id="create"),
    pytest.param(run_name("[1, {a: '${oc.env:SECRET}'}]"), "is not evaluated here", id="nested"),
    pytest.param(with_lines("${oc.env:SECRET}: 1"), "no such key", id="key"),
    pytest.param(with_lines("run_name: !!python/object/apply:os.mkdir [CANARY]"), "not readable", id="twice"),
    pytest.param(run_name("!!python/object/apply:os.mkdir [CANARY]"), "not readable", id="apply"),
    pytest.param(run_name("!!python/object/new:os.mkdir {args: [CANARY]}"), "not readable", id="new"),
    pytest.param(run_name("!!python/name:os.mkdir"), "not readable", id="name"),
    pytest.param(with_lines("_target_: os.mkdir\n_args_: [CANARY]"), "no such key", id="target"),
    pytest.param(with_lines(BOMB), "not readable", id="bomb"),
    pytest.param(with_lines("a: &a [*a]"), "not readable", id="endless"),
    pytest.param(with_lines("a: " + "[" * 5000 + "]" * 5000), "not readable", id="deep"),
    pytest.param(with_lines("a: !!bool perhaps"), "not readable", id="no bool"),
    pytest.param(with_lines("a: !!timestamp x"), "not readable", id="no time"),
    pytest.param(lambda _: "3", "not readable", id="number"),
    pytest.param(recipe("evil"), "no such recipe", id="recipe beside"),
    pytest.param(recipe("evil.evil"), "no such recipe", id="dotted"),
    pytest.param(recipe("evil_evil"), "no such recipe", id="stage"),
    pytest.param(recipe("../../evil"), "no such recipe", id="path"),
    pytest.param(recipe("os.path"), "no such recipe", id="module"),
    pytest.param(recipe("[mtv_stage1]"), "no such recipe", id="list"),
]


@pytest.mark.parametrize("command", ["sample", "resume"])
@pytest.mark.parametrize(("text", "message"), HOSTILE_CONFIGS)
def test_a_config_that_came_with_a_run_is_data_alone(
    hostile_run: Run,
    canary: Path,
    capfd: pytest.CaptureFixture[str],
    text: Callable[[Path], str],
    message: str,
    command: str,
) -> None:
    hostile_run.config_path.write_text(text(canary))
    modules = set(sys.modules)
    assert main([command, f"run={hostile_run.path}"]) == 2
    output, errors = capfd.readouterr()
    assert message in errors
    assert SECRET not in output + errors
    assert not [name for name in set(sys.modules) - modules if "evil" in name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"id": 3}',
        '{"id": "a", "recipe": "b", "created": "yesterday"}',
        "[" * 100_000,
        '{"created": "2026-01-01T00:00:00", "id": "a", "recipe": "b"}',
        '{"id": 3, "recipe": "b", "created": "2099-01-01T00:00:00+00:00"}',
        '{"recipe": null, "id": "a", "created": "2099-01-01T00:00:00+00:00"}',
        '{"parent": "../b", "id": "a", "recipe": "b", "created": "2099-01-01T00:00:00+00:00"}',
        r'{"id": "\u001b[2J", "recipe": "b", "created": "2099-01-01T00:00:00+00:00"}',
        r'{"id": "\ud800", "recipe": "b", "created": "2099-01-01T00:00:00+00:00"}',
    ],
    ids=lambda text: text[:14],
)
def test_a_senseless_run_does_not_hide_the_others(tmp_path: Path, text: str) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    (tmp_path / "senseless").mkdir()
    (tmp_path / "senseless" / "run.json").write_text(text)
    assert find_run(tmp_path, "last").id == find_run(tmp_path, run.id[-4:]).id == run.id
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        find_run(tmp_path, tmp_path / "senseless")


KEPT: dict[str, Any] = {
    "counters": {"skipped": 0, "skipped_in_a_row": 0.0, "roll_backs": 0, "ema_updates": 1},
    "extra": {
        "log": {"sums": {"video": {"": [float("nan"), 1.0]}}, "key_hash": 3},
        "heldout": {"0": {"val/loss/video": 1.0}},
        "data": [{"samples": 8, "replaced": 1, "num_processes": 1, "damaged": [["a.tar", "k", "short"]]}],
    },
}


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("counters", {"roll_backs": None}),
        ("counters", {"ema_updates": -1}),
        ("extra", {"log": None}),
        ("extra", {"log": {"sums": {}}}),
        ("extra", {"log": {"sums": {}, "key_hash": "3"}}),
        ("extra", {"log": {"sums": {"video": 3}, "key_hash": 3}}),
        ("extra", {"log": {"sums": {"video": {"": [None, 1]}}, "key_hash": 3}}),
        ("extra", {"heldout": None}),
        ("extra", {"heldout": {"one": {}}}),
        ("extra", {"heldout": {"0": {"val/loss/video": "low"}}}),
        ("extra", {"heldout": {"0": 3}}),
        ("extra", {"data": None}),
        ("extra", {"data": {"samples": 8}}),
        ("extra", {"data": [{"samples": 8}]}),
        ("extra", {"data": [{"samples": float("inf"), "replaced": 1, "num_processes": 1, "damaged": []}]}),
        ("extra", {"data": [{"samples": 8, "replaced": 1, "num_processes": 1, "damaged": [["a"]]}]}),
    ],
    ids=str,
)
def test_a_state_that_no_session_wrote_is_left_out_of_a_resume_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, values: dict[str, Any]
) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    commit_files(run.checkpoints_dir, state=json.dumps(STATE | KEPT))
    found = newest_checkpoint(run)
    assert found is not None and found.step == 1
    changed = {name: value for name, value in (KEPT[part] | values).items() if value is not None}
    commit_files(run.checkpoints_dir, state=json.dumps(STATE | KEPT | {part: changed}))
    with pytest.raises(CheckpointError, match=r"none of its 1 checkpoints can be read"):
        newest_checkpoint(run)
    assert "step-00000001: state.json is not of a run that can be resumed: " in capsys.readouterr().out


# --- folders of released weights ------------------------------------------------------------------------------------


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.fixture
def released(cogvideox_folder: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be made hostile; a user who is asked says yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    shutil.copytree(cogvideox_folder, tmp_path / "released")
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / "released" / part / "evil.py").write_text(code(canary))
    return tmp_path / "released"


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_pickled_weights_are_refused_for_safetensors(released: Path, canary: Path, part: str, suffix: str) -> None:
    for weights in (released / part).glob("*.safetensors"):
        weights.with_suffix(f".{suffix}").write_bytes(pickled(canary))
        weights.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors weights .*pickled weights are not opened"):
        if part == "vae":
            build_video_codec("cogvideox", released).encode(torch.zeros(1, 3, 1, 16, 16))
        else:
            build_text_encoder("t5", released).encode("a lamp")


def test_pickles_beside_safetensors_are_not_opened(released: Path, wav2vec2_folder: Path, canary: Path) -> None:
    shutil.copytree(wav2vec2_folder, released / "audio")
    clean = build_text_encoder("t5", released).encode("a lamp")
    for folder in (released / "vae", released / "text_encoder", released / "tokenizer", released / "audio"):
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "vocab.pkl", "training_args.bin"):
            (folder / name).write_bytes(pickled(canary))
    assert torch.equal(build_text_encoder("t5", released).encode("a lamp"), clean)
    build_video_codec("cogvideox", released).encode(torch.zeros(1, 3, 1, 16, 16))
    build_track_encoder("wav2vec2", released / "audio").encode(torch.zeros(16000), num_frames=12)


EVIL_CLASSES = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"auto_map": EVIL_CLASSES, "trust_remote_code": True}, None),
        ({"_attn_implementation": "evil/kernel"}, "names code to be fetched"),
        ({"attn_implementation": "evil/kernel"}, "names code to be fetched"),
        ({"quantization_config": {"quant_method": "evil"}}, "with code of its own"),
        ({"transformers_weights": "../other/model.safetensors"}, "names another file of weights"),
        ({"torch_dtype": "__import__('evil')"}, None),
        ({"custom_pipelines": {"evil": {"impl": "evil.Evil"}}, "pipeline_tag": "evil"}, None),
    ],
    ids=lambda values: next(iter(values)) if isinstance(values, dict) else "",
)
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_code_that_a_models_config_names_does_not_run(
    released: Path, part: str, values: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(released / part)
    change(released / part / "config.json", **values)
    with pytest.raises(UserError, match=f"{next(iter(values))}=.* {reason}") if reason else nullcontext():
        if part == "vae":
            build_video_codec("cogvideox", released).encode(torch.zeros(1, 3, 1, 16, 16))
        else:
            build_text_encoder("t5", released).encode("a lamp")
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/other/model.safetensors", "model.bin", ".."])
def test_an_index_cannot_lead_to_weights_elsewhere(released: Path, name: str) -> None:
    change(released / "text_encoder" / "model.safetensors.index.json", weight_map={"shared.weight": name})
    with pytest.raises(UserError, match=r"names '.*', not a \.safetensors file beside it"):
        build_text_encoder("t5", released)


def test_an_adapter_beside_the_weights_neither_runs_nor_leads_elsewhere(released: Path, canary: Path) -> None:
    shutil.copytree(released / "text_encoder", released / "other")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(released / "other"), "target_modules": ["q"], "r": 2}
    change(released / "text_encoder" / "adapter_config.json", **adapter)
    (released / "text_encoder" / "adapter_model.bin").write_bytes(pickled(canary))
    with pytest.raises(UserError, match=r"codecs\.text_weights: .* holds adapter_config\.json"):
        build_text_encoder("t5", released)


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
        {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "trust_remote_code": True},
    ],
    ids=["known class", "unknown class", "asks for trust"],
)
def test_code_that_a_tokenizers_config_names_does_not_run(
    released: Path, canary: Path, values: dict[str, object]
) -> None:
    clean = build_text_encoder("t5", released).encode("a lamp")
    change(released / "tokenizer" / "tokenizer_config.json", **values)
    assert torch.equal(build_text_encoder("t5", released).encode("a lamp"), clean)


# --- our own sources ------------------------------------------------------------------------------------------------

PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "hydra"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "breakpoint"}
RUNS_WORDS = {"system", "popen", "getoutput", "getstatusoutput", "startfile", "execv", "execvp", "spawnv", "execl"}
SAFE_YAML = {"safe_load", "safe_load_all", "safe_dump", "safe_dump_all", "dump", "dump_all"}
MUST_BE = {
    "weights_only": True, "use_safetensors": True, "local_files_only": True, "allow_pickle": False, "shell": False,
    "trust_remote_code": False, "resolve": False,
}  # fmt: skip
LOADS_BY_NAME = {
    "avlit/__main__.py": "a key of COMMANDS",
    "avlit/config.py": "a folder of recipes/",
    "avlit/commands/assembly.py": "a folder of recipes/",
    "data/prepare/separation.py": "a constant",
    "data/prepare/face_mesh.py": "a constant",
}
"""Where a module is imported by a name that is computed, and where that name comes from."""


def dangers(source: str, path: str = "avlit/x.py") -> list[str]:
    """What in a source could run code, or read a variable, that a file names; with line numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            dotted = names
        elif isinstance(node, ast.Call):
            dotted = [ast.unparse(node.func)]
            found += [f"{node.lineno}: {reason}" for reason in _call_dangers(node, dotted[0], path)]
        else:
            continue
        found += [f"{node.lineno}: {name}" for name in dotted if _is_dangerous(name)]
    return found


def _is_dangerous(dotted: str) -> bool:
    first, last = dotted.split(".")[0], dotted.split(".")[-1]
    return (
        first in PICKLING
        or (first == "yaml" and first != last and last not in SAFE_YAML and "oad" in last)
        or (first in ("os", "subprocess") and last in RUNS_WORDS)
        or last in ("load_from_checkpoint", "register_new_resolver", "unsafe_load", "UnsafeLoader", "CUnsafeLoader")
        or dotted in ("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "code.interact")
    )


def _call_dangers(call: ast.Call, name: str, path: str) -> Iterator[str]:
    given = {word.arg: word.value for word in call.keywords if word.arg}
    for key, wanted in MUST_BE.items():
        if key in given and not (isinstance(given[key], ast.Constant) and ast.literal_eval(given[key]) is wanted):
            yield f"{name}({key}=…) must be {wanted}"
    if name in RUNS_TEXT:
        yield name
    if name == "torch.load" and "weights_only" not in given:
        yield "torch.load without weights_only=True"
    if name.endswith("from_pretrained"):
        has_weights = not name.split(".")[0].endswith(("Config", "Tokenizer", "FeatureExtractor"))
        for key in ["local_files_only"] + ["use_safetensors"] * has_weights:
            if key not in given:
                yield f"{name} without {key}=True"
    if name in ("importlib.import_module", "import_module"):
        is_constant = isinstance(call.args[0], ast.Constant)
        if not is_constant and path not in LOADS_BY_NAME:
            yield "import_module of a computed name"


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c", "from joblib import load",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)", "yaml.load(text, Loader=yaml.Loader)", "yaml.full_load(text)",
        "from yaml import load", "yaml.unsafe_load(text)", "eval(text)", "exec(text)", "__import__(name)",
        "subprocess.run(words, shell=True)", "os.system(word)", "from os import system", "os.popen(word)",
        "AutoModel.from_pretrained(p)", "M.from_pretrained(p, local_files_only=True)",
        "M.from_pretrained(p, local_files_only=True, use_safetensors=False)",
        "AutoTokenizer.from_pretrained(p)",
        "AutoTokenizer.from_pretrained(p, local_files_only=True, trust_remote_code=True)",
        "importlib.import_module(config.target)", "import_module(f'{a}.b')", "OmegaConf.to_container(c, resolve=True)",
        "OmegaConf.register_new_resolver('x', f)", "M.load_from_checkpoint(p)", "torch.hub.load(r, m)",
        "def f():\n    class A:\n        x = lambda: eval('1')",
    ],
)  # fmt: skip
def test_the_search_finds_what_is_dangerous(bad: str) -> None:
    assert len(dangers(bad)) >= 1


@pytest.mark.parametrize(
    "good",
    [
        "torch.load(path, weights_only=True)", "np.load(path)", "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)", "subprocess.run(words)", "model.eval()", "re.compile(text)", "json.load(file)",
        "M.from_pretrained(p, local_files_only=True, use_safetensors=True)", "importlib.import_module('recipes')",
        "T5Config.from_pretrained(p, local_files_only=True)", "OmegaConf.to_container(c, resolve=False)",
    ],
)  # fmt: skip
def test_the_search_passes_what_is_not(good: str) -> None:
    assert dangers(good) == []


def test_our_own_sources_neither_unpickle_nor_run_what_a_file_names() -> None:
    packages = ("avlit", "data", "callbacks", "recipes", "benchmarks")
    sources = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(sources) > 50
    found = {}
    for path in sources:
        name = str(path.relative_to(ROOT))
        if dangerous := dangers(path.read_text(encoding="utf-8"), name):
            found[name] = dangerous
    assert found == {}
