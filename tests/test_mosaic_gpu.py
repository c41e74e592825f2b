"""The kernel for Hopper GPUs where there is none: interpreted, lowered and compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu

from m2jax.kernels import sparse_swiglu
from m2jax.quant import dequantise_base, quantise_rows, split_codes
from tests.kernel_cases import (
    DTYPES,
    PLANES,
    assert_equal_but_for_rounding,
    normal,
    records_of,
)

GROUP = 64
needs_mosaic = pytest.mark.skipif(
    not sparse_swiglu.has_mosaic(),
    reason="needs jax 0.11: before, Mosaic GPU is neither interpreted nor "
    "cross-lowered; after, transfers must be whole sectors",
)
# What XLA must know of a GPU to compile for it.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84978434048
}
"""


@contextmanager
def interpreted() -> Iterator[dict]:
    with plgpu.force_gpu_interpret_mode():
        yield {"implementation": "mosaic_gpu"}


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
        options = {"plane": kind, "implementation": "mosaic_gpu"}
        return op(x, records, scales, slots=slots, ids=ids, **options)

    rest = (records, scales, ids, None if scales is None else ids)
    x, h = ((tokens, size) for size in (width, wanted or 1000))
    return [
        (partial(called, sparse_swiglu.project), shape(x, jnp.float32), *rest),
        (partial(called, sparse_swiglu.accumulate), shape(h, jnp.float32), *rest),
    ]


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 12, 0, 1)])
def test_another_jax_is_told_apart(version, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    x, records = jnp.zeros((1, 256)), jnp.zeros((4, 768), jnp.uint16)
    options = {"plane": "w16", "implementation": "mosaic_gpu"}
    with pytest.raises(NotImplementedError, match=r"needs jax 0\.11, this is"):
        sparse_swiglu.project(x, records, None, **options)


@needs_mosaic
@pytest.mark.parametrize("plane", ["q4", *DTYPES])
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (5, 1024)])
@pytest.mark.parametrize("wanted", [None, 300])
def test_for_a_gpu_it_is_lowered_to_a_kernel(wanted, tokens, width, plane):
    found = products(tokens=tokens, width=width, plane=plane, wanted=wanted)
    for op, *arrays in found:
        made = jax.export.export(jax.jit(op), platforms=["cuda"])(*arrays)
        assert made.mlir_module().count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@needs_mosaic
