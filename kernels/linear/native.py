"""The product by the C++ kernels, for one token or a few (`kernels/native`)."""

import jax
import jax.numpy as jnp
from jax import Array

from m2jax.kernels.linear.packed import Packed
from m2jax.kernels.linear.reference import linear_blocked, padded_to
from m2jax.kernels.native import MOST_TOKENS, STEPS, call


def linear_native(x: Array, w: Array | Packed) -> Array:
    rows = w.q4 if isinstance(w, Packed) else w
    if x.shape[0] > MOST_TOKENS or 0 in (*x.shape, *rows.shape):
        return linear_blocked(x, w)
    shape = jax.ShapeDtypeStruct((1, x.shape[0], rows.shape[0]), jnp.float32)
    all_rows = jnp.zeros(0, jnp.int32)
    if not isinstance(w, Packed):
        return call("m2jax_project_numbers", shape, x, w, all_rows)[0]
    x, scales = padded_to(x, w), w.scales[:, None, :]
    parts = [
        call(
            "m2jax_project_nibbles",
            shape,
            *(x, codes, scales, all_rows, all_rows),
            step=STEPS[plane],
        )[0]
        for plane, codes in w.planes.items()
    ]
    return sum(parts[1:], start=parts[0])
