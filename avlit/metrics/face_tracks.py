"""Faces as SyncNet's pipeline sees them: found by S3FD, followed from frame to frame, cut out as 224-pixel squares.

S3FD (Zhang et al. 2017) and what is done with its boxes follow syncnet_python, whose names of weights it has; its
`sfd_face.pth` was not at hand when this was written. Frames are not compressed in between, shots not cut apart first:
a box that jumps begins another track.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou, nms

from avlit.metrics.metric import Weights

SCALE = 0.25
"""Of the picture that faces are looked for in."""
SUREST, OVERLAPS, SAME_FACE = 0.9, (0.3, 0.1), 0.5
"""Least confidence of a face; most overlap of two; least overlap of one face in two frames."""
LEAST_SEEN = 32
"""Pixels of a picture's shorter side, once it is made smaller, that the network takes."""
MOST_MISSED, LEAST_SIDE = 25, 100
"""Frames without a face within a track; pixels of a face's longer side that count."""
LEAST_TRACK = 40
"""Frames in which a face is found. The published pipeline asks for more than 100, four seconds: MTV's have two."""
MARGIN, SIDE, GREY, SMOOTHED = 0.4, 224, 110, 13

ANCHORS, STRIDES = (16, 32, 64, 128, 256, 512), (4, 8, 16, 32, 64, 128)
CONVOLUTIONS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Channels of VGG's layers; 0 halves the picture."""
S3FD_WEIGHTS = Weights("s3fd", "S3FD as syncnet_python releases it (sfd_face.pth), or safetensors")


