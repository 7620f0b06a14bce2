"""KL: how differently PaSST, a transformer that knows 527 sounds, hears generated and true sounds.

PaSST (Koutini et al. 2022) as hear21passt loads it from its released file, and what of it is compared as in
Verse-Bench's code, whose protocol JoVA follows. Names and numbers are from their source; the file itself was not at
hand when this was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import inf
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from avlit.metrics.clip import Clip, Sound
from avlit.metrics.estimate import Reading
from avlit.metrics.metric import Measure, Meter, Metric, Tools, Weights
from avlit.metrics.speech import at_one_peak, heard_at
from avlit.metrics.state_file import load_weights

RATE_HZ, FFT, WINDOW, HOP, MELS, TOP_HZ, CLASSES = 32000, 1024, 800, 320, 128, 15000, 527
WIDTH, DEPTH, HEADS, PATCH, STRIDE, ROWS, COLUMNS = 768, 12, 12, 16, 10, 12, 99

PART, STEP = 10 * RATE_HZ, 5 * RATE_HZ
"""Samples that are heard at once, the last of them silence where a sound is shorter, and samples between parts."""
LEAST = round(0.15 * PART)
"""Samples of a sound that says more than the silence after it."""

EPSILON = 1e-6
"""Added to what is held for possible, so that nothing is impossible."""


class Passt(nn.Module):
    """Sound [B, 320000] at 32 kHz -> logits of 527 sounds, [B, 527]."""

    window: Tensor
    filters: Tensor

    def __init__(self, *, width: int = WIDTH, depth: int = DEPTH, heads: int = HEADS):
        super().__init__()
        self.cls_token, self.dist_token = (nn.Parameter(torch.empty(1, 1, width)) for _ in range(2))
        self.new_pos_embed = nn.Parameter(torch.empty(1, 2, width))
        self.freq_new_pos_embed = nn.Parameter(torch.empty(1, width, ROWS, 1))
        self.time_new_pos_embed = nn.Parameter(torch.empty(1, width, 1, COLUMNS))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, width, PATCH, STRIDE)})
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(width)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))
        self.head_dist = nn.Linear(width, CLASSES)  # in the file; only training used it
        self.register_buffer("window", torch.hann_window(WINDOW, periodic=False), persistent=False)
        self.register_buffer("filters", torch.from_numpy(mel_filters()), persistent=False)

    def mel(self, sound: Tensor) -> Tensor:
        """Sound [B, N] -> log mel power, [B, 1, 128, M]."""
        sound = sound[:, 1:] - 0.97 * sound[:, :-1]
        spectrum = torch.stft(sound, FFT, HOP, WINDOW, window=self.window, return_complex=True)  # [B, 513, M]
        power = spectrum.real.square() + spectrum.imag.square()
        return (((self.filters @ power + 1e-5).log() + 4.5) / 5)[:, None]

    def forward(self, sound: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](self.mel(sound)) + self.time_new_pos_embed + self.freq_new_pos_embed
        tokens = torch.cat((self.cls_token, self.dist_token), 1) + self.new_pos_embed  # [1, 2, D]
        heard = torch.cat((tokens.expand(len(sound), -1, -1), patches.flatten(2).transpose(1, 2)), 1)
        return self.head(self.norm(self.blocks(heard))[:, :2].mean(1))


def mel_filters() -> np.ndarray:
    """Kaldi's triangles, equally wide in mel, float32 [128, 513]."""
    filters = mel_filter_bank(
        FFT // 2 + 1, MELS, 0, TOP_HZ, RATE_HZ, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    return filters.T.astype(np.float32)


def parts_of(sound: np.ndarray) -> np.ndarray | None:
    """A sound [N] at 32 kHz -> parts of 10 s, each half over the one before, [P, 320000]; None if it is too short."""
    if len(sound) <= LEAST:
        return None
    starts = range(0, max(STEP, len(sound) - STEP), STEP)
    return np.stack([np.pad(part, (0, PART - len(part))) for part in (sound[at : at + PART] for at in starts)])


def divergence(generated: Tensor, true: Tensor) -> float:
    """Logits [527] of a generated and of the true sound -> KL(true || generated) of their softmax."""
    return float(F.kl_div((generated.softmax(0) + EPSILON).log(), true.softmax(0), reduction="sum"))


def _open(tools: Tools) -> Measure:
    network = load_weights(Passt(), PASST, tools, inside="model")

    def logits(sound: Sound) -> Tensor | None:
        parts = parts_of(at_one_peak(heard_at(sound, RATE_HZ)))
        if parts is None:
            return None
        return torch.cat([network(part[None].to(tools.device)) for part in torch.from_numpy(parts)]).mean(0).cpu()

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.sound is not None and clip.real is not None
        if clip.real.sound is None:
            return {}
        generated, true = logits(clip.sound), logits(clip.real.sound)
        return {} if generated is None or true is None else {"KL": divergence(generated, true)}

    return measure


PASST = Weights("passt", "PaSST as it is released (passt-s-f128-p16-s10-ap.476-swa.pt), or safetensors")

METRICS = (
    Metric(
        "KL", "divergence of what PaSST hears in generated sounds from what it hears in true ones", "lower", 0, inf, "",
        "JoVA, Section 4.1; as Verse-Bench's code, whose protocol it follows",
        Meter("passt", _open, ("sound", "real"), (PASST,)),
    ),
)  # fmt: skip
