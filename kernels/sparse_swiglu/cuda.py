"""Both products by the CUDA kernels (`kernels/cuda`)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.kernels import cuda
from m2jax.kernels.cuda import call, on_tensor_cores
from m2jax.kernels.native import STEPS

# Neurons whose sum is made apart: so many times this; and such sums at most. On tensor
# cores, which take 16 neurons at once: fewer, since each sum is written and read.
RUN_STEP, MOST_RUNS = 8, 256
TENSOR_STEP, MOST_TENSOR_RUNS = 16, 64


def why_not(
    tokens: int, records: Array, scales: Array | None, *, down: bool
) -> str | None:
    if down and records.dtype == jnp.float32:
        return "takes down columns of 16 bits or of codes, not of float32"
    width = _width(records, scales)
    return cuda.why_not(tokens, width, records, scales, matrices=3)


def _width(records: Array, scales: Array | None) -> int:
    return records.shape[1] // 3 * (1 if scales is None else 2)


def project_cuda(
    x: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> tuple[Array, Array]:
    rows = records.shape[0] if slots is None else slots.shape[0]
    if 0 in (rows, *x.shape):
        return (jnp.zeros((x.shape[0], rows), jnp.float32),) * 2
    shape = jax.ShapeDtypeStruct((2, x.shape[0], rows), jnp.float32)
    tensor = on_tensor_cores(records, scales, matrices=3, width=x.shape[1])
    both = call(
        "m2jax_cuda_project",
        *(shape, x, records, scales, slots, ids),
        step=STEPS.get(plane, np.float32(1)),
        tensor=np.bool_(tensor),
    )
    return both[0], both[1]


def accumulate_cuda(
    h: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> Array:
    tokens, rows = h.shape
    width = _width(records, scales)
    if 0 in (tokens, rows, width):
        return jnp.zeros((tokens, width), jnp.float32)
    tensor = on_tensor_cores(records, scales, matrices=3, width=width)
    least, most = (TENSOR_STEP, MOST_TENSOR_RUNS) if tensor else (RUN_STEP, MOST_RUNS)
    run = least * -(-rows // (least * most))
    runs = -(-rows // run)
    shapes = [
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((runs, tokens, width), jnp.float32),
    ]
    y, _ = call(
        "m2jax_cuda_accumulate",
        *(shapes, h, records, scales, slots, ids),
        step=STEPS.get(plane, np.float32(1)),
        tensor=np.bool_(tensor),
    )
    return y
