"""By the C++ kernels (`kernels/native`)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.kernels.native import call


def best_native(scores: Array, ends: tuple[int, ...]) -> Array:
    shape = jax.ShapeDtypeStruct((scores.shape[0], ends[-1]), jnp.int32)
    if 0 in shape.shape:
        return jnp.zeros(shape.shape, shape.dtype)
    return call("m2jax_best", shape, scores, np.array(ends, np.int32))


def levels_native(scores: Array, ends: Array) -> Array:
    shape = jax.ShapeDtypeStruct(scores.shape, jnp.int32)
    if 0 in scores.shape:
        return jnp.zeros(shape.shape, shape.dtype)
    return call("m2jax_levels", shape, scores, ends)
