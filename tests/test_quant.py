"""The nested quantiser: what q4 and r4 read back as, and how it compares."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.quant import (
    dequantise_base,
    dequantise_int8,
    quantise_rows,
    row_shape,
    split_codes,
    unpack_nibbles,
)

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import quality_quantisers as others

# float32 rounding of a quotient of at most 136 steps.
ROUNDING = 136 * 2.0**-22
seeds = st.integers(0, 2**32 - 1)
groups = st.sampled_from([16, 32, 64, 128])


def weights(seed: int, group: int, *, skew: float = 0.0) -> np.ndarray:
    """Rows of three groups with heavy tails; skew moves them to one side."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_t(4, size=(5, 3 * group)) + skew
    size = 10.0 ** generator.uniform(-6, 3, size=(5, 1))
    return (size * rows).astype(np.float32)


def planes(rows: np.ndarray, group: int):
    codes, scales, _ = quantise_rows(rows, group=group)
    return codes, scales, *split_codes(codes)


@given(seeds, groups, st.floats(-5, 5))
def test_both_planes_together_are_the_8_bit_code_exactly(seed, group, skew):
    codes, scales, q4, r4 = planes(weights(seed, group, skew=skew), group)
    high, low = unpack_nibbles(q4).astype(int), unpack_nibbles(r4).astype(int)
    assert np.array_equal(16 * high + low, codes)
    steps = np.repeat(scales.astype(np.float32), group, axis=-1)
    whole = dequantise_int8(q4, r4, scales, group=group)
    base = dequantise_base(q4, scales, group=group)
    # Bit for bit: an integer of 8 bits times a scale of 11 is a float32.
    assert np.array_equal(whole, (codes.astype(np.float32) - 136) * steps)
    assert np.array_equal(base, 16 * (high.astype(np.float32) - 8) * steps)
    assert np.array_equal(whole, base + (low.astype(np.float32) - 8) * steps)


@given(seeds, groups, st.floats(-5, 5))
def test_every_weight_is_within_half_a_step_at_8_bits(seed, group, skew):
    rows = weights(seed, group, skew=skew)
    _, scales, q4, r4 = planes(rows, group)
    steps = np.abs(np.repeat(scales.astype(np.float64), group, axis=-1))
    error = np.abs(dequantise_int8(q4, r4, scales, group=group) - rows)
    assert (error <= steps * (0.5 + ROUNDING)).all()


@given(seeds, groups, st.floats(-5, 5))
def test_a_step_is_no_wider_than_that_of_plain_int8(seed, group, skew):
    rows = weights(seed, group, skew=skew)
    _, scales, _ = quantise_rows(rows, group=group)
    largest = np.abs(rows.reshape(5, 3, group)).max(-1)
    # Wider only where both sides reach far: then 119 steps must hold the nearer one.
    other = np.sort(
        [rows.reshape(5, 3, group).max(-1), -rows.reshape(5, 3, group).min(-1)], axis=0
    )[0]
    allowed = np.maximum(largest / 127, np.maximum(other, 0) / 119)
    assert (np.abs(scales.astype(np.float64)) <= allowed * (1 + 2.0**-9) + 6e-8).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_planes_lose_less_than_plain_quantisers_of_equal_scale_bytes(group):
    rows = np.random.default_rng(0).normal(size=(256, 4 * group)).astype(np.float32)
    _, scales, q4, r4 = planes(rows, group)

    def loss(back: np.ndarray) -> float:
        return float(np.mean((back - rows) ** 2, dtype=np.float64))

    base = loss(dequantise_base(q4, scales, group=group))
    assert base < 0.9 * loss(others.int4(rows, group))
    assert base < loss(others.top_bits(rows, group)[0])
    whole = loss(dequantise_int8(q4, r4, scales, group=group))
    assert whole <= loss(others.int8(rows, group))


def test_zeros_stay_zero_on_both_planes():
    rows = weights(3, 32)
    rows[1] = 0
    rows[2, ::3] = 0
    _, scales, q4, r4 = planes(rows, 32)
    for back in (
        dequantise_base(q4, scales, group=32),
        dequantise_int8(q4, r4, scales, group=32),
    ):
        assert not back[rows == 0].any()
    assert not scales[1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    rows = weights(0, 16)
    rows[4, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise_rows(rows, group=16)


def test_weights_too_large_for_a_scale_are_refused():
    rows = weights(0, 16)
    rows[0, 0] = 1e7
    with pytest.raises(ValueError, match="too large"):
        quantise_rows(rows, group=16)


@pytest.mark.parametrize(
    ("hidden", "group", "width"), [(4096, 64, 4096), (96, 16, 96), (56, 16, 64)]
)
def test_rows_are_cut_into_whole_groups_in_each_half(hidden, group, width):
    shape = row_shape(hidden, group_size=64)
    assert (shape.group, shape.width) == (group, width)
