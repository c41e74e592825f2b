"""By XLA: ids by rank, levels by sorting."""

import jax.numpy as jnp
from jax import Array, lax


def best_xla(scores: Array, ends: tuple[int, ...]) -> Array:
    return lax.top_k(jnp.where(scores == 0, 0, scores), ends[-1])[1]


def levels_xla(scores: Array, ends: Array) -> Array:
    """XLA:CPU sorts integer keys faster than it ranks floats (4 ms against 8 for half
    of 256 x 704)."""
    raw = lax.bitcast_convert_type(scores, jnp.int32)
    # Order of the floats as order of integers; -0 is 0.
    keys = jnp.where(scores == 0, 0, raw ^ ((raw >> 31) & 0x7FFFFFFF))
    ordered = jnp.sort(keys, axis=1)
    neurons = scores.shape[1]

    def among(count: Array) -> Array:
        place = jnp.clip(neurons - count, 0, neurons - 1)
        least = lax.dynamic_slice_in_dim(ordered, place, 1, axis=1)
        above, level = keys > least, keys == least
        room = count - jnp.sum(above, axis=1, keepdims=True)
        return above | (level & (jnp.cumsum(level, axis=1) <= room))

    found = jnp.zeros(scores.shape, jnp.int32)
    for end in ends:
        found = found + among(end).astype(jnp.int32)
    return found
