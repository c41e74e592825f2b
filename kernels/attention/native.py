"""By the C++ kernel (`kernels/native`)."""

import jax
import jax.numpy as jnp
from jax import Array

from m2jax.kernels.attention.reference import FEW_TOKENS
from m2jax.kernels.native import call


def why_not(q: Array) -> str | None:
    if q.shape[0] <= FEW_TOKENS:
        return None
    return f"takes up to {FEW_TOKENS} tokens, not {q.shape[0]}"


def attend_native(
    q: Array, keys: Array, values: Array, positions: Array, window: Array
) -> Array:
    tokens, heads, head_dim = q.shape
    groups = keys.shape[0]
    rows = tokens * heads // groups
    q = q.reshape(tokens, groups, -1, head_dim).swapaxes(0, 1) * head_dim**-0.5
    mixed = call(
        "m2jax_attend",
        jax.ShapeDtypeStruct((groups, rows, head_dim), jnp.float32),
        q.reshape(groups, rows, head_dim),
        keys,
        values,
        positions,
        window.reshape(1),
    )
    mixed = mixed.reshape(groups, tokens, -1, head_dim).swapaxes(0, 1)
    return mixed.reshape(tokens, heads, head_dim)
