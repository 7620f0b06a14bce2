"""`just plan`: counts against closed forms and real steps, every recipe at its published size, advice that holds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from avlit.__main__ import main
from avlit.batch import AVBatch
from avlit.codecs.embedded_audio import EmbeddedAudioCodec, EmbeddedTrackEncoder
from avlit.codecs.embedded_text import EmbeddedTextEncoder
from avlit.codecs.embedded_video import EmbeddedVideoCodec
from avlit.codecs.gemma import TEXT_TOKENS as GEMMA_TOKENS
from avlit.codecs.pretrained import T5Encoder
from avlit.codecs.wan import TEXT_TOKENS as UMT5_TOKENS
from avlit.commands.assembly import build_module
from avlit.commands.estimate import drawn_module, estimate, parse_memory, planned, smaller_configs
from avlit.config import Config, OptimizerConfig, load_config, recipe_keys
from avlit.dry_run import AUDIO_CHANNELS, TEXT_FEATURES, TRACK_FEATURES, VIDEO_CHANNELS, blank_batch, dry_run
from avlit.errors import UserError
from avlit.estimate import RESERVED_BYTES, dtypes_at_rest, settle
from avlit.models.backbones import LayerRun, run_layer
from avlit.module import AVModule
from avlit.objectives import Losses, mean_squared_error
from avlit.randomness import Draws
from avlit.strategies import lower_frozen
from benchmarks.plan import measured, predicted

CLIPS, TOKENS, WIDTH, LAYERS = 2, 48, 64, 5


class Layers(nn.Module):
    """Linear layers, each as a layer of a transformer is run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.layer_run = LayerRun()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            (x,) = run_layer(lambda layer, x: (torch.tanh(layer(x)),), layer, x, run=self.layer_run)
        return x


class Linear(AVModule):
    """A recipe whose every number is known."""

    def __init__(self) -> None:
        with torch.device("meta"):
            super().__init__(Layers(), optimizer=OptimizerConfig(), steps=1, seed=0)

    def step(self, batch: AVBatch, draws: Draws) -> Losses:
        found = mean_squared_error(self.model(batch.text), batch.text)
        return Losses(parts={"video": found}, noise_level=torch.zeros(CLIPS))


Linear.__abstractmethods__ = frozenset()  # pyright: ignore[reportAttributeAccessIssue] of the rest, nothing is called


class Attention(Linear):
    """One layer, whose tokens attend to each other once they have passed it."""

    def step(self, batch: AVBatch, draws: Draws) -> Losses:
        layers: Any = self.model
        x = layers.layers[0](batch.text)[:, None]  # [B, 1, L, D]
        found = mean_squared_error(nn.functional.scaled_dot_product_attention(x, x, x)[:, 0], batch.text)
        return Losses(parts={"video": found}, noise_level=torch.zeros(CLIPS))


def text_batch() -> AVBatch:
    return blank_batch(load_config(["recipe=jova_stage2"]), CLIPS)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_operations_and_bytes_are_those_of_the_closed_form(recompute):
    batch = text_batch()
    cost = dry_run(Linear(), batch, is_bf16=False, run=LayerRun(recompute))
    product = 2 * CLIPS * TOKENS * WIDTH * WIDTH
    assert cost.flops == (3 * LAYERS - 1) * product  # the first layer's input needs no gradient
    assert cost.recomputed_flops == (LAYERS * product if recompute == "blocks" else 0)
    inputs = 4 * CLIPS * TOKENS * WIDTH
    there = sum(each.nbytes for each in vars(batch).values() if isinstance(each, torch.Tensor))
    kept = LAYERS * inputs  # tanh keeps what it makes, which is the next layer's input
    spare = 4 * inputs  # of the loss, and of what is at once before and after an operation
    assert there + kept <= cost.forward_bytes <= there + kept + spare


def test_a_frozen_layer_costs_no_gradient_of_its_weight():
    whole, partly = Linear(), Linear()
    for parameter in list(partly.model.parameters())[:-1]:
        parameter.requires_grad_(False)
    product = 2 * CLIPS * TOKENS * WIDTH * WIDTH
    both = [dry_run(each, text_batch(), is_bf16=False, run=LayerRun()) for each in (whole, partly)]
    assert both[0].flops - both[1].flops == (2 * LAYERS - 2) * product
    assert both[1].forward_bytes < both[0].forward_bytes  # layers before the trained one keep nothing


