"""A run on several ranks, sharded or copied, computes what one process computes, wherever it is stopped and resumed."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F

from avlit.checkpoints import Checkpoint, newest_valid
from avlit.commands.assembly import build_module
from avlit.commit import CheckpointError
from avlit.config import OptimizerConfig, from_yaml, load_config, to_yaml
from avlit.eight_bit import moment_bytes
from avlit.errors import ConfigError
from avlit.inherit import flatten_optimizer, restore_optimizer
from avlit.launch import Launch, find_launch
from avlit.models.attention import Attention, AttentionMode
from avlit.module import build_optimizer
from avlit.ranks import is_first, like_sharded
from avlit.runs import Run, list_runs
from avlit.strategies import lower_frozen, plan_strategy
from tests.kill_fuzz import ROOT, preload, read_points, tiny
from tests.ranks import Ranks, as_srun, as_torchrun
from tests.strategy_worker import POISON, TERMINATE

STEPS = 20
RARE = ("checkpoint.every=1000", "validation.every=1000", "sample.every=10")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def words(folder: Path, cache: Path, ranks: int, *more: str) -> list[str]:
    """Words of a run of seconds with everything in `folder`; later ones replace earlier ones."""
    given = [
        *tiny(more), f"runs_dir={folder}/runs", "tracking.uri=offline",
        f"data.cache_dir={cache}", "train.accelerator=cpu", f"train.steps={STEPS}", *RARE, f"train.devices={ranks}",
        *more,
    ]  # fmt: skip
    return list({word.partition("=")[0]: word for word in given}.values())


def ended(folder: Path, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[int | None]:
    """The exit statuses of a command's ranks, none of which failed."""
    ranks = Ranks(folder, command, environments)
    statuses = ranks.end()
    assert set(statuses) <= {0, 143}, ranks.printed()[-5000:]
    return statuses


def saved(folder: Path, recipe: str = "") -> tuple[Run, Checkpoint]:
    """The newest run of the recipe with its newest checkpoint."""
    run = [run for run in list_runs(folder / "runs") if recipe in ("", run.recipe)][-1]
    checkpoint, _ = newest_valid(run.checkpoints_dir)
    assert checkpoint is not None
    return run, checkpoint


