"""Likenesses in the feature spaces of released networks, read from local folders: CLIP, CLAP, DINO, RAFT.

Their classes are those of transformers, timm and torchvision; nothing is fetched, and no pickle is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from avlit.errors import UserError
from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading, frechet
from avlit.metrics.metric import Measure, Meter, Metric, Tools, Weights
from avlit.metrics.speech import heard_at

TEXT_FRAMES = 8
"""Uniformly sampled frames that a text is compared with (MMControl, Section 4.1)."""


def visual_part(prompt: str) -> str:
    """What follows `[VISUAL]:` in a prompt of two parts, the whole of any other."""
    found = re.search(r"\[VISUAL\]:\s*(.*?)\s*(?=\[SPEECH\]|$)", prompt, re.DOTALL)
    return found.group(1) if found else prompt


def uniform(count: int, of: int) -> list[int]:
    """Places of `count` frames, the middles of equal parts of `of`; all where there are fewer."""
    return list(range(of)) if of <= count else ((np.arange(count) + 0.5) * of / count).astype(int).tolist()


def _loaded(read: Any, folder: Path, key: str) -> Any:
    """What reads a folder; UserError where it is not of the network that is asked for."""
    try:
        return read(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"weights.{key}={folder}: cannot be read ({reason})") from error


def _open_clip(tools: Tools) -> Measure:
    from transformers import CLIPModel, CLIPProcessor

    folder = tools.weights[CLIP.key]
    processor: Any = _loaded(
        lambda path: CLIPProcessor.from_pretrained(path, local_files_only=True, use_safetensors=True), folder, CLIP.key
    )
    model: Any = _loaded(
        lambda path: CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True), folder, CLIP.key
    )
    model = model.eval().to(tools.device)

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None
        pixels = processor(images=list(clip.frames), return_tensors="pt").pixel_values
        seen = torch.cat([
            F.normalize(model.get_image_features(part.to(tools.device)).pooler_output, dim=-1)
            for part in pixels.split(32)
        ])  # fmt: skip  # [F, D]
        readings: dict[str, Reading] = {}
        if len(seen) > 1:
            readings["Temp-C"] = 100 * float((seen[1:] * seen[:-1]).sum(-1).mean())
        if clip.prompt:
            tokens = processor(text=[visual_part(clip.prompt)], return_tensors="pt", truncation=True).to(tools.device)
            text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)  # [1, D]
            readings["Text CLIP Similarity"] = float((seen[uniform(TEXT_FRAMES, len(seen))] @ text.T).mean())
        return readings

    return measure


def _open_clap(tools: Tools) -> Measure:
    from transformers import ClapModel, ClapProcessor

    folder = tools.weights[CLAP.key]
    processor: Any = _loaded(
        lambda path: ClapProcessor.from_pretrained(path, local_files_only=True, use_safetensors=True), folder, CLAP.key
    )
    model: Any = _loaded(
        lambda path: ClapModel.from_pretrained(path, local_files_only=True, use_safetensors=True), folder, CLAP.key
    )
    model = model.eval().to(tools.device)
    rate_hz = processor.feature_extractor.sampling_rate

    def embed(clip: Clip) -> Tensor:
        assert clip.sound is not None
        heard = processor(audio=heard_at(clip.sound, rate_hz), sampling_rate=rate_hz, return_tensors="pt")
        return F.normalize(model.get_audio_features(**heard.to(tools.device)).pooler_output, dim=-1)[0]

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        sound = embed(clip)
        readings: dict[str, Reading] = {}
        if clip.prompt:
            tokens = processor(text=[clip.prompt], return_tensors="pt", truncation=True).to(tools.device)
            text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)[0]
            readings["CS"] = float(sound @ text)
        if clip.real is not None and clip.real.sound is not None:
            readings["FD-CLAP"] = tuple(torch.cat((sound, embed(clip.real))).tolist())
        return readings

    return measure


def _open_dino(name: str, need: Weights, tools: Tools) -> Measure:
    import timm
    from timm.data.config import resolve_model_data_config

    folder = tools.weights[need.key]
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval().to(tools.device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"weights.{need.key}={folder}: is no folder of {need.about} ({error})") from error
    settings: Any = resolve_model_data_config(model)
    mean, std = (torch.tensor(settings[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    height, width = settings["input_size"][1:]

    def embed(pictures: np.ndarray) -> Tensor:
        shown = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        shown = F.interpolate(shown, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        return torch.cat([
            F.normalize(model(part.to(tools.device)), dim=-1) for part in ((shown - mean) / std).split(16)
        ])  # fmt: skip

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None and clip.reference_image is not None
        return {name: float((embed(clip.frames) @ embed(clip.reference_image[None]).T).mean())}

    return measure


def _open_raft(tools: Tools) -> Measure:
    from torchvision.models.optical_flow import raft_large

    path = tools.weights[RAFT.key]
    model = raft_large(weights=None).eval()
    is_safe = path.suffix == ".safetensors"
    try:
        model.load_state_dict(load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"weights.{RAFT.key}={path}: are no weights of torchvision's raft_large") from error
    model = model.to(tools.device)

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None
        height, width = (size // 8 * 8 for size in clip.frames.shape[1:3])
        if min(height, width) < RAFT_LEAST or len(clip.frames) < 2:
            return {}
        video = torch.from_numpy(clip.frames[:, :height, :width]).permute(0, 3, 1, 2).float() / 127.5 - 1
        lengths = [
            model(video[n : n + 1].to(tools.device), video[n + 1 : n + 2].to(tools.device))[-1].norm(dim=1).mean()
            for n in range(len(video) - 1)
        ]
        return {"flow_raft": float(torch.stack(lengths).mean())}

    return measure


RAFT_LEAST = 128
"""Pixels of a frame that RAFT takes."""

CLIP = Weights("clip", "a folder of CLIP in transformers' layout; MMControl's is clip-vit-large-patch14")
CLAP = Weights("clap", "a folder of LAION's CLAP in transformers' layout, such as clap-htsat-unfused")
DINO3 = Weights("dinov3", "a folder of a DINOv3 in timm's layout (config.json, model.safetensors)")
DINO = Weights("dino", "a folder of a DINO in timm's layout, such as vit_base_patch16_224.dino")
RAFT = Weights("raft", "torchvision's raft_large, .pth or .safetensors")

CLIP_METER = Meter("clip", _open_clip, ("frames",), (CLIP,))
CLAP_METER = Meter("clap", _open_clap, ("sound",), (CLAP,))
PICTURED = ("frames", "reference_image")

METRICS = (
    Metric(
        "Temp-C", "cosine of consecutive frames, by CLIP", "higher", -100, 100, "%", "MTV, Section 7.3", CLIP_METER
    ),
    Metric(
        "Text CLIP Similarity", "cosine of the prompt's visual part and eight frames, by CLIP", "higher", -1, 1, "",
        "MMControl, Section 4.1", CLIP_METER,
    ),
    Metric(
        "ID", "cosine of the reference image and the frames, by DINOv3", "higher", -1, 1, "", "JoVA, Section 4.1",
        Meter("dinov3", lambda tools: _open_dino("ID", DINO3, tools), PICTURED, (DINO3,)),
    ),
    Metric(
        "DINO", "cosine of the reference image and whole frames, by DINO", "higher", -1, 1, "",
        "DINO (Caron et al. 2021); MMControl cuts the person out first",
        Meter("dino", lambda tools: _open_dino("DINO", DINO, tools), PICTURED, (DINO,)), ("Subject DINO Similarity",),
    ),
    Metric("CS", "cosine of the prompt and the sound, by CLAP", "higher", -1, 1, "", "JoVA, Section 4.1", CLAP_METER),
    Metric(
        "FD-CLAP", "Fréchet distance of generated and true sounds in CLAP's features", "lower", 0, inf, "",
        "after JoVA, Section 4.1, whose FD is in the features of PANNs", CLAP_METER, ("FD",), summary=frechet,
        is_resampled=False,
    ),
    Metric(
        "flow_raft", "mean length of optical flow, by RAFT", "none", 0, inf, "pixels a frame",
        "MMControl, Section 4.1; JoVA, Section 4.1; neither says how it is scaled",
        Meter("raft", _open_raft, ("frames",), (RAFT,)), ("Dynamic Degree", "MS"),
    ),
)  # fmt: skip