@pytest.mark.parametrize(("is_bf16", "is_gpu"), [(True, True), (False, True), (False, False)])
def test_attention_is_counted_without_what_its_backward_pass_makes_again(is_bf16, is_gpu):
    cost = dry_run(Attention(), text_batch(), is_bf16=is_bf16, run=LayerRun(), is_gpu=is_gpu)
    scores, layer = 2 * CLIPS * TOKENS * TOKENS * WIDTH, 2 * CLIPS * TOKENS * WIDTH * WIDTH
    assert cost.flops == 3 * 2 * scores + 2 * layer
    assert cost.recomputed_flops == scores


def test_half_the_memory_is_kept_in_bf16_and_weights_are_copied():
    full, half = (dry_run(Linear(), text_batch(), is_bf16=is_bf16, run=LayerRun()) for is_bf16 in (False, True))
    assert half.flops == full.flops
    assert half.forward_bytes < full.forward_bytes


def test_a_plan_is_what_real_steps_take():
    config = load_config(["recipe=jova_stage2", "data.batch_size=1", "train.accelerator=cpu"])
    assert predicted(config) == pytest.approx(measured(config), rel=0.05)


def shallow(config: Config) -> Config:
    """Two layers of each kind, else as published: all 42 to 56 take seconds a recipe."""
    depth = {name: 2 for name in ("num_layers", "num_single_layers") if hasattr(config.model, name)}
    return replace(config, model=replace(config.model, **depth))


@pytest.mark.parametrize("key", recipe_keys())
def test_every_recipe_is_planned_at_its_published_size_without_a_weight(key):
    config = shallow(load_config([f"recipe={key}", "size=paper"]))
    assert all(each.is_meta for each in drawn_module(config).parameters())
    found = estimate(config, gpus=8, memory_bytes=1e15)
    assert found.fits and not found.advice and found.kind == "fsdp2"
    assert found.micro_batch * found.config.train.accumulate * 8 == config.data.batch_size
    assert 0 < found.trained <= found.parameters
    memory = found.memory
    assert memory.optimizer == 2 * memory.gradients == 8 * found.trained / 8
    assert memory.average == (memory.gradients if config.ema.decay else 0)
    assert memory.activations > 0 and memory.reserved == RESERVED_BYTES
    assert found.recomputed_flops > 0 and found.flops > found.recomputed_flops
    assert found.seconds == (found.flops + found.recomputed_flops) / (8 * 0.4 * 989.4e12)


def test_what_a_plan_advises_is_what_its_words_do():
    words = ["recipe=jova_stage1_audio", "gpus=2", "strategy=ddp", "model.num_single_layers=1"]
    whole = planned(words)
    assert whole.fits and not whole.advice
    found = planned([*words, f"memory={(whole.memory.total - 1e5) / 1e9:.4f}GB"])
    assert not found.fits and found.together is not None and found.together.words == found.advice[0].words
    families = {each[0] for each in smaller_configs(found.config)}
    assert families >= {"sharding", "checkpointing", "micro-batch", "precision", "average", "frames", "adapter"}
    assert [each.saved_bytes for each in found.advice] == sorted((a.saved_bytes for a in found.advice), reverse=True)
    for advice in found.advice:
        own = [word for word in words if word.partition("=")[0] not in {a.partition("=")[0] for a in advice.words}]
        followed = planned([*own, *advice.words])
        assert followed.memory.total == pytest.approx(advice.total_bytes)
        assert followed.memory.total < found.memory.total


def test_sharding_divides_what_is_kept_and_offloading_moves_it():
    words = ["recipe=jova_stage2", "strategy=fsdp2"]
    two, four = (planned([*words, f"gpus={gpus}", "data.batch_size=4", "train.accumulate=1"]) for gpus in (2, 4))
    assert two.memory.optimizer == 2 * four.memory.optimizer
    assert two.memory.gathered == four.memory.gathered
    host = planned([*words, "gpus=2", "data.batch_size=4", "strategy.cpu_offload=true"]).memory
    buffers = sum(each.nbytes for each in drawn_module(load_config(words)).buffers())
    assert host.host == host.weights + host.gradients + host.optimizer + host.average - buffers
    assert host.total == host.gathered + host.activations + host.reserved + buffers
    copies = planned(["recipe=jova_stage2", "gpus=2", "strategy=ddp", "data.batch_size=4"]).memory
    assert copies.gradients == copies.optimizer and copies.gathered == 0  # DDP keeps gradients twice


