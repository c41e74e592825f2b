"""Every implementation of every kernel against float64 NumPy, on the same cases."""

import math
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.kernels import linear as linear_op
from m2jax.kernels import native, tiles
from m2jax.kernels import sparse_swiglu as swiglu_op
from m2jax.kernels.linear.reference import widen
from m2jax.kernels.sparse_swiglu import pallas_tpu, reference
from m2jax.kernels.tiles import MIN_TILE_ROWS, tile_rows
from m2jax.quant import (
    dequantise_base,
    dequantise_int8,
    quantise_rows,
    split_codes,
)
from tests.kernel_cases import (
    CASES,
    DTYPES,
    MOST_FEW,
    PLANES,
    SWIGLU_CASES,
    assert_equal_but_for_rounding,
    form_for,
    group_of,
    normal,
    on_a_gpu,
    records_of,
    rounding_of,
    stored,
)

OTHER_ACTIVATIONS = sorted(swiglu_op.ACTIVATIONS.keys() - {"silu"})
PROJECT_NAMES = ["xla", "xla_blocked", "cpu_ffi"]


@pytest.fixture
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation; of C++ the one for a few tokens, or for blocks of codes."""
    most = {"cpu_ffi_few": MOST_FEW, "cpu_ffi_blocks": 1}.get(request.param)
    if most is None:
        return request.param
    blocks = native.status().blocks
    if request.param == "cpu_ffi_blocks" and not blocks:
        pytest.skip("no kernels for blocks on this CPU")
    few = {"codes": most, "numbers": native.FEW_TOKENS}
    monkeypatch.setitem(native.FEW_BESIDE_BLOCKS, blocks, few)
    return "cpu_ffi"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """So small that these cases need many."""
    monkeypatch.setattr(tiles, "TILE_VALUES_ONE", 1 << 11)
    monkeypatch.setattr(tiles, "TILE_VALUES_MANY", 1 << 12)
    monkeypatch.setattr(tiles, "MIN_TILE_ROWS", 2)
    monkeypatch.setattr(pallas_tpu, "BLOCK_VALUES", 1 << 13)
    monkeypatch.setattr(reference, "WHOLE_VALUES", 1 << 15)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "case"), CASES, ids=str, indirect=["name"])
def test_linear_is_the_product_with_the_transposed_matrix(name, case, dtype):
    tokens, rows, width = case
    bits, values = stored(normal(rows, width, seed=0), dtype)
    x = normal(tokens, width, seed=2)
    form = form_for(name, tokens, plane=dtype)
    y = jax.jit(partial(linear_op.linear, implementation=form))(x, bits)
    assert_equal_but_for_rounding(y, x.astype(np.float64) @ values.T)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("name", "case"), CASES, ids=str, indirect=["name"])
def test_linear_of_a_packed_matrix_is_the_product_with_its_values(name, case, bits):
    tokens, rows, width = case
    group = group_of(width)
    codes, scales, _ = quantise_rows(normal(max(rows, 1), width, seed=0), group=group)
    q4, r4 = split_codes(codes)
    if bits == 8:
        values = dequantise_int8(q4, r4, scales, group=group)
    else:
        values = dequantise_base(q4, scales, group=group)
    r4 = r4[:rows] if bits == 8 else None
    packed = linear_op.Packed(q4[:rows], r4, scales[:rows])
    # Fewer inputs than a row has: the rest of it is padding.
    x = normal(tokens, width - 3, seed=2)
    form = form_for(name, tokens, plane="q4")
    y = jax.jit(partial(linear_op.linear, implementation=form))(x, packed)
    wanted = x.astype(np.float64) @ values[:rows, :-3].astype(np.float64).T
    assert_equal_but_for_rounding(y, wanted, rounding_of(name, tokens))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(("name", "case"), SWIGLU_CASES, ids=str, indirect=["name"])
def test_project_gives_gate_and_up_of_every_record(name, case, plane):
    tokens, neurons, width = case
    records, scales, values = records_of(neurons, width, plane=plane)
    kind = "w16" if plane in DTYPES else plane
    x = normal(tokens, width, seed=2)
    form = form_for(name, tokens, plane=plane)
    project = partial(swiglu_op.project, plane=kind, implementation=form)
    for row, found in enumerate(jax.jit(project)(x, records, scales)):
        wanted = x.astype(np.float64) @ values[:, row].T
        rounding = rounding_of(name, tokens, plane=plane)
        assert_equal_but_for_rounding(found, wanted, rounding)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(("name", "case"), SWIGLU_CASES, ids=str, indirect=["name"])
def test_accumulate_sums_the_down_columns_weighted_by_activations(name, case, plane):
    tokens, neurons, width = case
    records, scales, values = records_of(neurons, width, plane=plane)
    kind = "w16" if plane in DTYPES else plane
    h = normal(tokens, neurons, seed=2)
    form = form_for(name, tokens, plane=plane)
    accumulate = partial(swiglu_op.accumulate, plane=kind, implementation=form)
    y = jax.jit(accumulate)(h, records, scales)
    wanted = h.astype(np.float64) @ values[:, 2]
    rounding = rounding_of(name, tokens, plane=plane)
    assert_equal_but_for_rounding(y, wanted, rounding)


def test_the_cpp_kernels_are_there_and_used_on_a_cpu():
    """They are optional, but a test that runs without them would show nothing."""
    assert native.status().ready, native.status().about
    assert linear_op.default_implementation() == "cpu_ffi"


@pytest.mark.parametrize(
    ("name", "width"),
    [
        *((name, 96) for name in PROJECT_NAMES),
        ("pallas_tpu", 256),
        *(on_a_gpu("cuda_ffi", 96), on_a_gpu("mosaic_gpu", 1024)),
    ],
)
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("tokens", [1, 6])
def test_picked_records_give_what_whole_ones_give(tokens, plane, name, width):
    """Records lie in slots, scales by neuron; in any order."""
    rng = np.random.default_rng(0)
    records, scales, values = records_of(90, width, plane=plane)
    kind = "w16" if plane in DTYPES else plane
    ids = rng.permutation(90)[:41].astype(np.int32)
    slots = rng.permutation(50)[:41].astype(np.int32)
    pool = np.zeros((50, records.shape[1]), records.dtype)
    pool[slots] = records[ids]
    options = {
        "plane": kind,
        "implementation": name,
        "slots": slots,
        "ids": None if scales is None else ids,
    }
    x, h = normal(tokens, width, seed=2), normal(tokens, 41, seed=3)
    gate, up = swiglu_op.project(x, pool, scales, **options)
    wanted = x.astype(np.float64)
    assert_equal_but_for_rounding(gate, wanted @ values[ids, 0].T)
    assert_equal_but_for_rounding(up, wanted @ values[ids, 1].T)
    y = swiglu_op.accumulate(h, pool, scales, **options)
    assert_equal_but_for_rounding(y, h.astype(np.float64) @ values[ids, 2])


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("name", ["cpu_ffi", on_a_gpu("cuda_ffi")])
def test_compiled_kernels_at_every_group_size(name, tokens, group):
    width, neurons = 6 * group, 40
    codes, scales, _ = quantise_rows(normal(neurons, 3, width, seed=1), group=group)
    q4, _ = split_codes(codes)
    values = dequantise_base(q4, scales, group=group).astype(np.float64)
    records = q4.reshape(neurons, -1)
    x, h = normal(tokens, width, seed=2), normal(tokens, neurons, seed=3)
    form = {"plane": "q4", "implementation": form_for(name, tokens, plane="q4")}
    gate, _ = swiglu_op.project(x, records, scales, **form)
    assert_equal_but_for_rounding(gate, x.astype(np.float64) @ values[:, 0].T)
    y = swiglu_op.accumulate(h, records, scales, **form)
    assert_equal_but_for_rounding(y, h.astype(np.float64) @ values[:, 2])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", PROJECT_NAMES)
@pytest.mark.parametrize(
    ("tokens", "planes", "activation"),
    [
        *product([1, 3, 40, 70], [("q4",), ("q4", "r4"), ("bfloat16",)], ["silu"]),
        *product([1, 3, 40], [("q4", "r4")], OTHER_ACTIVATIONS),
    ],
    ids=str,
)
def test_the_whole_block_is_that_of_float64(tokens, planes, activation, name):
    width, neurons = 160, 603
    made = {plane: records_of(neurons, width, plane=plane) for plane in planes}
    records = {"w16" if p in DTYPES else p: made[p][0] for p in planes}
    gates, ups, downs = sum(values for _, _, values in made.values()).swapaxes(0, 1)
    x = normal(tokens, width, seed=2) / 8
    name = form_for(name, tokens, plane=planes[0])
    form = partial(swiglu_op.whole, activation=activation, implementation=name)
    scales = made[planes[0]][1]
    if scales is None:
        scales = np.ones((neurons, 3, 10), np.float16)
    y = jax.jit(form)(x, records, scales)
    gate, up = x.astype(np.float64) @ gates.T, x.astype(np.float64) @ ups.T
    act = {
        "silu": gate / (1 + np.exp(-gate)),
        "relu": np.maximum(gate, 0),
        "gelu": gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2,
    }
    rounding = rounding_of(name or "xla", tokens, plane=planes[0])
    assert_equal_but_for_rounding(y, (act[activation] * up) @ downs, rounding)


@pytest.mark.parametrize("tokens", [9, 40, 70])
@pytest.mark.parametrize("plane", PLANES)
def test_cpp_kernels_give_the_same_bits_for_a_token_among_others(plane, tokens):
    """What a token gives hangs on nothing beside it: not on how rows are shared out."""
    kind = "numbers" if plane in DTYPES else "codes"
    if not native.are_few(tokens, kind) and not native.has_blocks(kind):
        pytest.skip("XLA multiplies blocks here, and promises less")
    records, scales, _ = records_of(1500, 96, plane=plane)
    kind = "w16" if plane in DTYPES else plane
    x = normal(tokens, 96, seed=2)
    form = partial(swiglu_op.project, plane=kind, implementation="cpu_ffi")
    together, _ = form(x, records, scales)
    again, _ = form(x, records, scales)
    few, _ = form(
        x,
        records,
        scales,
        slots=np.arange(700, 720, dtype=np.int32),
        **({} if scales is None else {"ids": np.arange(700, 720, dtype=np.int32)}),
    )
    assert np.array_equal(together, again)
    assert np.array_equal(together[:, 700:720], few)


@pytest.mark.parametrize("tokens", [2, 40, 70])
def test_values_that_are_none_do_not_hide(tokens):
    records, scales, _ = records_of(20, 96, plane="q4")
    x = normal(tokens, 96, seed=2)
    x[1, 40] = np.nan
    form = {"plane": "q4", "implementation": form_for("cpu_ffi", tokens, plane="q4")}
    gate, _ = swiglu_op.project(x, records, scales, **form)
    assert np.isfinite(np.delete(gate, 1, axis=0)).all()
    assert np.isnan(gate[1]).all()
    h = np.zeros((tokens - 1, 20), np.float32)
    h[0, 3] = np.nan
    y = swiglu_op.accumulate(h, records, scales, **form)
    assert np.isnan(y[0]).all()
    assert (y[1:] == 0).all()


def test_every_implementation_has_cases():
    def named(cases: list) -> set[str]:
        found = {getattr(case, "values", case)[0] for case in cases}
        return found - {"cpu_ffi_few", "cpu_ffi_blocks"}

    names = named(CASES)
    assert names == linear_op.IMPLEMENTATIONS.keys()
    names |= named(SWIGLU_CASES)
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
