"""Likenesses in the feature spaces of released networks, read from local folders: CLIP, CLAP, DINO, RAFT.

Their classes are those of transformers, timm and torchvision; nothing is fetched, and no pickle is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlit.errors import UserError
from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading, frechet
from avlit.metrics.metric import Measure, Meter, Metric, Tools, Weights
from avlit.metrics.speech import at_one_peak, heard_at
from avlit.metrics.state_file import load_folder, load_weights

TEXT_FRAMES = 8
"""Uniformly sampled frames that a text is compared with (MMControl, Section 4.1)."""


def visual_part(prompt: str) -> str:
    """What follows `[VISUAL]:` in a prompt of two parts, the whole of any other."""
    found = re.search(r"\[VISUAL\]:\s*(.*?)\s*(?=\[SPEECH\]|$)", prompt, re.DOTALL)
    return found.group(1) if found else prompt


def uniform(count: int, of: int) -> list[int]:
    """Places of `count` frames, the middles of equal parts of `of`; all where there are fewer."""
    return list(range(of)) if of <= count else ((np.arange(count) + 0.5) * of / count).astype(int).tolist()


def seen_by_clip(frames: np.ndarray, processor: Any, model: Any) -> Tensor:
    """uint8 [F, H, W, 3] -> embeddings of unit length, [F, D]."""
    pixels = processor(images=list(frames), return_tensors="pt").pixel_values
    parts = [model.get_image_features(part.to(model.device)).pooler_output for part in pixels.split(32)]
    return F.normalize(torch.cat(parts), dim=-1)


def _open_clip(tools: Tools) -> Measure:
    from transformers import CLIPModel, CLIPProcessor

    processor, model = (load_folder(kind, CLIP, tools) for kind in (CLIPProcessor, CLIPModel))

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None
        seen = seen_by_clip(clip.frames, processor, model)  # [F, D]
        readings: dict[str, Reading] = {}
        if len(seen) > 1:
            readings["Temp-C"] = 100 * float((seen[1:] * seen[:-1]).sum(-1).mean())
        if clip.prompt:
            tokens = processor(text=[visual_part(clip.prompt)], return_tensors="pt", truncation=True).to(tools.device)
            text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)  # [1, D]
            readings["Text CLIP Similarity"] = float((seen[uniform(TEXT_FRAMES, len(seen))] @ text.T).mean())
        return readings

    return measure


def _open_aesthetic(tools: Tools) -> Measure:
    from transformers import CLIPModel, CLIPProcessor

    processor, model = (load_folder(kind, CLIP, tools) for kind in (CLIPProcessor, CLIPModel))
    head = load_weights(nn.Linear(model.config.projection_dim, 1), LAION, tools)

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None
        return {"Aesthetic Quality": float(head(seen_by_clip(clip.frames, processor, model)).mean()) / 10}

    return measure


def _open_clap(tools: Tools) -> Measure:
    from transformers import ClapModel, ClapProcessor

    processor, model = (load_folder(kind, CLAP, tools) for kind in (ClapProcessor, ClapModel))
    rate_hz = processor.feature_extractor.sampling_rate

    def embed(clip: Clip) -> Tensor:
        assert clip.sound is not None
        heard = at_one_peak(heard_at(clip.sound, rate_hz))
        with same_draws():
            heard = processor(audio=heard, sampling_rate=rate_hz, return_tensors="pt")
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
            true = embed(clip.real)
            readings["FD-CLAP"] = tuple(torch.cat((sound, true)).tolist())
            readings["FD-pair"] = float((sound - true).square().sum())
        return readings

    return measure


@contextmanager
def same_draws() -> Iterator[None]:
    """CLAP's extractor draws which part of a sound of more than 10 s it hears: of a clip, the same one each time."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


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

    model = load_weights(raft_large(weights=None), RAFT, tools)

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None
        video = shown_to_raft(clip.frames)
        if len(video) < 2 or min(video.shape[-2:]) < RAFT_LEAST:
            return {}
        height, width = video.shape[-2:]
        pads = [-width % 8 // 2, -width % 8 - -width % 8 // 2, -height % 8 // 2, -height % 8 - -height % 8 // 2]
        video = F.pad(video, pads, mode="replicate")
        lengths, parts = [], []
        for n in range(len(video) - 1):
            pair = video[n : n + 1].to(tools.device), video[n + 1 : n + 2].to(tools.device)
            flow = model(*pair, num_flow_updates=RAFT_STEPS)[-1]  # [1, 2, H, W]
            lengths.append(flow.norm(dim=1).mean())
            parts.append(flow.abs().mean())
        return {"flow_raft": float(torch.stack(lengths).mean()), "MS": float(torch.stack(parts).mean())}

    return measure


def shown_to_raft(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> [F, 3, H', W'] in [-1, 1], halved until no side is longer than 640."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    height, width = video.shape[-2:]
    while max(height, width) > RAFT_MOST:
        height, width = height // 2, width // 2
    video = F.interpolate(video, (height, width), mode="bilinear", align_corners=False)
    return video / 127.5 - 1


RAFT_LEAST, RAFT_MOST = 121, 640
"""Pixels of a frame's sides that RAFT takes, and that Verse-Bench shows it."""
RAFT_STEPS = 20

CLIP = Weights("clip", "a folder of CLIP in transformers' layout; MMControl's is clip-vit-large-patch14")
CLAP = Weights("clap", "a folder of LAION's CLAP in transformers' layout; Verse-Bench's is clap-htsat-fused")
LAION = Weights("aesthetic_head", "LAION's linear head on clip-vit-large-patch14 (sa_0_4_vit_l_14_linear.pth)")
DINO3 = Weights("dinov3", "a folder of a DINOv3 in timm's layout (config.json, model.safetensors)")
DINO = Weights("dino", "a folder of a DINO in timm's layout, such as vit_base_patch16_224.dino")
RAFT = Weights("raft", "torchvision's raft_large (C_T_V1, the papers' raft-things), .pth or .safetensors")

CLIP_METER = Meter("clip", _open_clip, ("frames",), (CLIP,))
CLAP_METER = Meter("clap", _open_clap, ("sound",), (CLAP,), version=2)
RAFT_METER = Meter("raft", _open_raft, ("frames",), (RAFT,), version=2)
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
        "Aesthetic Quality", "a tenth of LAION's aesthetic score of all frames, by CLIP", "higher", 0, 1, "",
        "MMControl, Section 4.1; VBench (Huang et al. 2024)",
        Meter("aesthetic", _open_aesthetic, ("frames",), (CLIP, LAION)),
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
        "FD-pair", "squared distance of each generated sound and its true one in CLAP's features", "lower", 0, 4, "",
        "Verse-Bench's code, which calls it FD and whose protocol JoVA follows; JoVA's text says PANNs, its 0.69 is of "
        "this scale", CLAP_METER, ("FD",),
    ),
    Metric(
        "MS", "mean absolute optical flow, across and down, by RAFT", "higher", 0, inf, "pixels a frame",
        "JoVA, Section 4.1; as Verse-Bench's code: 20 updates, frames halved until 640 pixels hold them", RAFT_METER,
    ),
    Metric(
        "flow_raft", "mean length of optical flow, by RAFT", "none", 0, inf, "pixels a frame",
        "MMControl, Section 4.1, which does not say how it is scaled", RAFT_METER, ("Dynamic Degree",),
    ),
)  # fmt: skip
