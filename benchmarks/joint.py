"""What joining two Wan transformers costs: a step over two stock models, memory, one-way attention; and its sizes.

Ratios of process-CPU time at one thread in float32, forward and backward, the variants in turn in one process: medians
and quartiles of the rounds' ratios. Nothing is trained: inputs are noise. Freed memory is kept, as PyTorch's own
allocator keeps a GPU's: see `joint_block`, which measures a single block.
"""

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from avlit.models.joint_attention import Heads, Mode, joint_attention
from avlit.models.sizes import TwinWanConfig
from avlit.models.twin_wan import TwinWan

Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A model and its inputs: latents [T, h, w] and [L], prompt and reference of their full lengths."""

    name: str
    config: TwinWanConfig
    grid: tuple[int, int, int]
    num_audio: int
    batch: int

    @property
    def num_video(self) -> int:
        """N, the video tokens."""
        frames, height, width = self.grid
        return frames * height * width // self.config.patch_size**2


def twin_config(*, num_layers: int, num_heads: int, head_dim: int) -> TwinWanConfig:
    return TwinWanConfig(
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        ffn_dim=4 * num_heads * head_dim,
        freq_dim=64,
        text_dim=64,
        max_text_tokens=64,
        max_reference_tokens=32,
        video_channels=16,
        audio_channels=20,
    )


SHAPES = (
    Shape("tiny", twin_config(num_layers=4, num_heads=4, head_dim=48), (7, 8, 8), 131, 4),
    Shape("wide", twin_config(num_layers=2, num_heads=8, head_dim=64), (5, 16, 16), 64, 2),
)


class Joint:
    """A twin model with inputs of its shape."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        config, batch = shape.config, shape.batch
        self.model = TwinWan(config)
        self.video = torch.randn(batch, config.video_channels, *shape.grid)
        self.audio = torch.randn(batch, shape.num_audio, config.audio_channels)
        self.text = torch.randn(batch, config.max_text_tokens, config.text_dim)
        self.reference = torch.randn(batch, config.max_reference_tokens, config.audio_channels)
        self.timestep = 1000 * torch.rand(batch)

    def loss(self, *, video: bool = True, audio: bool = True, mode: Mode = "joint") -> Tensor:
        """Squared error of the streams that are asked for."""
        found = self.model(
            self.video if video else None,
            self.audio if audio else None,
            text=self.text,
            reference=self.reference,
            video_timestep=self.timestep if video else None,
            audio_timestep=self.timestep if audio else None,
            mode=mode,
            num_frames=None if video else self.video.shape[2],
        )
        parts = [(found.video, self.video), (found.audio, self.audio)]
        return torch.stack([mse_loss(x, target) for x, target in parts if x is not None]).sum()


class TwoStock:
    """Two stock Wan models of the same size, each on its own tokens, with the same inputs."""

    def __init__(self, shape: Shape, joint: Joint) -> None:
        config = shape.config
        self.models = nn.ModuleList(
            WanTransformer3DModel(
                patch_size=(1, patch, patch),
                num_attention_heads=config.num_heads,
                attention_head_dim=config.head_dim,
                in_channels=channels,
                out_channels=channels,
                text_dim=config.text_dim,
                freq_dim=config.freq_dim,
                ffn_dim=config.ffn_dim,
                num_layers=config.num_layers,
            )
            for patch, channels in ((config.patch_size, config.video_channels), (1, config.audio_channels))
        )
        self.latents = (joint.video, joint.audio.transpose(1, 2)[..., None, None].contiguous())  # [B, C, L, 1, 1]
        self.text, self.timestep = joint.text, joint.timestep

    def loss(self) -> Tensor:
        """Squared error of both."""
        parts: list[Tensor] = []
        for model, latents in zip(self.models, self.latents, strict=True):
            (found,) = model(latents, self.timestep, self.text, return_dict=False)
            parts.append(mse_loss(found, latents))
        return torch.stack(parts).sum()


