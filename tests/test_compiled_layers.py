"""Compiled layers share a graph where they are alike, whatever the model, and compute what uncompiled ones do."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import GraphModule

from avlit.models import backbones
from avlit.models.backbones import LayerRun
from avlit.strategies import Sharding
from tests import test_bypass, test_mst_controlnet, test_twin_mmdit, test_twin_wan

Outputs = Callable[[], tuple[Tensor, ...]]


def mtv(num_layers: int) -> tuple[nn.Module, Outputs]:
    config = replace(test_mst_controlnet.TINY, num_layers=num_layers)
    model, x = test_mst_controlnet.awake(config), test_mst_controlnet.inputs(config)
    return model, lambda: (model(**x),)


def unitalking(num_layers: int) -> tuple[nn.Module, Outputs]:
    model, x = test_twin_wan.awake(replace(test_twin_wan.TINY, num_layers=num_layers)), test_twin_wan.inputs()
    return model, lambda: test_twin_wan.both(model(**x, mode=["joint", "one-way"]))


def jova(num_layers: int) -> tuple[nn.Module, Outputs]:
    config = replace(
        test_twin_mmdit.TINY, num_layers=num_layers, num_single_layers=num_layers, fusion="cross_linear"
    )  # fmt: skip
    model, x = test_twin_mmdit.awake(config), test_twin_mmdit.inputs()
    return model, lambda: test_twin_mmdit.both(model(**x))


def mmcontrol(num_layers: int) -> tuple[nn.Module, Outputs]:
    model = test_bypass.built(replace(test_bypass.TINY, num_layers=2 * num_layers), trained=True).requires_grad_(True)
    x = test_bypass.inputs(images=1, voices=test_bypass.P)
    control = test_bypass.controls(image=True, voice=True)
    return model, lambda: test_bypass.both(model(**x, control=control))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GraphModule]]:
    """Every graph that is made in the test; they run as they are, no code is generated."""
    found: list[GraphModule] = []

    def backend(graph: GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    compile_ = torch.compile
    torch._dynamo.reset()
    backbones.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_(function, backend=backend, **settings))
    yield found
    torch._dynamo.reset()
    backbones.compiled.cache_clear()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process, for what shards."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model: nn.Module, outputs: Outputs, run: LayerRun) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter that has one."""
    model.layer_run = run  # pyright: ignore[reportArgumentType] no module, whatever nn.Module declares
    model.zero_grad()
    loss = torch.stack([each.square().mean() for each in outputs()]).sum()
    loss.backward()
    gradients: dict[str, Any] = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    whole = {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in gradients.items()}
    return {"loss": loss.detach(), **{name: each.clone() for name, each in whole.items()}}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))


# JoVA has dual and single blocks, MMControl layers with a bypass block and without.
@pytest.mark.parametrize(("build", "kinds"), [(mtv, 1), (unitalking, 1), (jova, 2), (mmcontrol, 2)])
def test_a_kind_of_layer_is_compiled_once_however_many_layers_there_are(
    graphs: list[GraphModule], build: Callable[[int], tuple[nn.Module, Outputs]], kinds: int
):
    for num_layers in (2, 3):
        model, outputs = build(num_layers)
        expected = step(model, outputs, LayerRun())
        found = step(model, outputs, LayerRun("blocks", is_compiled=True))
        compare(found, expected)
        assert len(graphs) == kinds


def test_a_sharded_layer_is_gathered_around_its_graph(graphs: list[GraphModule], alone: None):
    model, outputs = unitalking(3)
    expected = step(model, outputs, LayerRun())
    Sharding().shard(model, init_device_mesh("cpu", (1,)))
    compare(step(model, outputs, LayerRun(is_compiled=True)), expected)
    assert len(graphs) == 1
