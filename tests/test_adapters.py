"""Adapters: nothing changes when they are put in, nothing else is trained, and a checkpoint holds them alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avlit.adapters import AdapterState, adapter_layers, add_adapter, is_adapter_name, merge
from avlit.checkpoints import Checkpoint, load_checkpoint, newest_valid
from avlit.commands import resume, sample
from avlit.commands.adapted import root_of
from avlit.commands.assembly import build_module
from avlit.commands.generation import load_trained
from avlit.commands.train import Outcome, train
from avlit.commit import CheckpointError
from avlit.config import AdapterConfig, Config, ConfigError, from_yaml, load_config
from avlit.module import AVModule
from callbacks.adapters import Adapter, FrozenWeightsChangedError
from tests import kill_fuzz
from tests.kill_fuzz import tiny


def module_of(recipe: str) -> tuple[AVModule, Config]:
    """A tiny module of random weights, none of them zero, so that every layer matters."""
    config = load_config((*tiny([f"recipe={recipe}"]), f"recipe={recipe}"))
    module = build_module(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module, config


def adapted(module: AVModule, config: Config, **settings: object) -> AVModule:
    adapter = replace(AdapterConfig(kind="lora", rank=4), **settings)
    add_adapter(module, adapter, parts=config.adapter_parts, own_modules=config.own_modules)
    return module


def linear_outputs(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """What each of the layers makes of the same noise."""
    found = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        noise = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
        found[name] = layer(noise)
    return found


def move(module: AVModule) -> None:
    """Give the adapter an update, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.trained_parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


