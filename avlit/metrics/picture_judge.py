"""Says of a picture who is seen and how far away all is, by a small network trained where both are known exactly.

No recogniser of real faces and no depth estimator for real scenes: it knows a corpus's closed set of attributes and its
depths. Its answers are never called face similarity, and its depth error is not that of Depth Anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Vary = Callable[[Tensor, torch.Generator], Tensor]
"""Pictures [B, 3, H, W] in [-1, 1] to the same, as an imperfect model might have made them."""


class Seer(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> depth [B, H/2, W/2] and, for each attribute, logits [B, classes].

    Three halvings of size, and two steps back up beside what was seen at that size. Each attribute is read from a mean
    of the two coarsest features, weighted by where the person is found.
    """

    def __init__(self, attributes: Mapping[str, Sequence[str]], width: int = 24) -> None:
        super().__init__()
        self.down1 = _conv(3, width, 2)  # 1/2
        self.down2 = nn.Sequential(_conv(width, 2 * width, 2), _conv(2 * width, 2 * width, 1))  # 1/4
        self.down3 = nn.Sequential(_conv(2 * width, 4 * width, 2), _conv(4 * width, 4 * width, 1))  # 1/8
        self.up2 = _conv(6 * width, 2 * width, 1)
        self.up1 = _conv(3 * width, width, 1)
        self.depth = nn.Conv2d(width, 1, 3, padding=1)
        self.places = nn.Conv2d(2 * width, len(attributes), 1)
        self.attributes = nn.ModuleDict({
            name: nn.Sequential(nn.Linear(6 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, len(values)))
            for name, values in attributes.items()
        })  # fmt: skip

    def forward(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        half = self.down1(pictures)  # [B, W, H/2, W/2]
        quarter = self.down2(half)
        eighth = self.down3(quarter)
        fine = self.up2(torch.cat((_doubled(eighth), quarter), dim=1))  # [B, 2W, H/4, W/4]
        depth = self.depth(self.up1(torch.cat((_doubled(fine), half), dim=1)))[:, 0]  # [B, H/2, W/2]
        features = torch.cat((_doubled(eighth), fine), dim=1).flatten(2)  # [B, 6W, H/4 * W/4]
        weights = self.places(fine).flatten(2).softmax(-1)  # [B, attributes, H/4 * W/4]
        seen = torch.einsum("bap,bcp->bac", weights, features)
        logits = {name: head(seen[:, place]) for place, (name, head) in enumerate(self.attributes.items())}
        return depth.sigmoid(), logits


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _doubled(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2, mode="nearest")


@dataclass(frozen=True)
class PictureJudge:
    """Depth and attributes of pictures. attributes: name -> what it can be."""

    seer: Seer
    attributes: Mapping[str, tuple[str, ...]]

    @classmethod
    def train(
        cls,
        pictures: Tensor,
        depths: Tensor,
        persons: Sequence[Mapping[str, str]],
        *,
        attributes: Mapping[str, Sequence[str]],
        vary: Vary | None = None,
        seed: int = 0,
        epochs: int = 6,
    ) -> "PictureJudge":
        """A judge of pictures like these.

        pictures [B, 3, H, W] in [-1, 1]; depths [B, H, W] in [0, 1]; persons: the value of each attribute in each
        picture. vary: applied anew in every epoch.
        """
        values = {name: tuple(known) for name, known in attributes.items()}
        labels = {
            name: torch.tensor([known.index(person[name]) for person in persons]) for name, known in values.items()
        }
        targets = F.avg_pool2d(depths[:, None], 2)[:, 0]  # [B, H/2, W/2]
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            seer = Seer(values)
            optimizer = torch.optim.AdamW(seer.parameters(), 2e-3, weight_decay=0.05)
            steps = epochs * -(-len(pictures) // 32)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
            for _ in range(epochs):
                for rows in torch.randperm(len(pictures), generator=generator).split(32):
                    seen = pictures[rows] if vary is None else vary(pictures[rows], generator)
                    depth, logits = seer(seen)
                    loss = 10 * (depth - targets[rows]).abs().mean()
                    for name, known in labels.items():
                        loss = loss + F.cross_entropy(logits[name], known[rows], label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        return cls(seer.eval(), values)

    @torch.no_grad()
    def depth(self, video: Tensor) -> Tensor:
        """Depth of every frame, [F, H/2, W/2] in [0, 1], 1 is nearest; video [3, F, H, W] in [-1, 1]."""
        return self.seer(video.transpose(0, 1))[0]

    @torch.no_grad()
    def person(self, video: Tensor) -> dict[str, str]:
        """The attributes of the person of a video [3, F, H, W] in [-1, 1], each judged by all frames together."""
        _, logits = self.seer(video.transpose(0, 1))
        return {name: self.attributes[name][int(each.softmax(-1).mean(0).argmax())] for name, each in logits.items()}

    def depth_error(self, video: Tensor, depth: Tensor) -> float:
        """Mean absolute difference between a video's depth, as judged, and the depth [F, H, W] that was asked for."""
        return float((self.depth(video) - F.avg_pool2d(depth[:, None], 2)[:, 0]).abs().mean())


def identity_agreement(seen: Sequence[Mapping[str, str]], asked: Sequence[Mapping[str, str]]) -> tuple[float, float]:
    """Share of attributes that persons have of those asked for: of each one's own, and of all the others' (chance).

    ValueError: the numbers differ, or there are fewer than two.
    """
    if len(seen) != len(asked) or len(seen) < 2:
        raise ValueError(f"identity_agreement: {len(seen)} persons seen and {len(asked)} asked for; give two or more")
    shares = torch.tensor([[fmean(a[n] == b[n] for n in b) for b in asked] for a in seen])
    own = torch.eye(len(seen), dtype=torch.bool)
    return float(shares[own].mean()), float(shares[~own].mean())