def test_an_adapter_leaves_gradients_and_moments_of_itself_alone():
    whole, adapted = (planned(["recipe=mtv_stage1", *more]) for more in ([], ["adapter=lora", "adapter.rank=4"]))
    assert adapted.trained < 0.1 * whole.trained and adapted.parameters == whole.parameters + adapted.trained
    assert adapted.memory.optimizer == 8 * adapted.trained
    assert adapted.flops < whole.flops


def test_frozen_weights_are_planned_in_the_precision_that_training_keeps_them_in():
    config = load_config(["recipe=mtv_stage1", "model.trainable=control", "precision=bf16", "train.accelerator=cpu"])
    module = build_module(config)
    module.freeze()
    module.released = frozenset(name for name in module.model.state_dict() if name.startswith("backbone."))
    lower_frozen(module)
    kept = {name: each.dtype for name, each in module.model.named_parameters()}
    assert set(kept.values()) == {torch.float32, torch.bfloat16}

    def planned_dtypes(config: Config) -> dict[str, torch.dtype]:
        drawn = drawn_module(config)
        dtypes = dtypes_at_rest(drawn, config)
        return {name: dtypes[each] for name, each in drawn.model.named_parameters()}

    assert planned_dtypes(config) == kept
    inherited = planned_dtypes(replace(config, init="a run"))  # whose checkpoint holds what is frozen here
    assert set(inherited.values()) == {torch.float32}


def test_a_batch_is_shared_out_with_micro_batches_as_they_were():
    config = load_config(["recipe=mtv_stage1", "size=paper"])
    assert settle(config, gpus=8).train.accumulate == 3
    with pytest.raises(UserError, match=r"gpus=7: data.batch_size=24 must be a multiple of it; take one of 1, 2, 3, 4"):
        settle(config, gpus=7)


def test_codecs_make_what_a_plan_takes_them_to():
    assert VIDEO_CHANNELS["embedded"] == EmbeddedVideoCodec().channels
    assert AUDIO_CHANNELS["embedded"] == EmbeddedAudioCodec.channels
    assert TRACK_FEATURES["embedded"] == (EmbeddedTrackEncoder.layers, EmbeddedTrackEncoder.dim)
    assert TEXT_FEATURES["embedded"] == (EmbeddedTextEncoder.max_tokens, EmbeddedTextEncoder.dim)
    tokens = {name: most for name, (most, _) in TEXT_FEATURES.items()}
    assert (tokens["t5"], tokens["umt5"], tokens["gemma"]) == (T5Encoder.max_tokens, UMT5_TOKENS, GEMMA_TOKENS)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gpus=0", "gpus=0: must be a whole number of at least 1"),
        ("gpus=5", "gpus=5: data.batch_size=16 must be a multiple of it"),
        ("memory=lots", "memory=lots: must be a size such as 80GB, 141GiB or 80"),
        ("utilisation=1.5", "utilisation=1.5: must be a number above 0 and at most 1"),
        ("tflops=0", "tflops=0: must be a number above 0"),
        ("gpu=8", "gpu: no such key"),
    ],
)
def test_a_wrong_word_is_one_message(word, message, capsys):
    assert main(["plan", "recipe=mtv_stage1", word]) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and said.out == ""


def test_a_plan_is_printed(capsys):
    assert main(["plan", "recipe=jova_stage1_audio", "gpus=2", "memory=24GB"]) == 0
    said = capsys.readouterr().out
    for part in ("on 2 GPUs: strategy=fsdp2", "B trained", "68 tokens", "of 24: fits", "TFLOP a step", "s a step"):
        assert part in said


def test_sizes_of_memory_are_read_in_their_units():
    assert [parse_memory(text) for text in ("80GB", "80", "1GiB", "500MB")] == [80e9, 80e9, 2**30, 5e8]
