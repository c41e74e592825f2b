"""What the tests of kernels share: weights as they are stored, their values, and how
near to them a product must come."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from m2jax.kernels import native, sparse_swiglu
from m2jax.quant import (
    dequantise_base,
    dequantise_int8,
    quantise_rows,
    row_shape,
    split_codes,
)

# float32 sums of up to 600 products of numbers near 1, relative to the largest sum;
# the worst here is 2e-6, and one wrong weight moves a sum by 1e-2 or more.
ROUNDING = 2e-5
# Words (`kernels/native/words.h`) round what meets codes to 16 bits. The largest of a
# group or run is 2 to 4 times a usual number here, which so is off by 3e-5 of itself,
# and a sum by as much of a usual sum. The worst here is 4e-5.
WORD_ROUNDING = 1e-4
DTYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
ON_GPU = jax.default_backend() == "gpu"
PLANES = ["q4", "r4", "bfloat16"]


def on_a_gpu(*case):
    """A case that only a GPU can run."""
    skip = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
    name = "-".join(map(str, case))
    return pytest.param(*case, marks=[pytest.mark.gpu, skip], id=name)


# Tokens, rows, width: no row, a prime number (a padded last tile), whole tiles.
WHOLE = [(5, 0, 64), (5, 97, 96), (1, 97, 512)]
BLOCKED = [*WHOLE, (1, 176, 64)]
# One token, whole fours and a rest; halves that end within a register. Then blocks of
# tokens: less than a tile and more; many steps of inputs, ending within a tile.
NATIVE = [*WHOLE, (1, 300, 288), (4, 33, 160), (7, 70, 256)]
NATIVE += [(17, 97, 96), (70, 150, 160), (40, 1100, 64), (33, 40, 2144)]
# Groups of 64 and of 128; tokens and rows that end within what is taken together.
NATIVE += [(50, 70, 640), (18, 40, 768), (1, 70, 640), (2, 150, 768), (3, 300, 640)]
# What the kernels for a few tokens are given without tile registers.
MOST_FEW = 64
CASES = [
    *(("xla", case) for case in WHOLE),
    *(("xla_blocked", case) for case in BLOCKED),
    *(("cpu_ffi", case) for case in NATIVE),
    *(("cpu_ffi_few", case) for case in NATIVE if 1 < case[0] <= MOST_FEW),
    *(("cpu_ffi_blocks", case) for case in NATIVE if case[0] > 1),
]
# Blocks of records with a rest.
TPU = [(5, 0, 256), (5, 97, 256), (1, 40, 512)]
# All tokens at once and in several goes; rows that end within a warp's stretch, and
# that are longer; more runs of neurons than one.
CUDA = [*WHOLE, (1, 300, 288), (2, 33, 1024), (3, 97, 96), (8, 3000, 160)]
CUDA += [(13, 70, 256), (64, 40, 96)]
CUDA += [(1, 40, 4128), (5, 33, 8256), (4, 20, 12288)]
# Rows that tensor cores take: all tokens at once and in several goes; rows that end
# within a tile; fewer bytes than a block's warps share, and more than they ask for at
# once; runs of neurons that end within a product, and that are longer than one.
TENSOR = [(1, 40, 128), (2, 33, 1024), (3, 97, 640), (4, 7, 256), (5, 33, 4096)]
TENSOR += [(8, 70, 384), (9, 50, 768), (16, 40, 128), (5, 19, 8320), (3, 2100, 128)]
CUDA += [case for case in TENSOR if case not in CUDA]
CASES += [on_a_gpu("cuda_ffi", case) for case in CUDA]
SWIGLU_CASES = [*CASES, *(("pallas_tpu", case) for case in TPU)]
# On a Hopper GPU; more in test_mosaic_gpu.
MOSAIC = [(1, 97, 1024), (5, 300, 1024), (16, 40, 2048)]
SWIGLU_CASES += [on_a_gpu("mosaic_gpu", case) for case in MOSAIC]


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def stored(w: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The array as the device holds it, and its values."""
    kept = w.astype(DTYPES[dtype])
    bits = kept.view(np.uint16) if dtype == "bfloat16" else kept
    return bits, kept.astype(np.float64)


def group_of(width: int) -> int:
    """16 to 128, as the width allows."""
    return row_shape(width, group_size=128).group


def records_of(
    neurons: int, width: int, *, plane: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Records [N, R], scales, and the values [N, 3, W] that they stand for."""
    rows = normal(max(neurons, 1), 3, width, seed=1)
    if plane in DTYPES:
        records, values = stored(rows, plane)
        scales = None
    else:
        group = group_of(width)
        codes, scales, _ = quantise_rows(rows, group=group)
        q4, records = split_codes(codes)
        values = dequantise_base(q4, scales, group=group).astype(np.float64)
        if plane == "q4":
            records = q4
        else:
            values = dequantise_int8(q4, records, scales, group=group) - values
        scales = scales[:neurons]
    return records.reshape(len(rows), -1)[:neurons], scales, values[:neurons]


def form_for(name: str, tokens: int, *, plane: str) -> str | None:
    """The implementation `name`; where this CPU's C++ kernels do not take so many
    tokens None, the default with what stands in for it."""
    rows = "numbers" if plane in DTYPES else "codes"
    taken = name != "cpu_ffi" or native.why_not(tokens, rows) is None
    return name if taken else None


def rounding_of(name: str, tokens: int, *, plane: str = "q4") -> float:
    """What the implementation `name` may be off by, relative to the largest sum."""
    is_words = native.status().blocks == "words" and plane not in DTYPES
    if name == "cpu_ffi" and is_words and not native.are_few(tokens, "codes"):
        return WORD_ROUNDING
    return ROUNDING


def assert_equal_but_for_rounding(
    given: jax.Array, wanted: np.ndarray, rounding: float = ROUNDING
) -> None:
    assert given.dtype == jnp.float32
    assert given.shape == wanted.shape
    largest = np.abs(wanted).max(initial=0)
    assert np.abs(given - wanted).max(initial=0) <= rounding * largest


def assert_bits_hang_on_nothing_beside(
    neurons: int, width: int, *, plane: str, implementation: str
) -> None:
    """Few tokens among others give what they give alone, wherever the records lie."""
    records, scales, _ = records_of(neurons, width, plane=plane)
    form = {
        "plane": "w16" if plane in DTYPES else plane,
        "implementation": implementation,
    }
    x, h = normal(9, width, seed=2), normal(9, neurons, seed=3)
    together, _ = sparse_swiglu.project(x, records, scales, **form)
    sums = sparse_swiglu.accumulate(h, records, scales, **form)
    slots = np.random.default_rng(0).permutation(neurons).astype(np.int32)
    pool = np.empty_like(records)
    pool[slots] = records
    for some in [*(slice(t, t + 1) for t in range(9)), slice(0, 2), slice(2, 6)]:
        alone, _ = sparse_swiglu.project(x[some], pool, scales, slots=slots, **form)
        assert np.array_equal(alone, together[some])
        y = sparse_swiglu.accumulate(h[some], pool, scales, slots=slots, **form)
        assert np.array_equal(y, sums[some])
