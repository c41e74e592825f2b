"""Precision classes a search may use, the mixes they make, and what those cost.

Shares are cumulative "edges" in hundredths of a percent, one between each two
neighbouring levels: `edges[i]` of the neurons, by score, are at level i or better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from math import ceil
from typing import NamedTuple

import numpy as np

from m2jax.layer_mixes import WHOLE, edges_of, mix_from_edges
from m2jax.mix import PrecisionMix

BITS = (16, 8, 4)
NEEDS = {16: {"w16"}, 8: {"q4", "r4"}, 4: {"q4"}}
SKIPPED = 0


class Cost(NamedTuple):
    """What one layer costs with all its neurons at 16, 8 or 4 bits; skipped, nothing.

    In the budget's unit. A budget limits the sum over layers: for one in bits a weight
    on average give each of L layers (16 / L, 8 / L, 4 / L).
    """

    of16: float
    of8: float
    of4: float


def layer_cost(mix: PrecisionMix, cost: Cost) -> float:
    """Cost of a layer's mix: linear in the shares."""
    shares = mix.percent16, mix.percent8, mix.percent4
    return sum(share * of for share, of in zip(shares, cost, strict=True)) / 100


def total_cost(mixes: Sequence[PrecisionMix], costs: Sequence[Cost]) -> float:
    """Sum over layers, in the budget's unit.

    Raises:
        ValueError: not as many mixes as costs.
    """
    return sum(layer_cost(*pair) for pair in zip(mixes, costs, strict=True))


@dataclass(frozen=True)
class Levels:
    """The precision classes that may be used, best first; the last may be skipping.

    bits: such as (16, 8, 4, 0). least: hundredths of a percent that must be kept.
    """

    bits: tuple[int, ...]
    least: int

    @classmethod
    def of_planes(
        cls, planes: Sequence[str], *, allow_skip: bool, min_kept: float
    ) -> "Levels":
        """Classes that planes allow.

        Args:
            min_kept: percent of neurons that must not be skipped.

        Raises:
            ValueError: no class at all, or min_kept is no percentage.
        """
        bits = tuple(b for b in BITS if NEEDS[b] <= set(planes))
        if not bits:
            raise ValueError(f"planes {tuple(planes)}: want q4, or w16, or all three")
        if not 0 <= min_kept <= 100:
            raise ValueError(f"min_kept {min_kept}: want a percentage from 0 to 100")
        least = ceil(min_kept * 100 - 1e-6)
        if allow_skip and least < WHOLE:
            bits = (*bits, SKIPPED)
        return cls(bits, least)

    def mix(self, edges: Sequence[int]) -> PrecisionMix:
        """Of one share a level but the last, which takes what is left."""
        reached = list(zip(self.bits, [*edges, WHOLE], strict=True))
        at_least = [
            max((edge for b, edge in reached if b >= bits), default=0) for bits in BITS
        ]
        return mix_from_edges(*at_least)

    def edges(self, mix: PrecisionMix) -> list[int]:
        """Of a mix of these classes."""
        at_least: dict[int, int] = dict(zip(BITS, edges_of(mix), strict=True))
        return [at_least[bits] for bits in self.bits[:-1]]

    def at(self, edge: int, share: int) -> list[int]:
        """`share` at level `edge`, the rest one level below."""
        return [0] * edge + [share] + [WHOLE] * (len(self.bits) - 2 - edge)

    def highest(self) -> PrecisionMix:
        return self.mix([WHOLE] * (len(self.bits) - 1))

    def cheapest(self) -> PrecisionMix:
        edges = [0] * (len(self.bits) - 1)
        if self.bits[-1] == SKIPPED:
            edges[-1] = self.least
        return self.mix(edges)

    def of(self, cost: Cost) -> list[float]:
        """Cost at 100 % of each level."""
        by_bits: dict[int, float] = dict(zip(BITS, cost, strict=True))
        return [by_bits.get(b, 0.0) for b in self.bits]

    def points(self, shares: Sequence[int]) -> list[np.ndarray]:
        """Where each edge may lie, from 0 (or what must be kept) to 100 %."""
        last = len(self.bits) - 2 if self.bits[-1] == SKIPPED else -1
        return [
            np.unique([*(s for s in shares if s >= low), low, WHOLE])
            for low in (
                self.least if i == last else 0 for i in range(len(self.bits) - 1)
            )
        ]

    def options(self, points: Sequence[np.ndarray]) -> np.ndarray:
        """All edges in order that lie on the points: int [O, E]."""
        every = np.unique(np.concatenate(points))
        grid = np.array(list(combinations_with_replacement(every, len(points))))
        on = [np.isin(grid[:, i], allowed) for i, allowed in enumerate(points)]
        return grid[np.all(on, axis=0)]


def option_costs(levels: Levels, options: np.ndarray, cost: Cost) -> np.ndarray:
    """Cost of each option in a layer: [O]."""
    edges = np.pad(options, [(0, 0), (0, 1)], constant_values=WHOLE)
    return np.diff(edges, axis=1, prepend=0) @ np.array(levels.of(cost)) / WHOLE


def uniform_mixes(
    levels: Levels, shares: Sequence[int], total: Cost, *, budget: float
) -> list[PrecisionMix]:
    """Mixes for all layers alike that use the budget up.

    Two levels take what the others, on the grid of shares, leave:

        hi = (budget - sum_others - of_lo * rest) / (of_hi - of_lo),  lo = rest - hi

    Args:
        total: cost of all layers together.
    """
    of, found = levels.of(total), {}
    grid = sorted({*shares, 0, levels.least, WHOLE})
    for lo in range(1, len(of)):
        for hi in range(lo):
            others = [i for i in range(len(of)) if i not in (lo, hi)]
            for fixed in product(grid, repeat=len(others)):
                amount = np.zeros(len(of), np.int64)
                amount[others] = fixed
                rest = WHOLE - int(amount.sum())
                spent = float(amount @ of) + of[lo] * rest
                if rest < 0 or of[hi] <= of[lo]:
                    continue
                share = (budget * WHOLE - spent) / (of[hi] - of[lo])
                amount[hi] = np.floor(min(max(share, -1), rest + 1) + 1e-6)
                amount[lo] = rest - amount[hi]
                skipped = amount[-1] if levels.bits[-1] == SKIPPED else 0
                if min(amount) >= 0 and WHOLE - skipped >= levels.least:
                    found[levels.mix(np.cumsum(amount)[:-1].tolist())] = None
    return [*found]