# Put in, trained by hand, taken out.


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [("mtv_stage5", "lora"), ("mtv_stage5", "dora"), ("unitalking_stage2", "dora"), ("jova_stage2", "rslora"),
     ("mmcontrol", "lora")],
)  # fmt: skip
def test_an_adapter_as_put_in_changes_no_bit_and_merged_equals_unmerged(recipe: str, kind: str):
    module, config = module_of(recipe)
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    model, names = module.model.eval(), AdapterState.of
    layers = tuple(name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    as_built = linear_outputs(model, layers)
    adapted(module, config, kind=kind)
    state = names(module.adapter)
    assert state.names and set(state.names) == adapter_layers(model).keys()
    assert all(torch.equal(linear_outputs(model, layers)[name], as_built[name]) for name in layers)
    assert module.saved_weights().keys() == module.trained_parameters.keys()
    assert all(is_adapter_name(name) for name in module.saved_weights())

    move(module)
    unmerged = linear_outputs(model, layers)
    assert all(not torch.equal(unmerged[name], as_built[name]) for name in state.names)
    assert all(torch.equal(unmerged[name], as_built[name]) for name in set(layers) - set(state.names))
    merge(model)
    for name, merged in linear_outputs(model, layers).items():
        torch.testing.assert_close(merged, unmerged[name], rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name.removesuffix(".weight") for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(state.names)


def test_the_same_seed_draws_the_same_adapter_and_the_scale_is_what_the_kind_says():
    drawn = []
    for _ in range(2):
        module, config = module_of("mtv_stage5")
        torch.rand(7)  # whatever ran before
        adapted(module, config, kind="rslora", alpha=6.0)
        drawn.append(module.saved_weights())
    assert drawn[0].keys() == drawn[1].keys()
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    layer = next(iter(adapter_layers(module.model).values()))
    assert layer.scaling["default"] == AdapterState.of(module.adapter).scaling == 3.0  # 6 / sqrt(4)


@pytest.mark.parametrize(
    ("recipe", "modality", "beginning"),
    [
        ("mtv_stage5", "video", "backbone."), ("mtv_stage5", "controlnet", ("injections.", "control.")),
        ("unitalking_stage2", "audio", ("audio.", "audio_references.")), ("jova_stage2", "audio", "audio."),
        ("mmcontrol", "bypass", "bypass."), ("mmcontrol", "audio,video", "backbone.transformer_blocks."),
    ],
)  # fmt: skip
def test_one_modality_is_adapted_alone(recipe: str, modality: str, beginning: str | tuple[str, ...]):
    module, config = module_of(recipe)
    adapted(module, config, modality=modality)
    assert module.trained_parameters and all(name.startswith(beginning) for name in module.trained_parameters)


def test_own_modules_train_whole_and_the_backbone_not_at_all():
    module, config = module_of("mtv_stage5")
    adapted(module, config, kind="own")
    assert module.trained_parameters.keys() == {
        name for name, _ in module.model.named_parameters() if not name.startswith("backbone.")
    }
    assert module.saved_weights().keys() >= module.trained_parameters.keys()
    assert not any(name.startswith("backbone.") for name in module.saved_weights())


def test_the_base_of_an_adapter_is_known_by_its_content():
    fingerprints = []
    for change in (0.0, 0.0, 1e-3):
        module, config = module_of("mtv_stage5")
        weight: Tensor = module.model.get_parameter("control.blocks.0.to_out.weight")
        weight.data.view(-1)[0] += change
        fingerprints.append(adapted(module, config).base_model)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


# Words.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=lora"], r"adapter=lora: needs trained weights to stand on; give init=RUN"),
        (["adapter=lora", "adapter.kind=dora", "init=x"], r"adapter.kind=dora: mean the same; keep one"),
        (["adapter=loar", "init=x"], r"adapter.kind=loar .*must be one of none, lora, dora, rslora, own"),
        (["adapter.rank=4"], r"adapter.rank=4: has no effect while adapter.kind=none"),
        (["adapter=own", "adapter.rank=4", "init=x"], r"adapter.rank=4: has no effect while adapter.kind=own"),
        (["adapter=lora", "adapter.rank=0", "init=x"], r"adapter.rank=0 .*at least 1"),
        (["adapter=lora", "adapter.modality=vidoe", "init=x"], r"adapter.modality=vidoe: .*did you mean video"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_answered(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(["recipe=mtv_stage5", *words])


def test_targets_that_name_no_layer_are_refused_with_those_there_are():
    module, config = module_of("mtv_stage5")
    with pytest.raises(ConfigError, match=r"no linear layer of adapter.modality=video ends so; there are .*to_q"):
        adapted(module, config, targets=["to_x"], modality="video")
    with pytest.raises(ConfigError, match=r"to_x ends the name of no linear layer of video, controlnet"):
        adapted(module, config, targets=["to_q", "to_x"])


# Runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def command(folder: Path) -> Callable[..., Outcome]:
    """`just train` with everything in `folder`."""

    def run(*more: str) -> Outcome:
        kill_fuzz.keep_in_spool()
        given = [
            *tiny(more), "recipe=mtv_stage5", f"runs_dir={folder}/runs", "tracking.uri=offline",
            f"data.cache_dir={folder}/cache", "data.subsets={basic_face: 1}", "train.accelerator=cpu", "sample.every=0",
            "ema.decay=0.9",
        ]  # fmt: skip
        return train(load_config(list({word.partition("=")[0]: word for word in (*given, *more)}.values())))

    return run


@pytest.fixture(scope="module")
def base(command: Callable[..., Outcome]) -> Outcome:
    return command("train.steps=2", "sample.count=0")


@pytest.fixture(scope="module")
def lora(command: Callable[..., Outcome], base: Outcome) -> Outcome:
    return command(f"init={base.run.path}", "train.steps=4", "adapter=lora", "adapter.rank=2", "adapter.dropout=0.2")


def newest(outcome: Outcome) -> Checkpoint:
    checkpoint, _ = newest_valid(outcome.run.checkpoints_dir)
    assert checkpoint is not None
    return checkpoint


def test_a_run_trains_the_adapter_alone_and_its_checkpoints_hold_nothing_else(base: Outcome, lora: Outcome):
    checkpoint, under = newest(lora), newest(base)
    assert all(is_adapter_name(name) for name in (*checkpoint.weights(), *checkpoint.ema()))
    assert any(bool(tensor.any()) for name, tensor in checkpoint.weights().items() if ".lora_B." in name)
    assert root_of(checkpoint) is not None and root_of(checkpoint).path == under.path  # pyright: ignore
    size, whole = ((each.path / "weights.safetensors").stat().st_size for each in (checkpoint, under))
    assert size < whole / 10
    config = from_yaml(lora.run.read_config())
    module = load_trained(config, checkpoint)
    averaged = under.averaged()
    now = {name.replace(".base_layer", ""): tensor for name, tensor in module.model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in averaged.items())
    assert lora.metrics.keys() & {"val/loss/video"}


def test_a_resumed_adapter_run_equals_one_that_was_not_stopped(lora: Outcome, folder: Path):
    copy = folder / "runs" / f"{lora.run.id[:-4]}ffff"
    shutil.copytree(lora.run.path, copy)
    record = json.loads((copy / "run.json").read_text()) | {"id": copy.name, "status": "running"}
    (copy / "run.json").write_text(json.dumps(record))
    for late in sorted((copy / "checkpoints").glob("step-*"))[-1:]:
        shutil.rmtree(late)
    assert resume.main([f"run={copy}", f"runs_dir={folder}/runs"]) == 0
    resumed, _ = newest_valid(copy / "checkpoints")
    assert resumed is not None and resumed.step == 4
    for read in (Checkpoint.weights, Checkpoint.ema, Checkpoint.optimizer):
        there, here = read(newest(lora)), read(resumed)
        assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)


def test_an_adapter_run_samples_and_is_gone_on_with(
    command: Callable[..., Outcome], lora: Outcome, base: Outcome, folder: Path
):
    assert sample.main([f"run={lora.run.path}", "sample.count=1", f"out={folder}/clips"]) == 0
    assert list((folder / "clips").glob("*.mp4"))
    further = command(
        f"init={lora.run.path}", "train.steps=1", "adapter=lora", "adapter.rank=2", "sample.count=0",
    )  # fmt: skip
    assert newest(further).state.base_model == newest(lora).state.base_model
    assert newest(further).state.lineage[:-1] == newest(lora).state.lineage
    assert root_of(newest(further)).path == newest(base).path  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(ConfigError, match=r"adapter.rank=3: init=.* has adapter.rank=2; give that"):
        command(f"init={lora.run.path}", "train.steps=1", "adapter=lora", "adapter.rank=3")
    with pytest.raises(ConfigError, match=r"holds an adapter alone; say adapter=lora to go on with it"):
        command(f"init={lora.run.path}", "train.steps=1")


def test_an_adapter_is_refused_on_a_base_it_was_not_trained_on(lora: Outcome, base: Outcome, folder: Path):
    config, checkpoint = from_yaml(lora.run.read_config()), newest(lora)
    other = folder / "elsewhere" / lora.run.id
    shutil.copytree(lora.run.path, other)
    with pytest.raises(CheckpointError, match=r"trained on base weights"):
        fake = replace(checkpoint, state=replace(checkpoint.state, base_model="0" * 32))
        load_trained(config, fake)
    shutil.move(newest(base).path, folder / "away")
    try:
        with pytest.raises(CheckpointError, match=r"holds an adapter alone; the base was in .*; put that checkpoint"):
            root_of(load_checkpoint(checkpoint.path))
    finally:
        shutil.move(folder / "away", base.run.checkpoints_dir / "step-00000002")


def test_a_frozen_weight_that_changes_ends_the_run():
    module, config = module_of("mtv_stage5")
    reported: list[dict[str, float]] = []
    watch = Adapter(
        AdapterConfig(kind="lora", rank=4),
        parts=config.adapter_parts,
        own_modules=config.own_modules,
        report=lambda metrics, step: reported.append(metrics),
    )

    class Trainer:
        is_global_zero, world_size, global_step = True, 1, 0

    watch.setup(Trainer(), module, "fit")  # pyright: ignore[reportArgumentType]
    before = list(module.trained_parameters)
    watch.setup(Trainer(), module, "fit")  # pyright: ignore[reportArgumentType]  a second one puts in nothing
    assert list(module.trained_parameters) == before and all(map(is_adapter_name, before))
    watch.on_fit_start(Trainer(), module)  # pyright: ignore[reportArgumentType]
    move(module)
    watch.on_train_end(Trainer(), module)  # pyright: ignore[reportArgumentType]
    assert reported[0].keys() == {"adapter/video", "adapter/controlnet"} and min(reported[0].values()) > 0
    name, frozen = next((n, p) for n, p in module.model.named_parameters() if not p.requires_grad)
    frozen.data.view(-1)[0] += 1e-6
    with pytest.raises(FrozenWeightsChangedError, match=name):
        watch.on_train_end(Trainer(), module)  # pyright: ignore[reportArgumentType]
