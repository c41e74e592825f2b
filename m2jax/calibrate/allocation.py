"""Who gets how much under a budget, where losses add up: numbers only, no mixes."""

from fractions import Fraction
from math import lcm

import numpy as np

# Sums of floats: 22 layers of 8/22 bits are 8 bits.
ROUNDING = 1e-9
# Steps of the budget where costs have no common unit that is coarser.
MAX_UNITS = 1 << 16
MAX_DISTINCT = 1 << 12


def fits(cost: float, budget: float) -> bool:
    """Whether a cost is within the budget, but for the rounding of sums."""
    return cost <= budget + ROUNDING * abs(budget)


def falling(values: np.ndarray) -> np.ndarray:
    """The nearest sequence (least squares) that never rises: pools adjacent violators.

    What is measured on few tokens may rise with more bits; what is true does not.
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] < mean:
            before, size = blocks.pop()
            mean = (before * size + mean * count) / (size + count)
            count += size
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])


def allocate(values: np.ndarray, costs: np.ndarray, *, budget: float) -> np.ndarray:
    """One option a layer, with the least sum of values that the budget allows.

    The multiple-choice knapsack by dynamic programming over the cost above the
    cheapest. Exact where costs are multiples of a common unit, as shares on a grid
    times equal layers are: a hull of Lagrange multipliers would miss what lies between
    its corners. Else costs are rounded up to 1/65536 of the budget: never over it.

    Args:
        values: [L, O], to be minimised. costs: [L, O], any numbers.

    Returns:
        int [L]: option of each layer.

    Raises:
        ValueError: the cheapest options together are over the budget.
    """
    cheapest = costs.min(axis=1)
    if not fits(cheapest.sum(), budget):
        raise ValueError(f"budget {budget:g}: want at least {cheapest.sum():g}")
    excess = costs - cheapest[:, None]
    room = min(max(budget - cheapest.sum(), 0.0), excess.max(axis=1).sum())
    unit = _unit(excess, room)
    capacity = int(room / unit + 1e-6)
    units = np.ceil(np.minimum(excess / unit, capacity + 1) - 1e-6).astype(np.int64)
    least = np.zeros(capacity + 1)
    picked = []
    for layer_units, layer_values in zip(units, values, strict=True):
        ahead = np.full(capacity + 1, np.inf)
        pick = np.zeros(capacity + 1, np.int32)
        for option in _undominated(layer_units, layer_values, capacity):
            used = layer_units[option]
            reached = least[: capacity + 1 - used] + layer_values[option]
            better = reached < ahead[used:]
            ahead[used:][better] = reached[better]
            pick[used:][better] = option
        least = ahead
        picked.append(pick)
    chosen, left = np.zeros(len(values), np.int64), capacity
    for layer in reversed(range(len(values))):
        chosen[layer] = picked[layer][left]
        left -= units[layer, chosen[layer]]
    return chosen


def _undominated(units: np.ndarray, values: np.ndarray, capacity: int) -> list[int]:
    """Options that fit and are better than every cheaper one, cheapest first."""
    order = np.lexsort((values, units))
    order = order[units[order] <= capacity]
    sorted_values = values[order]
    best_before = np.minimum.accumulate(np.append(np.inf, sorted_values))[:-1]
    return order[sorted_values < best_before].tolist()


def _unit(excess: np.ndarray, room: float) -> float:
    """Greatest unit that all costs are multiples of, if it is not too fine."""
    most = float(excess.max())
    if most <= 0 or room <= 0:
        return max(most, 1.0)
    ratios = np.unique(np.round(excess / most, 12))
    finest = room / MAX_UNITS
    if len(ratios) > MAX_DISTINCT:
        return finest
    near = [Fraction(float(ratio)).limit_denominator(MAX_DISTINCT) for ratio in ratios]
    parts = lcm(*(fraction.denominator for fraction in near))
    exact = all(abs(float(f) - r) < ROUNDING for f, r in zip(near, ratios))
    return most / parts if exact and most / parts >= finest else finest