class Scaled(nn.Module):
    """Features [B, C, H, W] of unit length, times a weight for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, features: Tensor) -> Tensor:
        length = features.square().sum(1, keepdim=True).sqrt() + 1e-10
        return features / length * self.weight[:, None, None]


class S3FD(nn.Module):
    """Pictures [1, 3, H, W], RGB less MEAN -> faces [N, 5]: x1, y1, x2, y2 as shares of the picture, confidence."""

    MEAN = (123.0, 117.0, 104.0)

    def __init__(self) -> None:
        super().__init__()
        layers, inside = [], 3
        for number, channels in enumerate(CONVOLUTIONS):
            # The third halving keeps a last odd row, as it was trained.
            pool = nn.MaxPool2d(2, 2, ceil_mode=number == 9)
            layers += [nn.Conv2d(inside, channels, 3, padding=1), nn.ReLU()] if channels else [pool]
            inside = channels or inside
        layers += [nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.ReLU(), nn.Conv2d(1024, 1024, 1), nn.ReLU()]
        self.vgg = nn.ModuleList(layers)
        self.L2Norm3_3, self.L2Norm4_3, self.L2Norm5_3 = Scaled(256), Scaled(512), Scaled(512)
        self.extras = nn.ModuleList([
            nn.Conv2d(1024, 256, 1), nn.Conv2d(256, 512, 3, 2, padding=1),
            nn.Conv2d(512, 128, 1), nn.Conv2d(128, 256, 3, 2, padding=1),
        ])  # fmt: skip
        widths = (256, 512, 512, 1024, 512, 256)
        self.loc = nn.ModuleList([nn.Conv2d(width, 4, 3, padding=1) for width in widths])
        self.conf = nn.ModuleList([nn.Conv2d(width, 2 if n else 4, 3, padding=1) for n, width in enumerate(widths)])

    def forward(self, picture: Tensor) -> Tensor:
        height, width = picture.shape[2:]
        faces = []
        for number, features in enumerate(self._features(picture)):
            scores = self.conf[number](features)[0]
            if number == 0:  # the finest has three ways to be no face, of which the likeliest counts
                scores = torch.stack((scores[:3].amax(0), scores[3]))
            sure = scores.softmax(0)[1].flatten()  # [H' W']
            moved = self.loc[number](features)[0].flatten(1).T  # [H' W', 4]
            rows, columns = features.shape[2:]
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            places = torch.stack((x.flatten(), y.flatten()), 1).to(moved) + 0.5
            size = torch.tensor([width, height]).to(moved)
            side = ANCHORS[number] / size
            centre = places * STRIDES[number] / size + moved[:, :2] * 0.1 * side
            half = side * (moved[:, 2:] * 0.2).exp() / 2
            faces.append(torch.cat((centre - half, centre + half, sure[:, None]), 1))
        return torch.cat(faces)

    def _features(self, picture: Tensor) -> list[Tensor]:
        found, scaled = [], {15: self.L2Norm3_3, 22: self.L2Norm4_3, 29: self.L2Norm5_3}
        for number, layer in enumerate(self.vgg):
            picture = layer(picture)
            if number in scaled:
                found.append(scaled[number](picture))
        found.append(picture)
        for number, layer in enumerate(self.extras):
            picture = layer(picture).relu()
            if number % 2:
                found.append(picture)
        return found

    @torch.no_grad()
    def find(self, frame: np.ndarray) -> Tensor:
        """Faces of a frame, uint8 [H, W, 3] -> [N, 4] in pixels, the surest first."""
        device = next(self.parameters()).device
        height, width = frame.shape[:2]
        if min(height, width) * SCALE < LEAST_SEEN:
            return torch.zeros(0, 4)
        picture = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
        size = (round(height * SCALE), round(width * SCALE))
        picture = F.interpolate(picture, size, mode="bilinear", align_corners=False).round()
        faces = self((picture - torch.tensor(self.MEAN).view(3, 1, 1)).to(device)).cpu()
        faces = faces[faces[:, 4] > SUREST]
        boxes, sure = faces[:, :4] * torch.tensor([width, height, width, height]), faces[:, 4]
        for overlap in OVERLAPS:  # one after the other, as published: what the second leaves out has had its effect
            kept = nms(boxes, sure, overlap)
            boxes, sure = boxes[kept], sure[kept]
        return boxes


@dataclass(frozen=True, eq=False)
class Track:
    """One face over frames that follow each other. first: its first frame; boxes: [F, 4] in pixels, without gaps."""

    first: int
    boxes: np.ndarray


def follow(faces: Sequence[Tensor]) -> list[Track]:
    """Faces [N, 4] of each frame -> those that are followed long enough and are large enough."""
    left = [list(each) for each in faces]
    tracks = []
    while any(left):
        numbers, boxes = [], []
        for number, found in enumerate(left):
            if boxes and number - numbers[-1] > MOST_MISSED:
                break
            for box in list(found):
                if not boxes or (number > numbers[-1] and float(box_iou(box[None], boxes[-1][None])) > SAME_FACE):
                    numbers.append(number)
                    boxes.append(box)
                    found[:] = [each for each in found if each is not box]
        frames = np.arange(numbers[0], numbers[-1] + 1)
        known = torch.stack(boxes).numpy()
        whole = np.stack([np.interp(frames, numbers, known[:, side]) for side in range(4)], 1)  # [F, 4]
        sides = (whole[:, 2:] - whole[:, :2]).mean(0)
        if len(numbers) >= LEAST_TRACK and sides.max() > LEAST_SIDE:
            tracks.append(Track(numbers[0], whole))
    return tracks


def cut_out(frames: np.ndarray, track: Track) -> np.ndarray:
    """The face of a track, uint8 [F, 224, 224, 3]: the box and 40 % around it, more of it below; grey outside."""
    x1, y1, x2, y2 = track.boxes.T
    half, y, x = (
        median_filter(values, SMOOTHED, mode="constant")
        for values in (np.maximum(y2 - y1, x2 - x1) / 2, (y1 + y2) / 2, (x1 + x2) / 2)
    )
    faces = []
    for number in range(len(track.boxes)):
        size, frame = half[number], frames[track.first + number]
        pad = int(size * (1 + 2 * MARGIN))
        wide = np.pad(frame, ((pad, pad), (pad, pad), (0, 0)), constant_values=GREY)
        top, left, reach = y[number] + pad, x[number] + pad, size * (1 + MARGIN)
        cut = wide[int(top - size) : int(top + size * (1 + 2 * MARGIN)), int(left - reach) : int(left + reach)]
        picture = torch.from_numpy(cut).permute(2, 0, 1)[None].float()
        face = F.interpolate(picture, (SIDE, SIDE), mode="bilinear", align_corners=False)[0]
        faces.append(face.round().byte().permute(1, 2, 0).numpy())
    return np.stack(faces)
