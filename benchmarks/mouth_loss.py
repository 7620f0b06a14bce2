"""What JoVA's mouth loss adds to a training step: the goal is less than 2 %.

`python -m benchmarks.mouth_loss [--rounds 21] [KEY=VALUE …]`: process-CPU time of a forward and backward pass of the
joint stage at one thread, with the mouth loss and without, in turn in one process; medians of the rounds' ratios.
Inputs are noise; a mouth covers six cells of every latent frame. What the reader needs to make masks from boxes, in its
own processes, is not in it.
"""

import argparse
import time
from dataclasses import replace
from statistics import median, quantiles

import torch

from avlit.batch import AVBatch
from avlit.config import load_config
from avlit.randomness import Draws
from avlit.timing import audio_latents_of
from recipes.jova.config import JoVAConfig
from recipes.jova.recipe import JoVA

TEXT_TOKENS = 24


def batch_of(config: JoVAConfig) -> AVBatch:
    """Noise of the config's sizes."""
    timing, model, count = config.timing, config.model, config.data.batch_size
    mask = torch.zeros(count, timing.latent_frames, *timing.latent_size, dtype=torch.bool)
    mask[:, :, -3:-1, :3] = True
    text = torch.randn(count, TEXT_TOKENS, model.text_dim)
    return AVBatch(
        keys=tuple(map(str, range(count))),
        subsets=("basic_face",) * count,
        captions=("",) * count,
        duration_s=timing.duration_s,
        step=0,
        slots=tuple(range(count)),
        text=text,
        text_lengths=(TEXT_TOKENS,) * count,
        audio_text=text,
        audio_text_lengths=(TEXT_TOKENS,) * count,
        video_latents=torch.randn(count, model.video_channels, timing.latent_frames, *timing.latent_size),
        audio_latents=torch.randn(count, audio_latents_of("embedded", timing.duration_s), model.audio_channels),
        mouth_mask=mask,
        has_mouth=(True,) * count,
    )


def main() -> None:
    """Print the ratio of a step with the mouth loss to one without."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="What the mouth loss adds to a step.")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    rounds = max(given.rounds, 2)
    config = load_config(["recipe=jova_stage2", *given.words])
    assert isinstance(config, JoVAConfig)
    module, with_mouths = JoVA(config), batch_of(config)
    module.freeze()
    batches = {"with": with_mouths, "without": replace(with_mouths, mouth_mask=None, has_mouth=())}
    times: dict[str, list[float]] = {name: [] for name in batches}
    for number in range(rounds + 2):
        for name in sorted(batches, reverse=bool(number % 2)):
            began = time.process_time()
            module.step(batches[name], Draws(0, number, batches[name].slots)).total.backward()
            if number > 1:
                times[name].append(time.process_time() - began)
    ratios = [one / other for one, other in zip(times["with"], times["without"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    millions = sum(parameter.numel() for parameter in module.model.parameters()) / 1e6
    print(
        f"{millions:.1f} M parameters, {config.data.batch_size} clips, {median(times['without']):.3f} s without: with "
        f"the mouth loss {median(ratios):.3f} times that ({low:.3f} to {high:.3f}, quartiles of {rounds} rounds)"
    )


if __name__ == "__main__":
    main()
