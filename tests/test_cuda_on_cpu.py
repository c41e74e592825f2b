"""The CUDA kernels without a GPU: the same sources, compiled as C++ for the CPU."""

import ctypes
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.aligned import aligned_buffer
from m2jax.kernels import cuda, linear, sparse_swiglu
from m2jax.kernels.sparse_swiglu import cuda as swiglu_cuda
from m2jax.quant import quantise_rows, split_codes
from tests.cuda_on_cpu import build
from tests.kernel_cases import (
    CUDA,
    DTYPES,
    ON_GPU,
    PLANES,
    TENSOR,
    assert_bits_hang_on_nothing_beside,
    assert_equal_but_for_rounding,
    normal,
    records_of,
    stored,
)

COMPILER = build.compiler()
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here"),
    pytest.mark.skipif(ON_GPU, reason="the kernels themselves run here"),
]
# Of no rows no kernel is called.
SERVED = [case for case in CUDA if case[1]]
FORM = {"implementation": "cuda_ffi"}


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    assert COMPILER is not None
    loaded = build.load(COMPILER)
    loaded.emulated_products.restype = ctypes.c_int64
    build.register(loaded)
    return loaded


@pytest.fixture(params=[False, True], ids=["lanes", "tensor"])
def tensor(request) -> bool:
    """Whether the device has tensor cores."""
    return request.param


@pytest.fixture(autouse=True)
def kernels(library, tensor, monkeypatch):
    """The kernels are there; whoever asks for them gets them, not the reference."""
    ready = cuda.CudaStatus(True, "on this CPU", tensor)
    monkeypatch.setattr(cuda, "status", lambda: ready)
    before = library.emulated_calls()
    yield library
    assert library.emulated_calls() > before


def plane_of(plane: str) -> str:
    return "w16" if plane in DTYPES else plane


@pytest.mark.parametrize("plane", ["q4", "bfloat16"])
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_both_products_are_those_of_the_values(case, plane):
    tokens, neurons, width = case
    records, scales, values = records_of(neurons, width, plane=plane)
    form = {"plane": plane_of(plane), **FORM}
    x, h = normal(tokens, width, seed=2), normal(tokens, neurons, seed=3)
    gate, up = sparse_swiglu.project(x, records, scales, **form)
    assert_equal_but_for_rounding(gate, x.astype(np.float64) @ values[:, 0].T)
    assert_equal_but_for_rounding(up, x.astype(np.float64) @ values[:, 1].T)
    y = sparse_swiglu.accumulate(h, records, scales, **form)
    assert_equal_but_for_rounding(y, h.astype(np.float64) @ values[:, 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [SERVED[0], *SERVED[-12:]], ids=str)
def test_linear_is_the_product_with_the_transposed_matrix(case, dtype):
    tokens, rows, width = case
    bits, values = stored(normal(rows, width, seed=0), dtype)
    x = normal(tokens, width, seed=2)
    y = linear.linear(x, bits, **FORM)
    assert_equal_but_for_rounding(y, x.astype(np.float64) @ values.T)


def planes_of(rows: np.ndarray, group: int) -> tuple[np.ndarray, ...]:
    """q4, r4 and scales of rows [..., W]."""
    codes, scales, _ = quantise_rows(rows, group=group)
    return *split_codes(codes), scales


def both_products(x, h, *arrays, **form) -> tuple[np.ndarray, ...]:
    gate, up = sparse_swiglu.project(x, *arrays, **form)
    return gate, up, sparse_swiglu.accumulate(h, *arrays, **form)


def assert_as_the_oracle(*arrays, **form) -> None:
    found = both_products(*arrays, **form, **FORM)
    wanted = both_products(*arrays, **form, implementation="xla")
    for ours, theirs in zip(found, wanted, strict=True):
        assert_equal_but_for_rounding(ours, np.asarray(theirs))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "group"), [(160, 16), (640, 64)])
def test_linear_of_a_packed_matrix_takes_fewer_inputs_than_a_row_has(
    width, group, bits
):
    q4, r4, scales = planes_of(normal(37, width, seed=0), group)
    packed = linear.Packed(q4, r4 if bits == 8 else None, scales)
    x = normal(3, width - 3, seed=2)
    wanted = linear.linear(x, packed, implementation="xla")
    assert_equal_but_for_rounding(linear.linear(x, packed, **FORM), np.asarray(wanted))


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("width", [96, 384])
@pytest.mark.parametrize("plane", [*PLANES, "float16"])
def test_picked_records_are_taken_where_they_lie(plane, width, tokens):
    """Records lie in slots, scales by neuron; in any order."""
    rng = np.random.default_rng(0)
    records, scales, _ = records_of(90, width, plane=plane)
    ids = rng.permutation(90)[:41].astype(np.int32)
    slots = rng.permutation(50)[:41].astype(np.int32)
    pool = np.zeros((50, records.shape[1]), records.dtype)
    pool[slots] = records[ids]
    picked = {"slots": slots, "ids": None if scales is None else ids}
    arrays = normal(tokens, width, seed=2), normal(tokens, 41, seed=3), pool, scales
    assert_as_the_oracle(*arrays, plane=plane_of(plane), **picked)


