"""FD: how far generated sounds are from true ones in the features of PANNs' CNN14, a network that knows 527 sounds.

CNN14 (Kong et al. 2020) as audioset_tagging_cnn releases it, and what of it is compared as in av-benchmark. Names and
numbers are from their source; the file itself was not at hand when this was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import inf

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlit.metrics.clip import Clip, Sound
from avlit.metrics.estimate import Reading, frechet
from avlit.metrics.metric import Measure, Meter, Metric, Tools, Weights
from avlit.metrics.speech import heard_at
from avlit.metrics.state_file import load_weights

WINDOW, HOP, MELS, CLASSES = 512, 160, 64, 527
"""Samples at 16 kHz, samples, bands, and sounds of AudioSet."""

LEAST_S = 0.32
"""Seconds of which five halvings leave something."""


class Fourier(nn.Module):
    """Sound [B, N] -> power [B, 1, M, 257]; the released file holds the windowed sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.stft = nn.ModuleDict(
            {name: nn.Conv1d(1, WINDOW // 2 + 1, WINDOW, HOP, bias=False) for name in ("conv_real", "conv_imag")}
        )

    def forward(self, sound: Tensor) -> Tensor:
        padded = F.pad(sound[:, None], (WINDOW // 2, WINDOW // 2), mode="reflect")
        parts = [self.stft[name](padded).square() for name in ("conv_real", "conv_imag")]
        return (parts[0] + parts[1]).transpose(1, 2)[:, None]


class Mel(nn.Module):
    """Power [B, 1, M, 257] -> decibels of 64 bands, [B, 1, M, 64]; the released file holds the filters."""

    def __init__(self) -> None:
        super().__init__()
        self.melW = nn.Parameter(torch.empty(WINDOW // 2 + 1, MELS))

    def forward(self, power: Tensor) -> Tensor:
        return 10 * (power @ self.melW).clamp(min=1e-10).log10()


class Block(nn.Module):
    """Two convolutions, and the mean of each `pool` x `pool`: [B, C, M, K] -> [B, C', M // pool, K // pool]."""

    def __init__(self, inside: int, outside: int, pool: int):
        super().__init__()
        self.pool = pool
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)

    def forward(self, heard: Tensor) -> Tensor:
        heard = self.bn1(self.conv1(heard)).relu()
        return F.avg_pool2d(self.bn2(self.conv2(heard)).relu(), self.pool)


class Cnn14(nn.Module):
    """Sound [B, N] at 16 kHz, N >= 5120 -> features [B, 32 * width], 2048 of the released one."""

    def __init__(self, *, width: int = 64) -> None:
        super().__init__()
        self.spectrogram_extractor, self.logmel_extractor = Fourier(), Mel()
        self.bn0 = nn.BatchNorm2d(MELS)
        widths = (1, *(width * 2**number for number in range(6)))
        for number, (inside, outside) in enumerate(pairwise(widths), 1):
            self.add_module(f"conv_block{number}", Block(inside, outside, 1 if number == 6 else 2))
        self.fc1 = nn.Linear(widths[-1], widths[-1])
        self.fc_audioset = nn.Linear(widths[-1], CLASSES)  # in the file; FD is of what it is given

    def forward(self, sound: Tensor) -> Tensor:
        heard = self.logmel_extractor(self.spectrogram_extractor(sound))  # [B, 1, M, 64]
        heard = self.bn0(heard.transpose(1, 3)).transpose(1, 3)
        for number in range(1, 7):
            heard = self.get_submodule(f"conv_block{number}")(heard)
        heard = heard.mean(3)  # [B, 2048, M // 32]
        return self.fc1(heard.amax(2) + heard.mean(2)).relu()


def _open(tools: Tools) -> Measure:
    network = load_weights(Cnn14(), PANNS, tools, inside="model")

    def features(sound: Sound) -> list[float]:
        heard = heard_at(sound)
        return network(torch.from_numpy(heard - heard.mean())[None].to(tools.device))[0].tolist()

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.sound is not None and clip.real is not None
        sounds = clip.sound, clip.real.sound
        if any(each is None or len(each.waveform) < LEAST_S * each.rate_hz for each in sounds):
            return {}
        return {"FD": tuple(value for sound in sounds if sound is not None for value in features(sound))}

    return measure


PANNS = Weights("panns", "PANNs' CNN14 of 16 kHz as it is released (Cnn14_16k_mAP=0.438.pth), or safetensors")

METRICS = (
    Metric(
        "FD", "Fréchet distance of generated and true sounds in the 2048 features of PANNs' CNN14", "lower", 0, inf, "",
        "JoVA, Section 4.1; as av-benchmark. JoVA's 0.69 is rather on the scale of FD-pair",
        Meter("panns", _open, ("sound", "real"), (PANNS,)), summary=frechet, is_resampled=False,
    ),
)  # fmt: skip