def assert_equal(one: Path, other: Path, recipe: str = "") -> None:
    """The same run: the same clips, losses, skipped updates, weights, average and moments to 1e-5."""
    (run_a, a), (run_b, b) = saved(one, recipe), saved(other, recipe)
    assert a.step == b.step == STEPS
    assert a.state.counters == b.state.counters
    points_a, points_b = (read_points(run.spool_dir / "metrics.jsonl") for run in (run_a, run_b))
    losses = [place for place in points_a if place[0].startswith(("train/loss/", "val/loss/"))]
    assert len({step for _, step in losses}) == STEPS + 1
    for place in losses:
        assert max(points_b[place]) == pytest.approx(max(points_a[place]), rel=1e-5, abs=1e-6, nan_ok=True), place
    for place in [place for place in points_a if place[0] == "data/key_hash"]:
        assert points_a[place] == points_b[place]
    for part in ("weights", "ema", "optimizer"):
        of_a, of_b = getattr(a, part)(), getattr(b, part)()
        assert of_a.keys() == of_b.keys() and of_a
        for name, tensor in of_a.items():
            difference = (of_b[name] - tensor).abs() - 1e-5 * tensor.abs()
            assert difference.max() <= 1e-5, f"{part} {name}: {difference.max():.1e}"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run in one process, not sharded: clipped at almost every step, one update left out."""
    folder = tmp_path_factory.mktemp("one")
    given = words(folder, cache, 1, "recipe=mtv_stage1", "optimizer.clip=0.05")
    assert ended(folder, ["train", *given], [each | {POISON: "5:3"} for each in as_torchrun(1)]) == [0]
    assert saved(folder)[1].state.counters["skipped"] == 1
    return folder


@pytest.mark.parametrize(("first", "then", "asked"), [(2, 1, 1), (1, 2, 0)])
def test_a_sharded_run_equals_one_process_and_is_resumed_on_another_number_of_ranks(
    tmp_path: Path, cache: Path, one: Path, first: int, then: int, asked: int
):
    given = words(tmp_path, cache, first, "recipe=mtv_stage1", "optimizer.clip=0.05", "strategy=fsdp2")
    disturbed = [each | {POISON: "5:3", TERMINATE: f"9:{asked}"} for each in as_torchrun(first)]
    assert ended(tmp_path, ["train", *given], disturbed) == [143, 0][:first]
    before = saved(tmp_path)[1]
    assert before.step == 10
    files = ["state.json"] + [
        f"{part}.safetensors" if first == 1 else f"{part}.part-{number:05d}-of-00002.safetensors"
        for part in ("weights", "ema", "optimizer")
        for number in range(1, first + 1)
    ]
    assert sorted(files) == list(before.files)
    resume = ["resume", "run=last", f"runs_dir={tmp_path}/runs", "allow_change=true", f"train.devices={then}"]
    if then == 2:
        resume.append("train.accumulate=2")
    assert set(ended(tmp_path, resume, as_torchrun(then))) == {0}
    assert_equal(one, tmp_path)


def test_a_frozen_backbone_with_a_bypass_on_two_ranks_equals_one_stage_after_stage(tmp_path: Path, cache: Path):
    folders = [tmp_path / "1", tmp_path / "2"]
    for ranks, folder in enumerate(folders, start=1):
        more = ["strategy=fsdp2", "strategy.shard=grads"] if ranks == 2 else []
        given = words(folder, cache, ranks, "recipe=mmcontrol", "sample.count=0", *more)
        assert set(ended(folder, ["curriculum", *given], as_torchrun(ranks))) == {0}
    assert_equal(folders[0], folders[1], "mmcontrol_backbone")
    assert_equal(folders[0], folders[1], "mmcontrol")


def test_an_adapter_on_two_ranks_that_srun_started_equals_one(tmp_path: Path, cache: Path, one: Path):
    folders = [tmp_path / "1", tmp_path / "2"]
    init = saved(one)[1].path
    for folder, environments, more in zip(folders, (as_torchrun(1), as_srun(2)), ([], ["strategy=fsdp2"]), strict=True):
        lora = ["adapter=lora", "adapter.rank=2", f"init={init}", "sample.count=0"]
        given = words(folder, cache, len(environments), "recipe=mtv_stage1", *lora, *more)
        assert set(ended(folder, ["train", *given], environments)) == {0}
    assert_equal(folders[0], folders[1])


def test_who_a_process_is_comes_from_what_started_it():
    torchrun, srun = as_torchrun(8, nodes=2)[5], as_srun(4)[3]
    assert find_launch({}) is None
    assert find_launch(torchrun) == Launch("torchrun", rank=5, world_size=8, local_rank=1, local_size=4)
    assert torchrun["GROUP_RANK"] == "1" and Launch("torchrun", 5, 8, 1, 4).nodes == 2
    assert find_launch(srun) == Launch("srun", rank=3, world_size=4, local_rank=3, local_size=4)
    assert find_launch({name: value for name, value in srun.items() if name != "SLURM_STEP_ID"}) is None  # in sbatch
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        find_launch({name: value for name, value in srun.items() if name != "SLURM_NTASKS_PER_NODE"})
    with pytest.raises(ConfigError, match="started 8 processes, 3 on this node"):
        find_launch(torchrun | {"LOCAL_WORLD_SIZE": "3"})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["strategy.cpu_offload=true", "strategy=fsdp2"], "in the host's memory already"),
        (["strategy.shard=grads"], r"strategy\.shard=grads: has no effect, since strategy=auto shards nothing"),
        (["strategy=ddp", "strategy.shard=grads"], r"has no effect while strategy\.name=ddp"),
        (["strategy=fsdp2", "strategy.shard=node"], "there is one node"),
        (["attention=flash_attn"], "need a GPU and precision=bf16, here is a CPU and precision=fp32"),
        (["attention=flex"], "no backward pass on a CPU"),
        (["compile=blocks", "strategy.activation_checkpointing=selective"], "sees no operation inside"),
        (["strategy=ddp", "strategy.name=fsdp2"], "mean the same; keep one"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(given: list[str], reason: str):
    with pytest.raises(ConfigError, match=reason):
        plan_strategy(load_config(["recipe=mtv_stage1", "train.accelerator=cpu", *given]))


def test_ranks_that_were_started_from_outside_must_be_as_many_as_the_config_says(monkeypatch: pytest.MonkeyPatch):
    for name, value in as_torchrun(4, nodes=2)[0].items():
        monkeypatch.setenv(name, value)
    given = ["recipe=mtv_stage1", "train.accelerator=cpu", "strategy=fsdp2", "strategy.shard=node"]
    with pytest.raises(ConfigError, match=r"train\.devices=1: torchrun started 4 processes; set train\.devices=4"):
        plan_strategy(load_config(given))
    plan = plan_strategy(load_config([*given, "train.devices=4"]))
    assert plan.sharding is not None and plan.sharding.copies == 2


def test_a_run_from_before_the_keys_moved_reads_as_it_was_trained():
    old: Any = OmegaConf.create(to_yaml(load_config(["recipe=mtv_stage1", "strategy=ddp"])))
    del old["strategy"], old["precision"]
    old["train"] |= {"precision": "bf16", "strategy": "ddp", "gradient_checkpointing": True}
    config = from_yaml(OmegaConf.to_yaml(old))
    assert (config.precision, config.strategy.name, config.strategy.activation_checkpointing) == (
        "bf16",
        "ddp",
        "blocks",
    )


def test_frozen_weights_in_bfloat16_change_no_number_and_those_that_a_checkpoint_holds_stay():
    config = load_config(["recipe=mtv_stage1", *tiny(["recipe=mtv"]), "model.trainable=control"])
    module = build_module(config)
    module.freeze()
    module.released = frozenset(name for name in module.model.state_dict() if name.startswith("backbone."))
    module.released -= {"backbone.proj_out.weight"}
    model, latents = module.model, torch.randn(1, 48, 2, 8, 8)
    tracks = {name: torch.randn(1, 5, 4, 32) for name in ("speech", "effects", "music")}
    inputs = {"timestep": torch.tensor([500]), "text": torch.randn(1, 4, 64), **tracks}
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(latents, **inputs)
        lower_frozen(module)
        after = model(latents, **inputs)
    assert torch.equal(before, after)
    low = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert "backbone.transformer_blocks.0.attn1.to_q.weight" in low and "backbone.proj_out.weight" not in low
    assert all(name.startswith("backbone.") for name in low)


def test_moments_in_8_bits_go_on_bit_for_bit_and_leave_out_what_is_not_finite():
    pytest.importorskip("torchao")
    config, x = OptimizerConfig(lr=1e-2, states="8bit"), torch.randn(32, 256)

    def made(weights: dict[str, torch.Tensor] | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 256))
        if weights:
            model.load_state_dict(weights)
        return model, build_optimizer(model.parameters(), config)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with torch.compiler.set_stance("force_eager"):  # torchao compiles its update, which takes long
        model, optimizer = made()
        assert steps(model, optimizer)[-1] < 0.9 * steps(*made())[0]
        moments, meta = flatten_optimizer(optimizer, dict(model.named_parameters()))
        assert (
            moments["0.weight/exp_avg.codes"].dtype == torch.uint8 and moments["0.bias/exp_avg"].dtype == torch.float32
        )
        assert moments["0.weight/exp_avg.scale"].shape == (128, 1)  # a scale for each block of a row
        weight = model.get_parameter("0.weight")
        kept = sum(tensor.nbytes for name, tensor in moments.items() if name.startswith("0.weight/exp_avg."))
        assert kept == weight.numel() * moment_bytes(weight)
        moments = {name: tensor.clone() for name, tensor in moments.items()}
        resumed, again = made({name: tensor.clone() for name, tensor in model.state_dict().items()})
        restore_optimizer(again, dict(resumed.named_parameters()), moments, meta)
        assert steps(resumed, again) == steps(model, optimizer)
        optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
        before = [parameter.clone() for parameter in model.parameters()]
        steps(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    plain = build_optimizer(model.parameters(), OptimizerConfig())
    with pytest.raises(CheckpointError, match=r"optimizer\.states=fp32: the checkpoint's moments are 8bit"):
        restore_optimizer(plain, dict(model.named_parameters()), moments, meta)


SIZES = ((64, 256), (33, 512), (5, 1024), (96, 130), (7,))
"""Of weights: even and uneven over two ranks, in parts too small for torchao's own rule, and kept in float32."""


