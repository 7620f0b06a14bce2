"""JoVA's check of the mouth mask (Appendix A): where a picture suffers when the masked latents are zeroed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from avlit.codecs import VideoCodec
from avlit.metrics.attention import Share
from avlit.mouth_mask import Box, mouth_mask
from avlit.timing import Timing


@dataclass(frozen=True)
class MouthDamage:
    """What zeroing the masked latents of one clip does.

    decoded, masked: the pictures with and without the masked cells, [3, F, H, W] in [-1, 1] on the CPU. in_boxes: share
    of their squared difference inside the boxes of each frame, and the area of those as chance; in_grown: of the boxes
    grown by one latent cell to all sides. None where nothing was damaged.
    """

    decoded: Tensor
    masked: Tensor
    in_boxes: Share | None
    in_grown: Share | None

    @property
    def difference(self) -> Tensor:
        """Squared difference of the two, summed over colours, [F, H, W]."""
        return (self.decoded - self.masked).square().sum(0)


@torch.no_grad()
def mouth_damage(
    codec: VideoCodec, latents: Tensor, boxes: Sequence[Sequence[Box]], *, timing: Timing, sample: str
) -> MouthDamage:
    """Decode the latents [C, T, h, w] of a clip as they are and with the mouth's cells set to zero.

    ValueError naming `sample`: its boxes are malformed, or no mouth is seen in any frame.
    """
    mask = mouth_mask(boxes, timing=timing, sample=sample)  # [T, h, w]
    if not mask.any():
        raise ValueError(f"sample {sample}: no mouth is seen in any of its frames")
    zeroed = latents.masked_fill(mask.to(latents.device), 0)
    decoded, masked = (codec.decode(each[None])[0].float().clamp(-1, 1).cpu() for each in (latents, zeroed))
    difference = (decoded - masked).square().sum(0)  # [F, H, W]
    pixels = replace(timing, temporal_factor=1, spatial_factor=1)
    inside = mouth_mask(boxes, timing=pixels, sample=sample)  # [F, H, W]
    cell = timing.spatial_factor
    grown = F.max_pool2d(inside[:, None].float(), 2 * cell + 1, stride=1, padding=cell)[:, 0] > 0
    return MouthDamage(decoded, masked, _share(difference, inside), _share(difference, grown))


def _share(damage: Tensor, inside: Tensor) -> Share | None:
    total = damage.double().sum()
    return Share(float(damage.double()[inside].sum() / total), float(inside.double().mean())) if total > 0 else None
