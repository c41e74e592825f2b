"""Every implementation of every kernel against float64 NumPy, on the same cases."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.kernels import linear as linear_op
from m2jax.kernels import sparse_swiglu as swiglu_op
from m2jax.kernels import tiles
from m2jax.kernels.linear.reference import widen
from m2jax.kernels.tiles import MIN_TILE_ROWS, tile_rows
from m2jax.quant import (
    dequantise_base,
    dequantise_int8,
    quantise_rows,
    split_codes,
)

# float32 sums of up to 600 products of numbers near 1, relative to the largest sum;
# the worst here is 2e-6, and one wrong weight moves a sum by 1e-2 or more.
ROUNDING = 2e-5
GROUP = 16
# Tokens, rows, width: no row, a prime number (a padded last tile), whole tiles.
WHOLE = [(5, 0, 64), (5, 97, 96), (1, 97, 512)]
BLOCKED = [*WHOLE, (1, 176, 64)]
CASES = [("xla", case) for case in WHOLE] + [("xla_blocked", case) for case in BLOCKED]
DTYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
PLANES = ["q4", "r4", "bfloat16"]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """So small that these cases need many."""
    monkeypatch.setattr(tiles, "TILE_VALUES_ONE", 1 << 11)
    monkeypatch.setattr(tiles, "TILE_VALUES_MANY", 1 << 12)
    monkeypatch.setattr(tiles, "MIN_TILE_ROWS", 2)


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def stored(w: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The array as the device holds it, and its values."""
    kept = w.astype(DTYPES[dtype])
    bits = kept.view(np.uint16) if dtype == "bfloat16" else kept
    return bits, kept.astype(np.float64)


def records_of(
    neurons: int, width: int, *, plane: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Records [N, R], scales, and the values [N, 3, W] that they stand for."""
    rows = normal(max(neurons, 1), 3, width, seed=1)
    if plane in DTYPES:
        records, values = stored(rows, plane)
        scales = None
    else:
        codes, scales, _ = quantise_rows(rows, group=GROUP)
        q4, records = split_codes(codes)
        values = dequantise_base(q4, scales, group=GROUP).astype(np.float64)
        if plane == "q4":
            records = q4
        else:
            values = dequantise_int8(q4, records, scales, group=GROUP) - values
        scales = scales[:neurons]
    return records.reshape(len(rows), -1)[:neurons], scales, values[:neurons]


def assert_equal_but_for_rounding(given: jax.Array, wanted: np.ndarray) -> None:
    assert given.dtype == jnp.float32
    assert given.shape == wanted.shape
    largest = np.abs(wanted).max(initial=0)
    assert np.abs(given - wanted).max(initial=0) <= ROUNDING * largest


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_linear_is_the_product_with_the_transposed_matrix(name, case, dtype):
    tokens, rows, width = case
    bits, values = stored(normal(rows, width, seed=0), dtype)
    x = normal(tokens, width, seed=2)
    y = jax.jit(partial(linear_op.linear, implementation=name))(x, bits)
    assert_equal_but_for_rounding(y, x.astype(np.float64) @ values.T)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_project_gives_gate_and_up_of_every_record(name, case, plane):
    tokens, neurons, width = case
    records, scales, values = records_of(neurons, width, plane=plane)
    kind = "w16" if plane in DTYPES else plane
    x = normal(tokens, width, seed=2)
    project = partial(swiglu_op.project, plane=kind, implementation=name)
    for row, found in enumerate(jax.jit(project)(x, records, scales)):
        wanted = x.astype(np.float64) @ values[:, row].T
        assert_equal_but_for_rounding(found, wanted)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_accumulate_sums_the_down_columns_weighted_by_activations(name, case, plane):
    tokens, neurons, width = case
    records, scales, values = records_of(neurons, width, plane=plane)
    kind = "w16" if plane in DTYPES else plane
    h = normal(tokens, neurons, seed=2)
    accumulate = partial(swiglu_op.accumulate, plane=kind, implementation=name)
    y = jax.jit(accumulate)(h, records, scales)
    assert_equal_but_for_rounding(y, h.astype(np.float64) @ values[:, 2])


def test_every_implementation_has_cases():
    names = {name for name, _ in CASES}
    assert names == linear_op.IMPLEMENTATIONS.keys()
    assert names == swiglu_op.PROJECT.keys() == swiglu_op.ACCUMULATE.keys()


def test_base_and_residual_passes_together_are_the_int8_pass():
    records, scales, base = records_of(33, 96, plane="q4")
    residual, _, correction = records_of(33, 96, plane="r4")
    x = normal(3, 96, seed=2)
    gate4, _ = swiglu_op.project(x, records, scales, plane="q4")
    gate8, _ = swiglu_op.project(x, residual, scales, plane="r4")
    int8 = (base + correction)[:, 0]
    assert_equal_but_for_rounding(gate4 + gate8, x.astype(np.float64) @ int8.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_keeps_every_stored_value(dtype: str):
    special = [0.0, -0.0, 1.0, -1.5, 6e-5, 65000.0, np.inf, np.nan]
    bits, values = stored(np.array(special, np.float32), dtype)
    assert np.array_equal(widen(jnp.array(bits)), values, equal_nan=True)


@pytest.mark.parametrize("name", ["pallas", "", "XLA"])
def test_an_unknown_implementation_is_refused(name: str):
    records, scales, _ = records_of(4, 64, plane="q4")
    x = normal(1, 64, seed=2)
    with pytest.raises(ValueError, match="xla_blocked"):
        linear_op.linear(jnp.array(x), jnp.array(x), implementation=name)
    with pytest.raises(ValueError, match="xla_blocked"):
        swiglu_op.project(x, records, scales, plane="q4", implementation=name)
    with pytest.raises(ValueError, match="xla_blocked"):
        swiglu_op.accumulate(
            normal(1, 4, seed=3), records, scales, plane="q4", implementation=name
        )


@given(st.integers(1, 1 << 17), st.integers(1, 1 << 16), st.sampled_from([1, 2, 512]))
def test_tiles_cover_the_rows_within_their_memory(rows: int, width: int, tokens: int):
    tile = tile_rows(rows, width, tokens=tokens)
    values = tiles.TILE_VALUES_ONE if tokens == 1 else tiles.TILE_VALUES_MANY
    assert 1 <= tile <= rows
    assert tile <= MIN_TILE_ROWS or tile * width <= values
    missing = -rows % tile
    assert missing < tile
    assert not missing or tile == max(MIN_TILE_ROWS, values // width)
