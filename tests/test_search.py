"""The search for the precision mix, on planted models whose best mixes are known."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.calibrate.allocation import MAX_UNITS
from m2jax.calibrate.search import (
    Cost,
    layer_cost,
    search_mixes,
    total_cost,
)
from m2jax.errors import NumericalError
from m2jax.layer_mixes import edges_of
from m2jax.mix import PrecisionMix

PLANES = ("q4", "r4", "w16")
# Sums of the same floats in another order.
REORDERED = 1e-12
# `fits` allows the rounding of sums.
BUDGET_ROUNDING = 1e-9
# Costs without a common unit are rounded up to budget / MAX_UNITS a layer.
UNIT_SHARE = 1 / MAX_UNITS


def mean_bits(layers: int) -> list[Cost]:
    """A budget of these is in bits a weight, on average over layers."""
    return [Cost(16 / layers, 8 / layers, 4 / layers)] * layers


class Planted:
    """Layers whose losses fall along each edge; the first x leave (1 - x)^power.

    joint adds them up, with weights that `probe` does not show, and the square of the
    first two layers' losses times `together`.
    """

    def __init__(self, seed: int, layers: int, *, together: float = 0.0):
        random = np.random.default_rng(seed)
        size = np.exp(random.normal(0, 1, [layers, 1]))
        self._size = (
            size * np.array([0.002, 0.06, 1.0]) * random.uniform(0.5, 2, [layers, 3])
        )
        self._power = random.uniform(2, 5, [layers, 3])
        self.weights = np.ones(layers)
        self.together = together
        self.probed: list[int] = []
        self.joined: list[tuple[PrecisionMix, ...]] = []

    def loss(self, layer: int, mix: PrecisionMix) -> np.ndarray:
        left = 1 - np.array(edges_of(mix)) / 10_000
        return self._size[layer] * left ** self._power[layer]

    def probe(self, layer: int, mix: PrecisionMix) -> float:
        self.probed.append(layer)
        return float(self.loss(layer, mix).sum())

    def joint(self, mixes: tuple[PrecisionMix, ...]) -> float:
        self.joined.append(mixes)
        losses = np.array([self.loss(*pair) for pair in enumerate(mixes)])
        pair = self.together * losses[:2].sum() ** 2
        return float(self.weights @ losses.sum(axis=1) + pair)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), skip=st.booleans(), lattice=st.booleans())
def test_the_additive_optimum_is_that_of_brute_force(seed, skip, lattice):
    random = np.random.default_rng(seed)
    planted = Planted(seed, layers := int(random.integers(1, 4)))
    costs = [
        Cost(*np.sort(random.integers(0, 20, 3) if lattice else random.random(3))[::-1])
        for _ in range(layers)
    ]
    shares = (0, 50, 100)
    edges = [e for e in product(shares, repeat=3) if e[0] <= e[1] <= e[2]]
    options = [PrecisionMix(a, b - a, c - b) for a, b, c in edges if skip or c == 100]
    prices, losses = np.zeros(1), np.zeros(1)
    for layer, cost in enumerate(costs):
        price = np.array([layer_cost(mix, cost) for mix in options])
        loss = np.array([planted.probe(layer, mix) for mix in options])
        prices = np.add.outer(prices, price).ravel()
        losses = np.add.outer(losses, loss).ravel()
    budget = float(random.uniform(prices.min(), prices.max()))
    found = search_mixes(
        planted.probe,
        planted.joint,
        costs,
        budget=budget,
        allow_skip=skip,
        shares=shares,
        step=None,
    )
    spare = 0 if lattice else layers * UNIT_SHARE * (budget - prices.min())
    within = prices <= max(budget - spare, prices.min()) + REORDERED
    least = losses[within].min()
    assert found.cost <= budget * (1 + BUDGET_ROUNDING)
    if found.candidate is not None:
        assert found.candidate.kl <= least + REORDERED
        assert found.estimate == pytest.approx(found.candidate.kl, abs=REORDERED)
    assert found.kl <= least + REORDERED


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["weights", "a pair"])
def test_refinement_learns_what_single_layers_do_not_show(seed, kind):
    planted = Planted(seed, 6, together=30 if kind == "a pair" else 0)
    if kind == "weights":
        planted.weights = np.random.default_rng(seed).permutation([1, 1, 1, 1, 9, 9])
    found = search_mixes(planted.probe, planted.joint, mean_bits(6), budget=5)
    assert found.candidate is not None
    better = 0.9  # Without interactions refinement gains 1 % or less.
    assert found.kl < better * found.candidate.kl
    assert found.kl < found.uniform.kl


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 5),
    bits=st.floats(0.5, 15.5),
    noise=st.sampled_from([0.0, 0.3, 2.0]),
    limit=st.integers(2, 12),
)
def test_the_result_is_the_best_measured_whatever_the_noise(
    seed, layers, bits, noise, limit
):
    planted, random = Planted(seed, layers), np.random.default_rng(seed)
    skip, costs = bits < 4 or seed % 2 == 0, mean_bits(layers)
    found = search_mixes(
        lambda *at: planted.probe(*at) * np.exp(noise * random.normal()),
        lambda mixes: planted.joint(mixes) * np.exp(noise * random.normal()),
        costs,
        budget=bits,
        allow_skip=skip,
        joint_limit=limit,
    )
    kls = [measured.kl for measured in found.evaluated]
    alike = [m for m in found.evaluated if len(set(m.mixes)) == 1]
    assert found.kl == min(kls) <= found.uniform.kl == min(m.kl for m in alike)
    assert len(set(planted.joined)) == len(planted.joined) == len(kls) <= limit
    for mixes, cost, _ in found.evaluated:
        assert cost == total_cost(mixes, costs) <= bits * (1 + BUDGET_ROUNDING)
        assert skip or all(edges_of(mix)[2] == 10_000 for mix in mixes)


def test_at_8_bits_plain_int8_and_the_papers_mix_are_measured():
    planted = Planted(0, 22)
    found = search_mixes(planted.probe, planted.joint, mean_bits(22), budget=8)
    assert planted.joined[0] == (PrecisionMix(0, 100, 0),) * 22
    assert planted.joined[1] == (PrecisionMix(25, 25, 50),) * 22
    assert len(planted.joined) == 24
    # Layer by layer, so that a sweep can keep one layer in memory.
    assert planted.probed == [layer for layer in range(22) for _ in range(12)]
    assert [probed.layer for probed in found.probed] == planted.probed


def test_a_budget_that_all_16_bits_fit_needs_no_sweep():
    planted = Planted(0, 3)
    found = search_mixes(planted.probe, planted.joint, mean_bits(3), budget=16)
    assert found.mixes == (PrecisionMix(100, 0, 0),) * 3
    assert (found.uniform, found.candidate) == (found.best, None)
    assert (len(planted.joined), planted.probed) == (1, [])


@pytest.mark.parametrize(
    ("planes", "skip", "kept", "smallest", "cheapest"),
    [
        (PLANES, False, 0, 4, "0/0/100"),
        (PLANES, True, 0, 0, "0/0/0"),
        (PLANES, True, 62.5, 2.5, "0/0/62.5"),
        (PLANES, True, 100, 4, "0/0/100"),
        (("w16",), True, 25, 4, "25/0/0"),
    ],
)
def test_the_smallest_budget_works_and_less_is_refused_by_number(
    planes, skip, kept, smallest, cheapest
):
    def search(budget):
        planted = Planted(0, 7)
        return search_mixes(
            planted.probe,
            planted.joint,
            mean_bits(7),
            budget=budget,
            planes=planes,
            allow_skip=skip,
            min_kept=kept,
        )

    assert set(map(str, search(smallest).mixes)) == {cheapest}
    with pytest.raises(ValueError, match=rf"is {smallest}, .*{cheapest}"):
        search(smallest - 1e-6)


@pytest.mark.parametrize("budget", [6, 100])
@pytest.mark.parametrize(
    ("planes", "classes"),
    [(("q4", "r4"), {8, 4}), (("q4", "w16"), {16, 4}), (("q4",), {4})],
)
def test_only_classes_of_the_stores_planes_are_tried(planes, classes, budget):
    planted = Planted(1, 3)
    found = search_mixes(
        planted.probe, planted.joint, mean_bits(3), budget=budget, planes=planes
    )
    tried = [*(probed.mix for probed in found.probed), *sum(planted.joined, ())]
    for mix in tried:
        shares = {16: mix.percent16, 8: mix.percent8, 4: mix.percent4}
        assert {bits for bits, share in shares.items() if share} <= classes
        assert sum(shares.values()) == 100
    if budget == 6 and len(classes) == 2:
        assert found.cost == pytest.approx(6, abs=0.8)  # One step of 5 % of 16 bits.


def test_the_only_possible_mix_is_measured_once():
    planted = Planted(0, 1)
    found = search_mixes(
        planted.probe,
        planted.joint,
        mean_bits(1),
        budget=2,
        planes=("q4",),
        allow_skip=True,
    )
    assert planted.joined == [(PrecisionMix(0, 0, 50),)]
    assert found.uniform == found.candidate == found.best


def test_nan_names_the_layer_or_the_mix():
    planted, nan = Planted(0, 3), float("nan")
    with pytest.raises(NumericalError, match=r"layer 2: .* 0/5/95 is nan"):
        search_mixes(
            lambda n, mix: nan if (n, str(mix)) == (2, "0/5/95") else 1.0,
            planted.joint,
            mean_bits(3),
            budget=6,
        )
    with pytest.raises(NumericalError, match="mix 0/50/50 is inf"):
        search_mixes(planted.probe, lambda _: float("inf"), mean_bits(3), budget=6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": float("nan")}, "finite"),
        ({"costs": []}, "one a layer"),
        ({"costs": [Cost(4, 8, 16)]}, "layer 0: .* grow"),
        ({"planes": ("r4",)}, "planes"),
        ({"min_kept": 101}, "min_kept 101"),
        ({"shares": (5, 120)}, "share 120"),
        ({"step": 0}, "step 0"),
        ({"joint_limit": 1}, "joint_limit 1"),
    ],
)
def test_a_wrong_argument_is_refused_before_any_measurement(wrong, message):
    planted = Planted(0, 1)
    right = {"costs": mean_bits(1), "budget": 6} | wrong
    with pytest.raises(ValueError, match=message):
        search_mixes(planted.probe, planted.joint, **right)
    assert not planted.probed
    assert not planted.joined


def test_progress_rises_to_its_total_and_a_seed_repeats_itself():
    def search(report):
        # Additive, so that refinement has nothing but its draws.
        planted = Planted(3, 8)
        return search_mixes(
            planted.probe, planted.joint, mean_bits(8), budget=5, progress=report
        )

    seen = []
    first = search(lambda *at: seen.append(at))
    assert first == search(lambda *at: None)
    done, totals = zip(*seen)
    assert all(b - a in (0, 1) for a, b in pairwise(done))
    assert done[-1] == totals[-1] == len(first.probed) + len(first.evaluated)
    assert set(totals[:-1]) == {8 * 12 + 24}