def updated(folder: Path, *, ranks: int, begins: str | None, ends: str) -> None:
    """Five updates in 8 bits, in this process as rank 0 or one of two; from the files `begins` to the files `ends`."""
    config, model = OptimizerConfig(lr=1e-2, states="8bit"), nn.ParameterDict()
    before: dict[str, torch.Tensor] = load_file(folder / f"{begins}.safetensors") if begins else {}
    for number, size in enumerate(SIZES):
        drawn = torch.randn(size, generator=torch.Generator().manual_seed(number))
        model[f"w{number}"] = nn.Parameter(before.get(f"w{number}", drawn))
    if ranks > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    names = dict(model.named_parameters())
    optimizer = build_optimizer(model.parameters(), config)
    if begins:
        moments = {name: tensor for name, tensor in before.items() if "/" in name}
        restore_optimizer(optimizer, names, moments, json.loads((folder / f"{begins}.json").read_text()))
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its update, which takes long
        for step in range(5):
            draws = torch.Generator().manual_seed(100 + step + 5 * bool(begins))
            for parameter in names.values():
                gradient = torch.randn(parameter.shape, generator=draws)
                parameter.grad = like_sharded(gradient, parameter)
            optimizer.step()
    moments, meta = flatten_optimizer(optimizer, names)
    found = {
        name: getattr(tensor, "full_tensor", tensor.clone)().detach() for name, tensor in {**names, **moments}.items()
    }
    if is_first():
        save_file(found, folder / f"{ends}.safetensors")
        (folder / f"{ends}.json").write_text(json.dumps(meta))


