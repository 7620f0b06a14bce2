"""CE, CU, PC and PQ: how enjoyable, useful, complex and well produced a sound is, as Meta's audiobox-aesthetics says.

Tjandra et al. 2025. The network is that of the package, its weights the released folder; parts of a sound and their
weights are as the package takes them, whose own way in needs torchaudio.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avlit.errors import UserError
from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading
from avlit.metrics.metric import Measure, Meter, Metric, Package, Tools, Weights
from avlit.metrics.speech import RATE_HZ, heard_at
from avlit.metrics.state_file import load_weights

AXES = ("CE", "CU", "PC", "PQ")
PART = 10 * RATE_HZ


def parts_of(sound: np.ndarray) -> tuple[Tensor, Tensor]:
    """A sound [N] at 16 kHz -> parts of 10 s, the last filled with silence, [P, 1, 160000], and what of each is
    sound, bool of the same shape."""
    count = max(1, -(-len(sound) // PART))
    padded = np.pad(sound, (0, count * PART - len(sound))).reshape(count, 1, PART)
    is_sound = np.arange(count * PART).reshape(count, 1, PART) < len(sound)
    return torch.from_numpy(padded), torch.from_numpy(is_sound)


def _open(tools: Tools) -> Measure:
    kind = importlib.import_module("audiobox_aesthetics.model.aes").AesMultiOutput
    folder = tools.weights[AESTHETICS.key]
    known = {each.name for each in fields(kind)}
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        scale = {axis: (config["target_transform"][axis]["std"], config["target_transform"][axis]["mean"])
                 for axis in AXES}  # fmt: skip
        network = kind(**{name: value for name, value in config.items() if name in known})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"weights.{AESTHETICS.key}={folder}: is not {AESTHETICS.about} ({error!r})") from error
    network = load_weights(network, AESTHETICS, tools, file="model.safetensors")

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.sound is not None
        if not len(clip.sound.waveform):
            return {}
        parts, is_sound = parts_of(heard_at(clip.sound))
        found = network({"wav": parts.to(tools.device), "mask": is_sound.to(tools.device)})
        share = is_sound.float().mean((1, 2))  # [P]
        readings = {}
        for axis, (std, mean) in scale.items():
            values = found[axis].float().cpu() * std + mean  # [P]
            readings[axis] = float((values * share).sum() / share.sum())
        return readings

    return measure


AESTHETICS = Weights(
    "aesthetics", "the folder of facebook/audiobox-aesthetics as it is released (config.json, model.safetensors)"
)
PACKAGE = Package("audiobox_aesthetics", "uv pip install --no-deps audiobox-aesthetics==0.0.4")
METER = Meter("aesthetics", _open, ("sound",), (PACKAGE, AESTHETICS))
SOURCE = "JoVA, Section 4.1; audiobox-aesthetics (Tjandra et al. 2025)"

METRICS = (
    Metric("CE", "content enjoyment of the sound", "higher", 1, 10, "", SOURCE, METER),
    Metric("CU", "content usefulness of the sound", "higher", 1, 10, "", SOURCE, METER),
    Metric("PC", "production complexity of the sound", "lower", 1, 10, "", SOURCE, METER),
    Metric("PQ", "production quality of the sound", "higher", 1, 10, "", SOURCE, METER),
)
