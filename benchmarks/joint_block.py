"""One block of the joint Wan transformers over the attention, feed-forward and linear calls it consists of.

Ratios of process-CPU time as in `joint`. Both sides have the same weights, inputs, tokens, reference attention and
gradients; but a block holds its activations and gradients until its end, and its calls, one by one, do not. Where glibc
gives freed memory back, each run pays for getting it again, a page fault at a time, at a price that is the kernel's and
on a virtual machine its host's, and that differs from round to round; no GPU's allocator does so. So the page faults
are counted first, and times are then measured with freed memory kept. The compiled block is `compile=blocks`; its
calls' feed-forwards are compiled, too, as nothing in a linear layer or an attention could be fused.
"""

import argparse
import resource
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from avlit.models.backbones import Stock, add_gated, affine, compiled
from avlit.models.twin_block import Stream, twin_block
from benchmarks.joint import (
    SHAPES,
    Joint,
    Run,
    Shape,
    differentiated,
    heading,
    keep_freed_memory,
    leaves,
    line,
    ratio,
    timed,
    twin_config,
)

PUBLISHED = Shape(
    "one block as wide as Wan2.2-5B's",
    replace(twin_config(num_layers=1, num_heads=24, head_dim=128), ffn_dim=14336),
    (4, 16, 16),
    64,
    1,
)
"""Takes seconds a round, of which it gets fewer."""


def block_run(shape: Shape, joint: Joint, *, is_compiled: bool = False) -> Run:
    """The first block of both streams as the model runs it."""
    model, config = joint.model, shape.config
    width, batch = config.inner_dim, shape.batch
    leaf = leaves(batch)
    video_rotary = model._video_rotary(*shape.grid, torch.device("cpu"))  # pyright: ignore[reportPrivateUsage]
    audio_rotary = model._audio_rotary(  # pyright: ignore[reportPrivateUsage]
        shape.num_audio, shape.grid[0], torch.device("cpu")
    )
    streams = [
        Stream(twin, references, leaf(config.max_text_tokens, width), leaf(1, width), leaf(1, 6, width), rotary)
        for twin, references, rotary in (
            (model.backbone, model.video_references, video_rotary),
            (model.audio, model.audio_references, audio_rotary),
        )
    ]
    reference = leaf(config.max_reference_tokens, width)
    tokens = (leaf(shape.num_video, width), leaf(shape.num_audio, width))
    inputs = [reference, *tokens]
    for stream in streams:
        inputs += [stream.text, stream.modulation, *stream.twin.blocks[0].parameters()]
        inputs += list(stream.references[0].parameters())
    blocks = [stream.twin.blocks[0] for stream in streams]
    references = [stream.references[0] for stream in streams]
    run = compiled(twin_block) if is_compiled else twin_block
    return differentiated(lambda: run(blocks, references, streams, reference, "joint", None, *tokens), inputs)


class Calls:
    """Calls, each forward and backward on inputs of its own before the next."""

    def __init__(self, batch: int) -> None:
        self.leaf = leaves(batch)
        self.runs: list[Run] = []

    def __call__(self) -> None:
        """All of them."""
        for run in self.runs:
            run()

    def add(self, function: Callable[..., Tensor], *given: Tensor) -> None:
        """A module or a function, differentiated by what it is given and by its weights."""
        weights = list(function.parameters()) if isinstance(function, nn.Module) else []
        self.runs.append(differentiated(lambda: [function(*given)], [*given, *weights]))


def calls_run(shape: Shape, joint: Joint, *, is_compiled: bool = False) -> Run:
    """The linear layers, attentions and feed-forwards that the block consists of; is_compiled: the last are."""
    config, calls = shape.config, Calls(shape.batch)
    width, heads, head = config.inner_dim, config.num_heads, config.head_dim

    def add_attention(num_queries: int, num_keys: int) -> None:
        calls.add(_attention, *(calls.leaf(n, heads, head) for n in (num_queries, num_keys, num_keys)))

    for block, added, num_tokens in _sides(shape, joint):
        conditions = ((block.attn2, config.max_text_tokens), (added, config.max_reference_tokens))
        projections = [
            *((layer, num_tokens) for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)),
            *((layer, num_tokens) for layer in (block.attn1.to_out[0], block.attn2.to_q, block.attn2.to_out[0])),
            *((layer, length) for module, length in conditions for layer in (module.to_k, module.to_v)),
        ]
        for layer, length in projections:
            calls.add(layer, calls.leaf(length, width))
        calls.add(torch.compile(block.ffn) if is_compiled else block.ffn, calls.leaf(num_tokens, width))
        for _, length in conditions:
            add_attention(num_tokens, length)
    num_joint = shape.num_video + shape.num_audio
    add_attention(num_joint, num_joint)
    return calls


