"""FVD: how far generated clips are from true ones in the features of I3D, a network that knows 400 actions.

I3D (Carreira and Zisserman 2017) as VideoGPT computes it from its file of converted weights, which most reported FVDs
of PyTorch are of. Names and numbers are from its source; the file itself was not at hand when this was written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import inf

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading, frechet
from avlit.metrics.metric import Measure, Meter, Metric, Tools, Weights
from avlit.metrics.state_file import load_weights

FRAMES, SIDE = 16, 224
"""Frames of a clip and pixels of their sides that FVD compares (Unterthiner et al. 2018)."""

CHANNELS = {
    "3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64), "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64), "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128), "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}  # fmt: skip
"""Channels into a block, then of its branches: the first, both of the second, both of the third, the fourth."""

EPSILON = 1e-5
"""Added to variances. pytorch-i3d's own release has the same names and adds 1e-3: it is another network."""

Triple = tuple[int, int, int]


def padded(video: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """[B, C, F, H, W] with zeros around it so that ceil(size / stride) places come out, as TensorFlow's SAME."""
    pads: list[int] = []
    for size, reach, step in zip(video.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max((-(-size // step) - 1) * step + reach - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(video, pads)


class Unit(nn.Module):
    """A convolution, and its normalisation where it has one."""

    def __init__(self, inside: int, outside: int, side: int = 1, stride: int = 1, *, is_last: bool = False):
        super().__init__()
        self.kernel, self.stride = (side, side, side), (stride, stride, stride)
        self.conv3d = nn.Conv3d(inside, outside, side, stride, bias=is_last)
        self.bn = None if is_last else nn.BatchNorm3d(outside, eps=EPSILON)

    def forward(self, video: Tensor) -> Tensor:
        found = self.conv3d(padded(video, self.kernel, self.stride))
        return found if self.bn is None else self.bn(found).relu()


class Pool(nn.MaxPool3d):
    """The greatest in each neighbourhood, of what is padded with zeros; all values are above them."""

    def __init__(self, kernel: Triple, stride: Triple):
        super().__init__(kernel, stride)
        self.sides, self.steps = kernel, stride

    def forward(self, input: Tensor) -> Tensor:
        return F.max_pool3d(padded(input, self.sides, self.steps), self.sides, self.steps)


class Mixed(nn.Module):
    """Four branches side by side. channels: as in CHANNELS."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        inside, first, second, second_out, third, third_out, fourth = channels
        self.b0 = Unit(inside, first)
        self.b1a, self.b1b = Unit(inside, second), Unit(second, second_out, 3)
        self.b2a, self.b2b = Unit(inside, third), Unit(third, third_out, 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(inside, fourth)

    def forward(self, video: Tensor) -> Tensor:
        branches = self.b0(video), self.b1b(self.b1a(video)), self.b2b(self.b2a(video)), self.b3b(self.b3a(video))
        return torch.cat(branches, 1)


class I3D(nn.Sequential):
    """Video [B, 3, F, 224, 224] in [-1, 1], F >= 9 -> logits of 400 actions, [B, 400], means over time."""

    def __init__(self) -> None:
        mixed = {f"Mixed_{name}": Mixed(channels) for name, channels in CHANNELS.items()}
        super().__init__(OrderedDict([
            ("Conv3d_1a_7x7", Unit(3, 64, 7, 2)), ("MaxPool3d_2a_3x3", Pool((1, 3, 3), (1, 2, 2))),
            ("Conv3d_2b_1x1", Unit(64, 64)), ("Conv3d_2c_3x3", Unit(64, 192, 3)),
            ("MaxPool3d_3a_3x3", Pool((1, 3, 3), (1, 2, 2))),
            *((name, mixed[name]) for name in ("Mixed_3b", "Mixed_3c")),
            ("MaxPool3d_4a_3x3", Pool((3, 3, 3), (2, 2, 2))),
            *((name, mixed[name]) for name in ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f")),
            ("MaxPool3d_5a_2x2", Pool((2, 2, 2), (2, 2, 2))),
            *((name, mixed[name]) for name in ("Mixed_5b", "Mixed_5c")),
            ("avg_pool", nn.AvgPool3d((2, 7, 7), 1)), ("logits", Unit(1024, 400, is_last=True)),
        ]))  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).mean((2, 3, 4))


def shown_to_i3d(frames: np.ndarray) -> Tensor:
    """The first 16 frames, uint8 [F, H, W, 3] -> [1, 3, 16, 224, 224] in [-1, 1]; not cut, so they may be stretched."""
    video = torch.from_numpy(frames[:FRAMES]).permute(0, 3, 1, 2).float()
    video = F.interpolate(video, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return (video / 127.5 - 1).transpose(0, 1)[None]


def _open(tools: Tools) -> Measure:
    network = load_weights(I3D(), I3D_WEIGHTS, tools)

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None and clip.real is not None
        if clip.real.frames is None or min(len(clip.frames), len(clip.real.frames)) < FRAMES:
            return {}
        both = [network(shown_to_i3d(frames).to(tools.device))[0] for frames in (clip.frames, clip.real.frames)]
        return {"FVD": tuple(torch.cat(both).tolist())}

    return measure


I3D_WEIGHTS = Weights("i3d", "I3D of Kinetics-400 as VideoGPT releases it (i3d_pretrained_400.pt), or safetensors")

METRICS = (
    Metric(
        "FVD", "Fréchet distance of generated and true clips' first 16 frames in I3D's 400 logits", "lower", 0, inf, "",
        "MTV, Section 7.3; FVD (Unterthiner et al. 2018)", Meter("fvd", _open, ("frames", "real"), (I3D_WEIGHTS,)),
        summary=frechet, is_resampled=False,
    ),
)  # fmt: skip
