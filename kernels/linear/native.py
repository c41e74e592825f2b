"""The product by the C++ kernels (`kernels/native`)."""

import jax
import jax.numpy as jnp
from jax import Array

from m2jax.kernels import native
from m2jax.kernels.linear.packed import Packed
from m2jax.kernels.linear.reference import linear_blocked, padded_to
from m2jax.kernels.native import STEPS, are_few, call


def why_not(x: Array, w: Array | Packed) -> str | None:
    return native.why_not(x.shape[0], _kind(w))


def linear_native(x: Array, w: Array | Packed) -> Array:
    rows = w.q4 if isinstance(w, Packed) else w
    if 0 in (*x.shape, *rows.shape):
        return linear_blocked(x, w)
    shape = jax.ShapeDtypeStruct((1, x.shape[0], rows.shape[0]), jnp.float32)
    if not are_few(x.shape[0], _kind(w)):
        return _block(x, w, shape)
    all_rows, all_sums = jnp.zeros(0, jnp.int32), jnp.zeros((0, 0), bool)
    if not isinstance(w, Packed):
        return call("m2jax_project_numbers", shape, x, w, all_rows, all_sums)[0]
    x, scales = padded_to(x, w), w.scales[:, None, :]
    residual = jnp.zeros((0, 0), jnp.uint8) if w.r4 is None else w.r4
    arrays = (x, w.q4, residual, scales, all_rows, all_rows, all_sums)
    return call("m2jax_project_nibbles", shape, *arrays, step=STEPS["q4"])[0]


def _kind(w: Array | Packed) -> str:
    return "codes" if isinstance(w, Packed) else "numbers"


def _block(x: Array, w: Array | Packed, shape: jax.ShapeDtypeStruct) -> Array:
    if not isinstance(w, Packed):
        return call("m2jax_project_block_numbers", shape, x, w)[0]
    residual = jnp.zeros((0, 0), jnp.uint8) if w.r4 is None else w.r4
    arrays = (padded_to(x, w), w.q4, residual, w.scales[:, None, :])
    return call("m2jax_project_block", shape, *arrays, step=STEPS["q4"])[0]
