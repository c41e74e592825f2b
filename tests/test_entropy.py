"""The paper's Algorithm 1 on planted entropies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.calibrate.entropy import search_three, search_two
from m2jax.calibrate.levels import Cost, layer_cost
from m2jax.errors import NumericalError
from m2jax.mix import PrecisionMix

BITS = Cost(16, 8, 4)
# Two shares are rounded down to 0.01 percent each, at 16 bits at most.
ROUNDED_BITS = 2 * 16 / 10_000
FLOAT = 1e-9


def kept(mix: PrecisionMix) -> float:
    return mix.percent16 + mix.percent8 + mix.percent4


def mixes_of(search, **options) -> list[str]:
    return [str(point.mix) for point in search(lambda mix: 1.0, **options).points]


@pytest.mark.parametrize("t", [0, 10, 25, 33.33])
def test_the_least_entropy_is_found_at_either_end_and_within(t):
    seen = search_three(lambda mix: abs(mix.percent16 - t))
    assert seen.best.mix.percent16 == t
    assert seen.best.entropy == 0


def test_at_8_bits_plain_int8_is_the_start_and_the_papers_mix_is_on_the_line():
    assert mixes_of(search_three, bits=8) == [
        "0/100/0",
        "5/85/10",
        "10/70/20",
        "15/55/30",
        "20/40/40",
        "25/25/50",
        "30/10/60",
        "33.33/0/66.67",
    ]


@pytest.mark.parametrize("bits", [4, 6, 7.3, 16])
def test_without_plane_r4_one_mix_uses_the_budget_and_skips_nobody(bits):
    points = search_three(lambda mix: 1.0, bits=bits, planes=("q4", "w16")).points
    [mix] = [point.mix for point in points]
    assert mix.percent8 == 0
    assert kept(mix) == 100
    assert bits - ROUNDED_BITS <= layer_cost(mix, BITS) <= bits + FLOAT


def test_two_precisions_start_all_low_and_end_before_a_negative_share():
    assert mixes_of(search_two, high=8, low=4, bits=3, step=10) == [
        "0/0/75",
        "0/10/55",
        "0/20/35",
        "0/30/15",
        "0/37.5/0",
    ]


def test_two_precisions_above_the_low_bits_start_where_nothing_is_skipped():
    assert mixes_of(search_two, bits=8) == [
        "33.33/0/66.67",
        "35/0/60",
        "40/0/40",
        "45/0/20",
        "50/0/0",
    ]


@given(st.floats(4, 16), st.floats(0.5, 100))
def test_three_classes_skip_nothing_and_spend_the_budget(bits, step):
    seen = search_three(lambda mix: 1.0, bits=bits, step=step)
    for mix, _ in seen.points:
        assert kept(mix) == pytest.approx(100, abs=FLOAT)
        assert bits - ROUNDED_BITS <= layer_cost(mix, BITS) <= bits + FLOAT
    at16 = [point.mix.percent16 for point in seen.points]
    assert at16 == sorted(at16)
    assert seen.points[0].mix.percent16 == pytest.approx(
        max(0, bits - 8) / 0.08, abs=0.01 + FLOAT
    )
    # The end: nothing is at 8 bits but what rounding left.
    assert seen.points[-1].mix.percent8 <= 0.03 + FLOAT
    assert np.all(np.diff(at16) <= step + 0.02)


@given(
    st.sampled_from([(16, 8), (16, 4), (8, 4)]), st.floats(0.01, 1), st.floats(0.5, 100)
)
def test_two_precisions_spend_the_budget_and_no_share_is_over_all(pair, part, step):
    high, low = pair
    bits = part * high
    seen = search_two(lambda mix: 1.0, high=high, low=low, bits=bits, step=step)
    for mix, _ in seen.points:
        assert kept(mix) <= 100 + FLOAT
        assert bits - ROUNDED_BITS <= layer_cost(mix, BITS) <= bits + FLOAT
    first, last = seen.points[0].mix, seen.points[-1].mix
    share_low = {8: first.percent8, 4: first.percent4}[low]
    expected = 100 * bits / low if bits <= low else 100 * (high - bits) / (high - low)
    assert share_low == pytest.approx(expected, abs=0.02)
    assert {8: last.percent8, 4: last.percent4}[low] <= 0.05


def test_a_tie_goes_to_the_first_and_progress_counts_the_points():
    ticks = []
    seen = search_three(lambda mix: 2.0, step=25, progress=lambda *at: ticks.append(at))
    assert seen.best == seen.points[0]
    assert ticks == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("search", "wrong", "message"),
    [
        (search_three, {"bits": 3.9}, r"3.9 bits: want 4 to 16"),
        (search_three, {"bits": float("nan")}, "nan bits"),
        (search_three, {"step": 0}, "step 0"),
        (search_two, {"bits": 0}, "0 bits"),
        (search_two, {"bits": 9, "high": 8}, "at most 8"),
        (search_two, {"high": 4, "low": 8}, "higher first"),
        (search_two, {"high": 12}, "two of 16, 8 and 4"),
    ],
)
def test_a_line_without_points_is_refused(search, wrong, message):
    with pytest.raises(ValueError, match=message):
        search(lambda mix: 1.0, **wrong)


def test_an_entropy_that_is_no_number_names_the_mix():
    with pytest.raises(NumericalError, match="mix 25/25/50: the entropy is nan"):
        search_three(lambda mix: float("nan") if mix.percent16 == 25 else 1.0)
