"""What mixes lose if layers and classes add up, and how far that sum is to be trusted.

Knows KLs that others measured; measures nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2jax.calibrate.allocation import allocate, falling
from m2jax.calibrate.levels import Cost, Levels, option_costs
from m2jax.mix import PrecisionMix

# What the sum may be wrong by, as a share of itself, for all layers alike and for each
# one; and what weights cannot explain of a KL. Wide on purpose, fitted to no model.
COMMON_ERROR = 0.5
LAYER_ERROR = 0.3
UNEXPLAINED = 0.02
LEAST_WEIGHT = 0.05


def sweep(levels: Levels, points: Sequence[np.ndarray]) -> list[PrecisionMix]:
    """Mixes of two neighbouring levels that a layer is measured at, worst first.

    An edge's 100 % is the 0 % of the edge above. All at 16 bits loses nothing, so it
    is left out.
    """
    mixes = [
        levels.mix(levels.at(edge, share))
        for edge in reversed(range(len(points)))
        for share in points[edge][:-1].tolist()
    ]
    return mixes if levels.bits[0] == 16 else [*mixes, levels.highest()]


@dataclass(frozen=True)
class Additive:
    """Losses of each layer along each edge (see `levels`), by interpolation.

        KL(mixes) ~ sum over layers of base + sum over edges i of curve_i(edge_i)

    points: hundredths of a percent, ascending to 100 %, an array an edge.
    curves: [L, points] an edge; 0 at 100 %. base: [L], all at the best level.
    options: int [O, E] edges a layer may have. costs: [L, O].
    """

    levels: Levels
    points: tuple[np.ndarray, ...]
    curves: tuple[np.ndarray, ...]
    base: np.ndarray
    options: np.ndarray
    costs: np.ndarray

    @classmethod
    def from_sweeps(
        cls,
        levels: Levels,
        points: Sequence[np.ndarray],
        measured: np.ndarray,
        costs: Sequence[Cost],
        *,
        step: int | None,
    ) -> "Additive":
        """From KLs measured: [L, M] of each layer at the M mixes of `sweep`.

        Args:
            step: hundredths of a percent between options; None: the swept points.
        """
        clean = np.stack([falling(row) for row in np.maximum(measured, 0)])
        if levels.bits[0] == 16:
            clean = np.pad(clean, [(0, 0), (0, 1)])
        curves, start = [], 0
        for edge in reversed(points):
            stop = start + len(edge)
            curves.insert(0, clean[:, start:stop] - clean[:, stop - 1 : stop])
            start = stop - 1
        finer = () if step is None else range(0, int(points[0][-1]), step)
        options = levels.options(
            [np.unique([*edge, *(s for s in finer if s >= edge[0])]) for edge in points]
        )
        each = [option_costs(levels, options, cost) for cost in costs]
        return cls(
            levels=levels,
            points=tuple(points),
            curves=tuple(curves),
            base=clean[:, -1],
            options=options,
            costs=np.stack(each),
        )

    def losses(self, mixes: Sequence[PrecisionMix]) -> np.ndarray:
        """Addends of the sum: [L, E + 1], the base last."""
        edges = [self.levels.edges(mix) for mix in mixes]
        rows = [
            [*(_between(*at) for at in zip(own, self.points, curves)), base]
            for own, base, *curves in zip(edges, self.base, *self.curves)
        ]
        return np.array(rows)

    def estimate(self, mixes: Sequence[PrecisionMix]) -> float:
        return float(self.losses(mixes).sum())

    def solve(
        self, weights: np.ndarray | None = None, *, budget: float
    ) -> tuple[PrecisionMix, ...]:
        """The best mixes under the budget if layers added up.

        Args:
            weights: [L, E + 1] of the addends; None: 1.
        """
        values = np.zeros(self.costs.shape)
        for i, (at, curves) in enumerate(zip(self.points, self.curves)):
            shares, where = np.unique(self.options[:, i], return_inverse=True)
            loss = np.stack([_between(shares, at, curve) for curve in curves])
            values += (loss if weights is None else loss * weights[:, i, None])[
                :, where
            ]
        chosen = allocate(values, self.costs, budget=budget)
        return tuple(self.levels.mix(edges) for edges in self.options[chosen].tolist())


def _between(shares, points: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Interpolates roots: the loss left over by the best x is much like (1 - x)^p with
    p >= 2, whose root is the straighter curve; monotone as the points are."""
    return np.interp(shares, points, np.sqrt(losses)) ** 2


def weights_of(
    losses: np.ndarray, kls: np.ndarray, random: np.random.Generator | None = None
) -> np.ndarray:
    """Weights of the addends that explain measured KLs: [L, E + 1].

        KL_n = sum (w * losses_n) + noise,   w = 1 + common error of an edge + own error

    Gaussian errors, relative to each KL: the posterior mean, or a draw from it (a draw
    from the prior, moved as the mean is).

    Args:
        losses: [n, L, E + 1]. kls: [n], not all zero.
        random: draws; None: the mean.
    """
    scale = np.maximum(kls, 1e-3 * kls.max())
    x = losses / scale[:, None, None]
    count, layers, edges = x.shape
    before, noise = np.ones((layers, edges)), np.zeros(count)
    if random is not None:
        before = before + COMMON_ERROR * random.standard_normal(edges)
        before = before + LAYER_ERROR * random.standard_normal((layers, edges))
        noise = UNEXPLAINED * random.standard_normal(count)
    spread = COMMON_ERROR**2 * x.sum(axis=1, keepdims=True) + LAYER_ERROR**2 * x
    gram = np.einsum("nlk,mlk->nm", x, spread) + UNEXPLAINED**2 * np.eye(count)
    wrong = kls / scale - np.einsum("nlk,lk->n", x, before) - noise
    moved = np.einsum("n,nlk->lk", np.linalg.solve(gram, wrong), spread)
    return np.maximum(before + moved, LEAST_WEIGHT)