def updated_on_two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    torch.set_num_threads(1)
    updated(folder, ranks=2, begins=None, ends="two")
    updated(folder, ranks=2, begins="one", ends="one, then two")
    dist.destroy_process_group()


def test_moments_in_8_bits_are_the_same_on_any_number_of_ranks(tmp_path: Path):
    pytest.importorskip("torchao")
    updated(tmp_path, ranks=1, begins=None, ends="one")
    preload()
    start_processes(updated_on_two, (tmp_path,), nprocs=2, start_method="forkserver")
    updated(tmp_path, ranks=1, begins="two", ends="two, then one")
    updated(tmp_path, ranks=1, begins="one", ends="one, then one")
    for a, b in (("one", "two"), ("one, then one", "two, then one"), ("one, then one", "one, then two")):
        of_a, of_b = (load_file(tmp_path / f"{name}.safetensors") for name in (a, b))
        assert of_a.keys() == of_b.keys()
        assert {name.partition("/")[0] for name in of_a if name.endswith(".codes")} == {"w0", "w1", "w2"}
        assert all(torch.equal(of_a[name], of_b[name]) for name in of_a)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="their kernels need a GPU")
@pytest.mark.parametrize("backend", ["flash_attn", "flex"])
def test_other_attention_computes_what_torch_does(backend: Attention):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    query, key, value = (torch.randn(2, 3, n, 64, device="cuda", dtype=torch.bfloat16) for n in (200, 300, 300))
    seen = torch.rand(2, 1, 1, 300, device="cuda") > 0.3
    for mask in (None, seen):
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        with AttentionMode(backend):
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_slurm_job_trains_goes_on_with_what_it_began_and_requeues_what_was_stopped(tmp_path: Path):
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    for name in ("srun", "scontrol"):
        script = f'#!/bin/bash\necho {name} "$@" >> {calls}\n[ {name} = scontrol ] || exit "$STATUS"\n'
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_NTASKS": "16",
    }  # fmt: skip

    def job(status: int) -> list[str]:
        calls.unlink(missing_ok=True)
        command = ["bash", str(ROOT / "docs" / "train.sbatch"), "recipe=mtv_stage3", "size=paper"]
        found = subprocess.run(command, env=environment | {"STATUS": str(status)}, capture_output=True, text=True)
        assert found.returncode == status, found.stderr
        return calls.read_text().splitlines()

    python = "srun --kill-on-bad-exit=1 .venv/bin/python -m avlit"
    begun = f"{python} train runs_dir=runs/slurm-7 train.devices=16 recipe=mtv_stage3 size=paper"
    assert job(143) == [begun, "scontrol requeue 7"]
    assert job(1) == [begun]  # it failed: nothing to gain by doing it again
    (tmp_path / "runs" / "slurm-7" / "a-run").mkdir(parents=True)
    (tmp_path / "runs" / "slurm-7" / "a-run" / "config.yaml").touch()
    assert job(0) == [f"{python} resume run=last runs_dir=runs/slurm-7"]