def norms_run(shape: Shape, joint: Joint) -> Run:
    """The block's norms and modulations."""
    config, calls = shape.config, Calls(shape.batch)
    width, leaf = config.inner_dim, calls.leaf
    for block, added, num_tokens in _sides(shape, joint):
        of_tokens = (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q)
        for norm in (block.norm1, block.norm2, block.norm3, *of_tokens):
            calls.add(norm, leaf(num_tokens, width))
        for module, length in ((block.attn2, config.max_text_tokens), (added, config.max_reference_tokens)):
            calls.add(module.norm_k, leaf(length, width))
        for _ in range(2):  # around the self-attention and around the feed-forward
            calls.add(affine, leaf(num_tokens, width), leaf(1, width), leaf(1, width))
            calls.add(add_gated, leaf(num_tokens, width), leaf(1, width), leaf(num_tokens, width))
    return calls


def _sides(shape: Shape, joint: Joint) -> list[tuple[Stock, Stock, int]]:
    """First block, its second key and value set and the tokens of each stream."""
    model = joint.model
    video, audio = model.backbone.blocks[0], model.audio.blocks[0]
    return [
        (video, model.video_references[0], shape.num_video),
        (audio, model.audio_references[0], shape.num_audio),
    ]


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of [B, N, heads, head], the layout in which linear layers leave their heads."""
    return scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))


def paging(runs: dict[str, Run]) -> dict[str, tuple[int, float]]:
    """Page faults of each and the milliseconds that the kernel worked meanwhile; the third time that it runs."""
    found: dict[str, tuple[int, float]] = {}
    for _ in range(3):
        for name, run in runs.items():
            before = resource.getrusage(resource.RUSAGE_SELF)
            run()
            after = resource.getrusage(resource.RUSAGE_SELF)
            found[name] = (after.ru_minflt - before.ru_minflt, 1e3 * (after.ru_stime - before.ru_stime))
    return found


def report_paging(shape: Shape, joint: Joint) -> None:
    """What the system's allocator adds to one block and to its calls."""
    for name, (faults, spent) in paging({"block": block_run(shape, joint), "calls": calls_run(shape, joint)}).items():
        line(f"{name}, page faults, the kernel's time", f"{faults}, {spent:.0f} ms")


def report_block(shape: Shape, joint: Joint, rounds: int) -> None:
    """One block over its calls."""
    runs = {"block": block_run(shape, joint), "core": calls_run(shape, joint), "norms": norms_run(shape, joint)}
    found = timed(runs, rounds=rounds)
    found["calls"] = [core + norms for core, norms in zip(found["core"], found["norms"], strict=True)]
    line("one joint block", f"{median(found['block']):.1f} ms")
    line("  over its linear, attention and feed-forward calls (goal: 1.05)", ratio(found, "block", "core"))
    line("  over these, its norms and modulations", ratio(found, "block", "calls"))


def report_compiled(shape: Shape, joint: Joint, rounds: int) -> None:
    """One block compiled, over its calls."""
    torch.compiler.reset()  # another size would make the graphs' sizes dynamic
    runs = {
        "block": block_run(shape, joint, is_compiled=True),
        "calls": calls_run(shape, joint, is_compiled=True),
        "stock": calls_run(shape, joint),
    }
    found = timed(runs, rounds=rounds)
    line("one joint block, compiled", f"{median(found['block']):.1f} ms")
    line("  over its linear, attention and compiled feed-forward calls (goal: 1.05)", ratio(found, "block", "calls"))
    line("  over the same, none compiled", ratio(found, "block", "stock"))


def main(words: list[str] | None = None) -> None:
    """The block at all sizes, then compiled at the smaller two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="minutes of compiling")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    joints = [(shape, Joint(shape)) for shape in (*SHAPES, PUBLISHED)]
    for shape, joint in joints:
        print(f"twin Wan, {shape.name}, freed memory left to the system")
        report_paging(shape, joint)
    memory = keep_freed_memory()  # cannot be taken back
    for shape, joint in joints:
        rounds = options.rounds if shape in SHAPES else max(5, options.rounds // 4)
        print(heading(shape, memory, rounds))
        report_block(shape, joint, rounds)
        if options.compiled and shape in SHAPES:
            report_compiled(shape, joint, options.rounds)


if __name__ == "__main__":
    main()
