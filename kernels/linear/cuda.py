"""The product by the CUDA kernels (`kernels/cuda`)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.kernels.cuda import call, on_tensor_cores, serves
from m2jax.kernels.linear.packed import Packed
from m2jax.kernels.linear.reference import linear_xla, padded_to
from m2jax.kernels.native import STEPS


def linear_cuda(x: Array, w: Array | Packed) -> Array:
    packed = isinstance(w, Packed)
    rows, tokens = (w.q4 if packed else w), x.shape[0]
    width = 2 * rows.shape[1] if packed else rows.shape[1]
    if not serves(tokens, width, rows, None, matrices=1):
        return linear_xla(x, w)
    shape = jax.ShapeDtypeStruct((1, tokens, rows.shape[0]), jnp.float32)
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