def timed(variants: dict[str, Run], *, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of process-CPU time of every variant in every round; they run in turn, after two that warm up."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name, run in variants.items():
            began = time.process_time()
            run()
            if number >= 2:
                found[name].append(1e3 * (time.process_time() - began))
    return found


def ratio(found: dict[str, list[float]], name: str, base: str) -> str:
    """Median and quartiles of the rounds' ratios."""
    low, middle, high = quantiles((a / b for a, b in zip(found[name], found[base], strict=True)), n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def training_step(module: nn.Module, loss: Callable[[], Tensor]) -> Run:
    """Forward, backward, clipping and fused AdamW."""
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return run


def differentiated(outputs: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Run:
    """The outputs and their gradients by all inputs; the gradients that come in are made beforehand."""
    incoming = [torch.randn_like(out) for out in outputs()]
    return lambda: torch.autograd.grad(outputs(), inputs, incoming)


def leaves(batch: int) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(batch, *shape, requires_grad=True)


def peak_bytes(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Most bytes that forward and backward hold at once beyond what was there before, gradients among them.

    From the allocator's own events, so that what a kernel takes for itself is counted too.
    """
    torch.autograd.grad(loss(), parameters, allow_unused=True)  # makes what is kept: rotary tables
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        torch.autograd.grad(loss(), parameters, allow_unused=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate(size for _, size in changes))


def saved_bytes(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that the forward pass keeps for the backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss()
    return sum(size for address, (_, size) in kept.items() if address not in weights)


def flops(loss: Callable[[], Tensor]) -> int:
    """Floating-point operations of the matrix products and attentions of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def line(label: str, value: str) -> None:
    """One result."""
    print(f"  {label:<72} {value}")


def keep_freed_memory() -> str:
    """From now on, glibc neither gives freed memory back nor maps large blocks apart. Says what becomes of it."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return "left to the system"
    return "kept" if mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0) else "left to the system"


def heading(shape: Shape, memory: str, rounds: int) -> str:
    """What is measured."""
    config = shape.config
    return (
        f"twin Wan, {shape.name}: width {config.inner_dim}, layers {config.num_layers}, tokens {shape.num_video} video "
        f"and {shape.num_audio} audio, clips {shape.batch}; freed memory {memory}; rounds {rounds}"
    )


def report_step(shape: Shape, joint: Joint, rounds: int) -> None:
    """A training step over a plain loop's over two stock models; stock ones have no reference and no stem."""
    stock = TwoStock(shape, joint)
    runs = {
        "joint": training_step(joint.model, joint.loss),
        "separate": training_step(joint.model, lambda: joint.loss(mode="separate")),
        "stock": training_step(stock.models, stock.loss),
    }
    found = timed(runs, rounds=rounds)
    line("training step of two stock models, a plain loop", f"{median(found['stock']):.1f} ms")
    line("  the joint model's over it", ratio(found, "joint", "stock"))
    line("  without attention between the streams over it", ratio(found, "separate", "stock"))
    line("  floating-point operations of joint over stock", f"{flops(joint.loss) / flops(stock.loss):.3f}")


def report_memory(joint: Joint) -> None:
    """Memory of a joint step over that of its branches, each alone."""
    losses = [joint.loss, lambda: joint.loss(audio=False), lambda: joint.loss(video=False)]
    parameters = list(joint.model.parameters())
    both, *alone = (peak_bytes(loss, parameters) / 2**20 for loss in losses)
    kept, *kept_alone = (saved_bytes(loss, parameters) / 2**20 for loss in losses)
    line("peak of forward and backward, with gradients", f"{both:.1f} MiB")
    line("  over video alone and audio alone together (goal: 1.1)", f"{both / sum(alone):.3f}")
    line("activations kept for the backward pass", f"{kept:.1f} MiB")
    line("  over those of video alone and audio alone together", f"{kept / sum(kept_alone):.3f}")


def report_one_way(shape: Shape, rounds: int) -> None:
    """Attention of video that is blind to sound, as two calls, over one with a dense mask and over the joint one."""
    leaf, num_heads, head_dim = leaves(shape.batch), shape.config.num_heads, shape.config.head_dim
    lengths = (shape.num_video, shape.num_audio)
    inputs = [leaf(length, num_heads, head_dim) for length in lengths for _ in range(3)]
    streams = [Heads(*(x.transpose(1, 2) for x in inputs[start : start + 3])) for start in (0, 3)]
    is_audio = torch.arange(sum(lengths)) >= shape.num_video
    mask = is_audio[:, None] | ~is_audio

    def masked() -> list[Tensor]:
        query, key, value = (torch.cat((a, b), 1).transpose(1, 2) for a, b in zip(inputs[:3], inputs[3:], strict=True))
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return list(out.split(lengths, dim=1))

    runs = {
        "two calls": differentiated(lambda: joint_attention(streams, mode="one-way"), inputs),
        "masked": differentiated(masked, inputs),
        "joint": differentiated(lambda: joint_attention(streams, mode="joint"), inputs),
    }
    found = timed(runs, rounds=rounds)
    line("one-way attention", f"{median(found['two calls']):.1f} ms")
    line("  over one call with a dense mask", ratio(found, "two calls", "masked"))
    line("  over the joint attention", ratio(found, "two calls", "joint"))


def main(words: list[str] | None = None) -> None:
    """All three at both sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    memory = keep_freed_memory()
    for shape in SHAPES:
        print(heading(shape, memory, options.rounds))
        joint = Joint(shape)
        report_one_way(shape, options.rounds)
        report_memory(joint)
        report_step(shape, joint, options.rounds)


if __name__ == "__main__":
    main()
