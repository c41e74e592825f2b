"""The product by the CUDA kernels (`kernels/cuda`)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.kernels import cuda
from m2jax.kernels.cuda import call, on_tensor_cores
from m2jax.kernels.linear.packed import Packed
from m2jax.kernels.linear.reference import padded_to
from m2jax.kernels.native import STEPS


def why_not(x: Array, w: Array | Packed) -> str | None:
    packed = isinstance(w, Packed)
    rows = w.q4 if packed else w
    scales = w.scales if packed else None
    return cuda.why_not(x.shape[0], _width(w), rows, scales, matrices=1)


def _width(w: Array | Packed) -> int:
    return 2 * w.q4.shape[1] if isinstance(w, Packed) else w.shape[1]


def linear_cuda(x: Array, w: Array | Packed) -> Array:
    packed = isinstance(w, Packed)
    rows, tokens, width = (w.q4 if packed else w), x.shape[0], _width(w)
    shape = jax.ShapeDtypeStruct((1, tokens, rows.shape[0]), jnp.float32)
    if 0 in (*x.shape, *shape.shape):
        return jnp.zeros(shape.shape[1:], jnp.float32)
    scales = w.scales[:, None, :] if packed else None
    tensor = on_tensor_cores(rows, scales, matrices=1, width=width)
    product = partial(
        call, "m2jax_cuda_project", shape, slots=None, ids=None, tensor=np.bool_(tensor)
    )
    if not packed:
        return product(x=x, rows=w, scales=None, step=np.float32(1))[0]
    x = padded_to(x, w)
    parts = [
        product(x=x, rows=codes, scales=scales, step=STEPS[plane])[0]
        for plane, codes in w.planes.items()
    ]
    return sum(parts[1:], start=parts[0])