@pytest.mark.parametrize("width", [96, 128])
def test_slots_and_ids_that_are_none_are_kept_inside(width):
    records, scales, _ = records_of(20, width, plane="q4")
    ids = np.array([3, -1, 20, 1 << 30], np.int32)
    arrays = normal(2, width, seed=2), normal(2, 4, seed=3), records, scales
    form = {"plane": "q4", **FORM}
    found = both_products(*arrays, slots=ids, ids=ids[::-1], **form)
    inside = ids.clip(0, 19)
    wanted = both_products(*arrays, slots=inside, ids=inside[::-1], **form)
    assert all(map(np.array_equal, found, wanted))


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_group_size(tokens, group):
    width = 6 * group
    q4, r4, scales = planes_of(normal(20, 3, width, seed=1), group)
    x, h = normal(tokens, width, seed=2), normal(tokens, 20, seed=3)
    assert_as_the_oracle(x, h, q4.reshape(20, -1), scales, plane="q4")
    assert_as_the_oracle(x, h, r4.reshape(20, -1), scales, plane="r4")


@pytest.mark.parametrize("plane", ["float16", "bfloat16"])
@pytest.mark.parametrize("width", [40, 1096])
def test_rows_of_numbers_may_end_within_a_block_of_columns(width, plane):
    records, _, _ = records_of(20, width, plane=plane)
    x, h = normal(3, width, seed=2), normal(3, 20, seed=3)
    assert_as_the_oracle(x, h, records, None, plane="w16")


@pytest.fixture
def smallest_card(kernels):
    kernels.emulated_most_shared(96 << 10)
    yield
    kernels.emulated_most_shared(227 << 10)


@pytest.mark.usefixtures("smallest_card")
@pytest.mark.parametrize("width", [16 * cuda.MOST_GROUPS, cuda.MOST_WIDTH])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_served_fits_the_smallest_card(tokens, width):
    """Groups are so small that there are the most, or rows so long."""
    group = width // cuda.MOST_GROUPS if width < cuda.MOST_WIDTH else 128
    q4, _, scales = planes_of(normal(6, 3, width, seed=1), group)
    x, h = normal(tokens, width, seed=2), normal(tokens, 6, seed=3)
    assert_as_the_oracle(x, h, q4.reshape(6, -1), scales, plane="q4")


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("width", [96, 128])
def test_a_run_of_neurons_may_be_longer_than_a_tile(width, plane, monkeypatch):
    monkeypatch.setattr(swiglu_cuda, "MOST_RUNS", 2)
    monkeypatch.setattr(swiglu_cuda, "MOST_TENSOR_RUNS", 2)
    records, scales, _ = records_of(150, width, plane=plane)
    x, h = normal(3, width, seed=2), normal(3, 150, seed=3)
    assert_as_the_oracle(x, h, records, scales, plane=plane_of(plane))


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("width", [160, 640])
def test_a_result_hangs_neither_on_places_nor_on_tokens_beside(width, plane):
    assert_bits_hang_on_nothing_beside(150, width, plane=plane, **FORM)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("case", TENSOR, ids=str)
def test_tensor_cores_take_long_groups_of_whole_steps(case, plane, tensor, kernels):
    _, neurons, width = case
    arrays = records_of(neurons, width, plane=plane)[:2]
    assert cuda.on_tensor_cores(*arrays, matrices=3, width=width) == tensor
    before = kernels.emulated_products()
    x, h = normal(1, width, seed=2), normal(1, neurons, seed=3)
    jax.block_until_ready(both_products(x, h, *arrays, plane=plane_of(plane), **FORM))
    assert (kernels.emulated_products() > before) == tensor


@pytest.mark.parametrize("plane", ["q4", "float16", "float32"])
def test_rows_that_tensor_cores_do_not_take_are_refused(plane):
    """Too short a group, numbers of another kind; the caller must not ask for them."""
    records, scales, _ = records_of(20, 64, plane=plane)
    assert not cuda.on_tensor_cores(records, scales, matrices=3, width=64)
    shape = jax.ShapeDtypeStruct((2, 1, 20), jnp.float32)
    arrays = normal(1, 64, seed=2), records, scales, None, None
    asked = {"step": np.float32(1), "tensor": np.bool_(True)}
    with pytest.raises((ValueError, RuntimeError), match="tensor cores"):
        jax.block_until_ready(cuda.call("m2jax_cuda_project", shape, *arrays, **asked))


@pytest.fixture(params=[1, 130], ids="{}x16 bytes".format)
def host(request, kernels):
    """Rows of host memory [9, R], and their address as the kernels take it."""
    rng = np.random.default_rng(0)
    rows = aligned_buffer((9, 16 * request.param))
    rows[:] = rng.integers(256, size=rows.shape)
    kernels.emulated_host_memory(rows.ctypes.data, rows.nbytes)
    at = rows.ctypes.data
    yield rows, np.array([at & 0xFFFFFFFF, at >> 32], np.uint32)
    kernels.emulated_host_memory(0, 0)


def test_rows_of_host_memory_are_read_where_they_lie(host):
    rows, address = host
    ids = np.array([8, -1, 0, 5, 9, 5], np.int32)
    row = jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)
    found = cuda.rows_from_host(address, ids, row, rows=len(rows))
    real = (ids >= 0) & (ids < len(rows))
    assert np.array_equal(found[real], rows[ids[real]])


def test_a_pool_is_filled_from_host_memory_in_its_slots_alone(host):
    rows, address = host
    pool = np.random.default_rng(1).integers(
        256, size=(6, rows.shape[1]), dtype=np.uint8
    )
    ids = np.array([8, -1, 2, 9, 0, 4, 7], np.int32)
    slots = np.array([3, 1, 6, 2, 5, -1, 0], np.int32)
    wanted = pool.copy()
    wanted[[3, 5, 0]] = rows[[8, 0, 7]]
    fill = jax.jit(partial(cuda.fill_from_host, rows=len(rows)), donate_argnums=0)
    assert np.array_equal(fill(jnp.array(pool), address, ids, slots), wanted)
