"""The kernel for TPUs where there is none: interpreted, and compiled for one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from m2jax.kernels import sparse_swiglu
from m2jax.kernels.sparse_swiglu import pallas_tpu
from m2jax.quant import dequantise_base, quantise_rows, split_codes
from tests.kernel_cases import (
    DTYPES,
    assert_equal_but_for_rounding,
    normal,
    records_of,
)

GROUP = 64


def products(
    *, tokens: int, width: int, plane: str, wanted: int | None, sharding=None
) -> list[tuple]:
    """Both products of 1000 records as a function and the shapes of its arguments."""
    shape = partial(jax.ShapeDtypeStruct, sharding=sharding)
    ids = None if wanted is None else shape((wanted,), jnp.int32)
    if plane in DTYPES:
        kept = jnp.uint16 if plane == "bfloat16" else DTYPES[plane]
        kind, records, scales = "w16", shape((1000, 3 * width), kept), None
    else:
        kind, records = plane, shape((1000, 3 * width // 2), jnp.uint8)
        scales = shape((1000, 3, width // GROUP), jnp.float16)

    def called(op, x, records, scales, slots, ids):
        options = {"plane": kind, "implementation": "pallas_tpu"}
        return op(x, records, scales, slots=slots, ids=ids, **options)

    rest = (records, scales, ids, None if scales is None else ids)
    x, h = ((tokens, size) for size in (width, wanted or 1000))
    return [
        (partial(called, sparse_swiglu.project), shape(x, jnp.float32), *rest),
        (partial(called, sparse_swiglu.accumulate), shape(h, jnp.float32), *rest),
    ]


@pytest.mark.parametrize("plane", ["q4", *DTYPES])
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (8, 256)])
@pytest.mark.parametrize("wanted", [None, 300])
def test_for_a_tpu_it_is_lowered_to_a_kernel(wanted, tokens, width, plane):
    found = products(tokens=tokens, width=width, plane=plane, wanted=wanted)
    for op, *arrays in found:
        made = jax.export.export(jax.jit(op), platforms=["tpu"])(*arrays)
        assert made.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 1


@pytest.mark.parametrize("plane", ["q4", "bfloat16", "float16"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (64, 8192), (8, 256)])
@pytest.mark.parametrize("wanted", [None, 300])
def test_for_a_tpu_it_compiles(wanted, tokens, width, plane, monkeypatch):
    """By a TPU's own compiler, which finds more than lowering does and needs no TPU:
    pip install the libtpu that this jax[tpu] names."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    one = jax.sharding.SingleDeviceSharding(chips.devices[0])
    shapes = {"tokens": tokens, "width": width, "wanted": wanted}
    for op, *arrays in products(plane=plane, sharding=one, **shapes):
        assert "tpu_custom_call" in jax.jit(op).lower(*arrays).compile().as_text()


@pytest.mark.parametrize(
    ("tokens", "width", "told"),
    [
        (pallas_tpu.MOST_TOKENS + 1, 256, "takes up to 64 tokens, not 65;"),
        (1, 2 * pallas_tpu.MOST_WIDTH, "takes W up to 8192, not 16384;"),
        (1, 192, "takes W that is a multiple of 256, not 192;"),
    ],
)
def test_who_asks_for_it_at_other_shapes_is_refused(tokens, width, told):
    for op, *arrays in products(tokens=tokens, width=width, plane="q4", wanted=None):
        with pytest.raises(NotImplementedError, match=told):
            jax.eval_shape(op, *arrays)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_scales_meet_their_groups(group):
    codes, scales, _ = quantise_rows(normal(40, 3, 256, seed=1), group=group)
    q4, _ = split_codes(codes)
    x = normal(2, 256, seed=2)
    options = {"plane": "q4", "implementation": "pallas_tpu"}
    found = sparse_swiglu.project(x, q4.reshape(40, -1), scales, **options)
    values = dequantise_base(q4, scales, group=group).astype(np.float64)
    for row, part in enumerate(found):
        assert_equal_but_for_rounding(part, x.astype(np.float64) @ values[:, row].T)


@pytest.mark.parametrize("planes", [("q4", "r4"), ("float16",), ("float32",)], ids=str)
def test_the_whole_block_is_that_of_float64(planes):
    made = {plane: records_of(40, 256, plane=plane) for plane in planes}
    records = {"w16" if p in DTYPES else p: made[p][0] for p in planes}
    gates, ups, downs = sum(values for _, _, values in made.values()).swapaxes(0, 1)
    x = normal(3, 256, seed=2) / 8
    scales = made[planes[0]][1]
    options = {"activation": "relu", "implementation": "pallas_tpu"}
    y = sparse_swiglu.whole(x, records, scales, **options)
    exact = x.astype(np.float64)
    h = np.maximum(exact @ gates.T, 0) * (exact @ ups.T)
    assert_equal_but_for_rounding(y, h @ downs)


def test_every_float16_is_widened_to_its_value():
    bits = np.arange(1 << 16)
    found = pallas_tpu._numbers(jnp.asarray(bits, jnp.int32), "float16")
    wanted = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(wanted))