@pytest.mark.parametrize("plane", ["q4", "bfloat16"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (16, 2048)])
def test_for_a_gpu_it_compiles_and_copies_no_record(tokens, width, plane):
    """By NVIDIA's own compiler, which needs no GPU: pip install --no-deps this jax's
    jax-cuda13-plugin and jax-cuda13-pjrt, nvidia-nvvm and nvidia-cuda-nvcc, and put
    ptxas, of the last, on the PATH."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    topology = {"topology": "1x1x1", "target_config": H100}
    chips = topologies.get_topology_desc("h100", platform="cuda", **topology)
    one = jax.sharding.SingleDeviceSharding(chips.devices[0])
    shapes = {"tokens": tokens, "width": width, "wanted": 300, "sharding": one}
    for op, *arrays in products(plane=plane, **shapes):
        made = jax.jit(op).lower(*arrays).compile()
        assert "mosaic_gpu_v2" in made.as_text()
        # Partial sums of down columns, for all tokens, are the most there is.
        sums = tokens * (512 * 4 * width + 4 * 16 * 1000)
        assert made.memory_analysis().temp_size_in_bytes < sums


@needs_mosaic
@pytest.mark.parametrize(
    ("tokens", "width", "plane", "told"),
    [
        (17, 1024, "q4", "takes up to 16 tokens, not 17;"),
        (1, 32768, "q4", "takes W up to 16384, not 32768;"),
        (1, 512, "q4", "takes W that is a multiple of 1024, not 512;"),
        (1, 384, "bfloat16", "takes W that is a multiple of 256, not 384;"),
    ],
)
def test_who_asks_for_it_at_other_shapes_is_refused(tokens, width, plane, told):
    for op, *arrays in products(tokens=tokens, width=width, plane=plane, wanted=None):
        with pytest.raises(NotImplementedError, match=told):
            jax.eval_shape(op, *arrays)


# Tokens, rows, width: no row; blocks and shares with a rest; one size of vectors each.
CASES = [(5, 0, 1024), (5, 33, 1024), (1, 19, 2048), (2, 3, 4096)]


@needs_mosaic
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_products_are_those_of_float64(case, plane):
    tokens, neurons, width = case
    records, scales, values = records_of(neurons, width, plane=plane)
    x, h = normal(tokens, width, seed=2), normal(tokens, neurons, seed=3)
    options = {"plane": "w16" if plane in DTYPES else plane}
    with interpreted() as form:
        rows = sparse_swiglu.project(x, records, scales, **options, **form)
        y = sparse_swiglu.accumulate(h, records, scales, **options, **form)
    for part, found in enumerate(rows):
        wanted = x.astype(np.float64) @ values[:, part].T
        assert_equal_but_for_rounding(found, wanted)
    assert_equal_but_for_rounding(y, h.astype(np.float64) @ values[:, 2])


@needs_mosaic
@pytest.mark.parametrize("group", [16, 32, 128])
def test_scales_meet_their_groups(group):
    codes, scales, _ = quantise_rows(normal(9, 3, 2048, seed=1), group=group)
    q4, _ = split_codes(codes)
    x, h = normal(2, 2048, seed=2), normal(2, 9, seed=3)
    records = q4.reshape(9, -1)
    with interpreted() as form:
        gate, up = sparse_swiglu.project(x, records, scales, plane="q4", **form)
        y = sparse_swiglu.accumulate(h, records, scales, plane="q4", **form)
    values = dequantise_base(q4, scales, group=group).astype(np.float64)
    for part, found in enumerate((gate, up)):
        wanted = x.astype(np.float64) @ values[:, part].T
        assert_equal_but_for_rounding(found, wanted)
    assert_equal_but_for_rounding(y, h.astype(np.float64) @ values[:, 2])


@needs_mosaic
@pytest.mark.parametrize("plane", [*PLANES, "float16", "float32"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_picked_records_give_the_same_bits_wherever_they_lie(tokens, plane):
    """Records lie in slots, scales by neuron; in any order."""
    width = 1024
    records, scales, values = records_of(30, width, plane=plane)
    kind = "w16" if plane in DTYPES else plane
    rng = np.random.default_rng(0)
    ids = rng.permutation(30)[:19].astype(np.int32)
    x, h = normal(tokens, width, seed=2), normal(tokens, 19, seed=3)
    by_ids = {"plane": kind, "ids": None if scales is None else ids}
    found = []
    with interpreted() as form:
        whole = sparse_swiglu.project(x, records, scales, plane=kind, **form)
        for _ in range(2):
            slots = rng.permutation(25)[:19].astype(np.int32)
            pool = np.zeros((25, records.shape[1]), records.dtype)
            pool[slots] = records[ids]
            options = {**by_ids, **form, "slots": slots}
            gate, up = sparse_swiglu.project(x, pool, scales, **options)
            y = sparse_swiglu.accumulate(h, pool, scales, **options)
            found.append((gate, up, y))
    for once, again in zip(*found):
        assert np.array_equal(once, again)
    gate, up, y = found[0]
    for once, again in zip(whole, (gate, up)):
        assert np.array_equal(once[:, ids], again)
    assert_equal_but_for_rounding(gate, x.astype(np.float64) @ values[ids, 0].T)
    assert_equal_but_for_rounding(y, h.astype(np.float64) @ values[ids, 2])


@needs_mosaic
def test_the_whole_block_is_that_of_float64():
    made = {plane: records_of(20, 1024, plane=plane) for plane in ("q4", "r4")}
    records = {plane: made[plane][0] for plane in made}
    gates, ups, downs = sum(values for _, _, values in made.values()).swapaxes(0, 1)
    x = normal(2, 1024, seed=2) / 8
    with interpreted() as form:
        y = sparse_swiglu.whole(x, records, made["q4"][1], activation="relu", **form)
    exact = x.astype(np.float64)
    h = np.maximum(exact @ gates.T, 0) * (exact @ ups.T)
    assert_equal_but_for_rounding(y, h @ downs)
