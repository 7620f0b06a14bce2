"""What of a model an adapter trains: the `adapter` section of a config, and the parts that a recipe offers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from avlit.settings import nearest, setting

WHOLE = ("adapter.kind", ("none", "own"))
"""Kinds without low-rank matrices."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of an attention layer under diffusers' names."""


@dataclass(frozen=True)
class AdapterPart:
    """A part of a recipe's model that can be adapted by itself: a branch, a ControlNet, a bypass.

    modules: regular expressions that names of linear layers in it begin with. targets: which of those are adapted
    unless `adapter.targets` says others, by the end of their names. is_default: adapted unless `adapter.modality` says
    otherwise.
    """

    modules: tuple[str, ...]
    targets: tuple[str, ...] = ATTENTION
    is_default: bool = True


@dataclass
class AdapterConfig:
    """Training a few new weights on a frozen model, of which checkpoints then hold the fingerprint alone."""

    kind: Literal["none", "lora", "dora", "rslora", "own"] = setting(
        "none",
        "lora (arXiv 2106.09685), dora (2402.09353: length and direction apart) or rslora (2312.03732: scaled by the "
        "root of the rank) beside frozen weights; own: the recipe's own modules whole, the backbone frozen",
    )
    rank: int = setting(16, "rank of an update", low=1, not_with=WHOLE)
    alpha: float | None = setting(
        None, "an update's scale, times the rank (rslora: its root); null is the rank", above=0, not_with=WHOLE
    )
    dropout: float = setting(0.0, "share of a layer's inputs that its update misses", low=0, high=0.9, not_with=WHOLE)
    targets: list[str] = setting(
        factory=list,
        about="ends of the names of the linear layers that are adapted, as [to_q, to_v]; [] is the recipe's choice",
        not_with=WHOLE,
    )
    modality: str | None = setting(
        None, "parts of the model that are adapted, with commas; null is the recipe's choice", not_with=WHOLE
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is adapted."""
        return self.kind != "none"

    @property
    def scale(self) -> float:
        """`alpha` as a number."""
        return float(self.rank) if self.alpha is None else self.alpha

    def chosen(self, parts: Mapping[str, AdapterPart]) -> dict[str, AdapterPart]:
        """The parts that are adapted, of those that a recipe offers; ValueError for a name that is none of them."""
        if self.modality is None:
            return {name: part for name, part in parts.items() if part.is_default}
        names = [name.strip() for name in self.modality.split(",")]
        for name in names:
            if name not in parts:
                near = nearest(name, list(parts))
                raise ValueError(
                    f"adapter.modality={self.modality}: must be one or several of {', '.join(parts)}"
                    + (f"; did you mean {near}?" if near else "")
                )
        return {name: part for name, part in parts.items() if name in names}
