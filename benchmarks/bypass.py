"""What training a bypass beside a frozen backbone costs against training that backbone whole: memory and time.

`python -m benchmarks.bypass [rounds=9] [KEY=VALUE …]`: a step of MMControl with controls at one thread, the bypass
trained, beside three in which the same backbone is: without controls, without controls on as many tokens as references
add, and with the bypass too, under controls. In turn in one process; medians of the rounds' ratios of process-CPU time.
Memory is counted in tensors: what autograd keeps for the backward pass; gradients and moments. Inputs are noise. Then
the peak of what the allocator gave out in real steps of either stage as it is trained, average and weights included.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median, quantiles

import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.config import load_config
from avlit.randomness import Draws
from avlit.timing import audio_latents_of
from benchmarks.plan import measured
from recipes.mmcontrol.config import MMControlConfig
from recipes.mmcontrol.recipe import MMControl

TEXT_TOKENS = 24
MB = 2**20


def batch_of(config: MMControlConfig) -> AVBatch:
    """Noise of the config's sizes, with every control."""
    timing, model, count = config.timing, config.model, config.data.batch_size
    video = (count, model.video_channels, timing.latent_frames, *timing.latent_size)
    return AVBatch(
        keys=tuple(map(str, range(count))),
        subsets=("basic_face",) * count,
        captions=("",) * count,
        duration_s=timing.duration_s,
        step=0,
        slots=tuple(range(count)),
        text=torch.randn(count, TEXT_TOKENS, model.text_dim),
        text_lengths=(TEXT_TOKENS,) * count,
        video_latents=torch.randn(video),
        audio_latents=torch.randn(
            count, audio_latents_of(config.codecs.audio, timing.duration_s), model.audio_channels
        ),
        reference=torch.randn(count, config.reference_tokens, model.audio_channels),
        has_reference=(True,) * count,
        reference_image=torch.randn(video)[:, :, :1],
        has_reference_image=(True,) * count,
        depth=torch.randn(video),
        has_depth=(True,) * count,
        pose=torch.randn(video),
        has_pose=(True,) * count,
    )


def build(words: Sequence[str], recipe: str) -> MMControl:
    """The recipe's module with no weight at zero, so that gradients flow as in a trained one."""
    config = load_config([f"recipe={recipe}", *words])
    assert isinstance(config, MMControlConfig)
    module = MMControl(config)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    module.freeze()
    return module


def as_long(batch: AVBatch, config: MMControlConfig) -> AVBatch:
    """The batch without controls, its clips longer by as many tokens as references have."""
    assert batch.video_latents is not None and batch.audio_latents is not None
    video, audio = batch.video_latents, batch.audio_latents
    return replace(
        batch,
        video_latents=torch.cat((video[:, :, :1], video), dim=2),
        audio_latents=torch.cat((audio[:, : config.reference_tokens], audio), dim=1),
    )


def step(module: MMControl, batch: AVBatch, number: int = 0) -> Tensor:
    """The loss of a step."""
    return module.step(batch, Draws(0, number, batch.slots)).total


def stored(module: MMControl, run: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor too, so that its address is not given to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(size for size, _ in kept.values())


def main(words: Sequence[str]) -> None:
    """Print the ratios, and what they are of."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = next((int(word.partition("=")[2]) for word in words if word.startswith("rounds=")), 9)
    words = [word for word in words if not word.startswith("rounds=")]
    bypass, backbone = build(words, "mmcontrol"), build(words, "mmcontrol_backbone")
    whole = build(words, "mmcontrol")
    whole.model.requires_grad_(True)
    controlled = batch_of(bypass.config)
    rows: dict[str, tuple[MMControl, AVBatch]] = {
        "bypass": (bypass, controlled),
        "backbone": (backbone, controlled),
        "backbone, as many tokens": (backbone, as_long(controlled, bypass.config)),
        "backbone and bypass": (whole, controlled),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name in sorted(rows, reverse=bool(number % 2)):
            module, batch = rows[name]
            began = time.process_time()
            step(module, batch, number).backward()
            if number:
                times[name].append(time.process_time() - began)
            module.zero_grad()
    bytes_of = {name: stored(module, lambda m=module, b=batch: step(m, b)) for name, (module, batch) in rows.items()}
    trained = {
        name: sum(parameter.numel() for parameter in module.trained_parameters.values())
        for name, (module, _) in rows.items()
    }
    millions = sum(parameter.numel() for parameter in backbone.model.parameters()) / 1e6
    print(f"bypass: backbone of {millions:.2f} M parameters, {len(controlled)} clips, {rounds} rounds")
    for name in rows:
        state = 12 * trained[name]  # gradient and two moments, float32
        ratios = [one / other for one, other in zip(times["bypass"], times[name], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(
            f"  {name}: {median(times[name]):.3f} s a step, {bytes_of[name] / MB:.1f} MB of activations, "
            f"{trained[name] / 1e6:.2f} M trained with {state / MB:.1f} MB of gradients and moments"
        )
        if name != "bypass":
            print(
                f"    the bypass's step takes {median(ratios):.2f} times that ({low:.2f} to {high:.2f}, quartiles), "
                f"activations {bytes_of['bypass'] / bytes_of[name]:.2f}, gradients and moments "
                f"{trained['bypass'] / trained[name]:.2f}"
            )
    peaks = [
        measured(load_config([f"recipe={key}", "train.accelerator=cpu", *words]))
        for key in ("mmcontrol", "mmcontrol_backbone")
    ]
    print(
        f"  peak memory of training: {peaks[0] / MB:.0f} MB with the bypass, {peaks[1] / MB:.0f} MB of the backbone "
        f"whole, ratio {peaks[0] / peaks[1]:.2f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
