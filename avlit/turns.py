"""Taking turns in exact proportion: weights to the smallest block in which each name has its whole share."""

import math
from collections.abc import Mapping
from fractions import Fraction

LONGEST_BLOCK = 1000
"""Steps after which proportions must be exact at the latest."""


def turn_block(weights: Mapping[str, float]) -> tuple[str, ...]:
    """Names, each as often as its weight's share of the smallest whole block: {a: 0.5, b: 0.25} -> a a b.

    Names of weight 0 are left out. ValueError for weights that need a block of more than LONGEST_BLOCK.
    """
    shares = {name: Fraction(str(weight)) for name, weight in weights.items() if weight}
    total = sum(shares.values())
    length = math.lcm(*((share / total).denominator for share in shares.values()))
    if length > LONGEST_BLOCK:
        listed = ", ".join(f"{name}={weight:g}" for name, weight in weights.items() if weight)
        raise ValueError(
            f"{listed}: these proportions are exact only every {min(length, 10**9):,} steps; use weights with fewer "
            f"digits: {LONGEST_BLOCK} at most"
        )
    return tuple(name for name, share in shares.items() for _ in range(int(share / total * length)))
