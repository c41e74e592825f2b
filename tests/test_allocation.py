"""Who gets how much: the knapsack, clean curves, mixes that use a budget up."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.calibrate.additive import Additive
from m2jax.calibrate.allocation import MAX_UNITS, ROUNDING, allocate, falling
from m2jax.calibrate.levels import Cost, Levels, layer_cost, uniform_mixes
from m2jax.calibrate.search import SHARES
from m2jax.layer_mixes import edges_of
from m2jax.mix import PrecisionMix

PLANES = ("q4", "r4", "w16")
# Sums of the same floats in another order.
REORDERED = 1e-12
# Costs without a common unit are rounded up to budget / MAX_UNITS a layer.
UNIT_SHARE = 1 / MAX_UNITS


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), lattice=st.booleans())
def test_an_allocation_is_exact_on_a_lattice_and_never_over_the_budget(seed, lattice):
    random = np.random.default_rng(seed)
    layers, options = random.integers(1, [5, 6]).tolist()
    values = random.random((layers, options))
    costs = random.random((layers, options))
    if lattice:
        costs = random.integers(0, 9, (layers, options)) / 7
    every = np.array(list(product(range(options), repeat=layers)))
    prices = np.take_along_axis(costs.T, every, axis=0).sum(axis=1)
    losses = np.take_along_axis(values.T, every, axis=0).sum(axis=1)
    budget = random.choice([prices.min(), prices.max(), *random.choice(prices, 3)])
    chosen = allocate(values, costs, budget=budget)
    rows = np.arange(layers)
    assert costs[rows, chosen].sum() <= budget * (1 + ROUNDING)
    spare = 0 if lattice else layers * UNIT_SHARE * (budget - prices.min())
    within = prices <= max(budget - spare, prices.min()) + REORDERED
    assert values[rows, chosen].sum() <= losses[within].min() + REORDERED


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.integers(0, 99))
def test_falling_is_the_nearest_sequence_that_never_rises(values, seed):
    values = np.array(values)
    near = falling(values)
    assert np.all(np.diff(near) <= 0)
    other = np.sort(np.random.default_rng(seed).normal(size=near.shape))[::-1]
    # A projection: what is cut off points away from all that never rises.
    for toward in (other - near, np.ones_like(near), -np.ones_like(near)):
        assert (values - near) @ toward <= REORDERED


@pytest.mark.parametrize("bits", [3, 4.6, 6, 9.5, 13])
@pytest.mark.parametrize("skip", [True, False])
def test_uniform_mixes_use_the_budget_up(bits, skip):
    levels = Levels.of_planes(PLANES, allow_skip=skip, min_kept=20)
    shares = [100 * share for share in SHARES]
    mixes = uniform_mixes(levels, shares, Cost(16, 8, 4), budget=bits)
    assert (len(mixes) > 0) == (skip or bits >= 4)
    spent = [layer_cost(mix, Cost(16, 8, 4)) for mix in mixes]
    rounding = 16 / 10_000  # A share is rounded down to 0.01 %.
    assert all(bits - rounding <= cost <= bits + REORDERED for cost in spent)
    assert all(edges_of(mix)[2] >= (2000 if skip else 10_000) for mix in mixes)


def test_interpolation_keeps_swept_points_and_never_rises():
    levels = Levels.of_planes(PLANES, allow_skip=True, min_kept=0)
    points = levels.points([100 * share for share in SHARES])
    swept = np.sort(np.random.default_rng(0).random((2, 18)), axis=1)[:, ::-1]
    model = Additive.from_sweeps(levels, points, swept, [Cost(16, 8, 4)] * 2, step=250)
    worst_first = [(0, 0, e) for e in range(0, 100)] + [(0, e, 100) for e in range(100)]
    losses = [
        model.losses([PrecisionMix(a, b - a, c - b)] * 2).sum(axis=1)
        for a, b, c in [*worst_first, *((e, 100, 100) for e in range(101))]
    ]
    assert np.all(np.diff(losses, axis=0) <= REORDERED)
    at = [100 * edge + share for edge in range(3) for share in SHARES[:-1]]
    np.testing.assert_allclose(np.array(losses)[at].T, swept, atol=REORDERED)
