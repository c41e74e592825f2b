"""Attention in plain XLA: the oracle.

One token, or a few, meet the whole buffer at once. A block of a prompt goes tile by
tile and looks only at keys that some of its queries see: scores of the whole buffer
would take longer than all of a layer's products.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

QUERIES, KEYS = 128, 128
# Below this a tile of queries is too small to be worth a loop.
FEW_TOKENS = 63
# Finite, so that the difference of two is a number; masked weights are zeroed anyway.
UNSEEN = -1e30
# A GPU would round float32 to 10 bits of mantissa, a TPU to 7.
exact_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def attend_xla(
    q: Array, keys: Array, values: Array, positions: Array, window: Array
) -> Array:
    tokens, heads, head_dim = q.shape
    few = tokens <= FEW_TOKENS
    tile = tokens if few else QUERIES
    missing = -tokens % tile
    # Queries that fill up the last tile see what the last one sees.
    q = jnp.pad(q, [(0, missing), (0, 0), (0, 0)])
    positions = jnp.pad(positions, (0, missing), mode="edge")
    groups = keys.shape[0]
    # Keys on the left: XLA:CPU of jax 0.10 takes less than half the time, for one token
    # over 2048 positions 270 us and not 680. r: a group's heads, of every token.
    q = q.reshape(-1, tile, groups, heads // groups, head_dim).transpose(0, 2, 4, 1, 3)
    q = q.reshape(-1, groups, head_dim, tile * heads // groups) * head_dim**-0.5
    positions = positions.reshape(-1, tile)
    if few:
        mixed = _over_all(q[0], keys, values, positions[0], window)[None]
    else:
        mixed = lax.map(
            lambda some: _over_seen(some[0], keys, values, some[1], window),
            (q, positions),
        )
    mixed = mixed.reshape(-1, groups, tile, heads // groups, head_dim)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(-1, heads, head_dim)[:tokens]


def _visible(positions: Array, keys: Array, window: Array, *, heads: int) -> Array:
    """Whether each of `heads` heads of a query sees a key: [K, R]."""
    age = positions[None, :] - keys[:, None]
    return jnp.repeat((age >= 0) & (age < window), heads, axis=1)


def _over_all(
    q: Array, keys: Array, values: Array, positions: Array, window: Array
) -> Array:
    """q [G, d, R] over the whole buffer: [G, R, d]."""
    scores = exact_einsum("gcd,gdr->gcr", keys, q)
    heads = q.shape[2] // positions.shape[0]
    seen = _visible(positions, jnp.arange(keys.shape[1]), window, heads=heads)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=1)
    return exact_einsum("gcr,gcd->grd", weights, values)


def _over_seen(
    q: Array, keys: Array, values: Array, positions: Array, window: Array
) -> Array:
    """q [G, d, R] over the tiles of keys that hold what a query sees: [G, R, d].

    The softmax is made as the tiles come, its sums scaled to the largest score so far.
    """
    capacity = keys.shape[1]
    tile = min(KEYS, capacity)
    heads = q.shape[2] // positions.shape[0]
    first = jnp.maximum(positions[0] - window + 1, 0) // tile
    end = jnp.minimum(positions[-1], capacity - 1) // tile + 1

    def add(number: Array, sums: tuple[Array, Array, Array]):
        largest, total, mixed = sums
        # The last tile of a buffer that is no multiple overlaps the one before.
        start = jnp.minimum(number * tile, capacity - tile)
        some_keys = lax.dynamic_slice_in_dim(keys, start, tile, axis=1)
        some_values = lax.dynamic_slice_in_dim(values, start, tile, axis=1)
        at = start + jnp.arange(tile)
        seen = _visible(positions, at, window, heads=heads)
        seen = seen & (at >= number * tile)[:, None]
        scores = jnp.where(seen, exact_einsum("gcd,gdr->gcr", some_keys, q), UNSEEN)
        larger = jnp.maximum(largest, scores.max(axis=1))
        weights = jnp.where(seen, jnp.exp(scores - larger[:, None]), 0)
        shrunk = jnp.exp(largest - larger)
        total = total * shrunk + weights.sum(axis=1)
        mixed = mixed * shrunk[..., None]
        return larger, total, mixed + exact_einsum("gcr,gcd->grd", weights, some_values)

    groups, head_dim, rows = q.shape
    none = jnp.zeros((groups, rows), jnp.float32)
    zeros = jnp.zeros((groups, rows, head_dim), jnp.float32)
    _, total, mixed = lax.fori_loop(first, end, add, (none + UNSEEN, none, zeros))
    return mixed / total[..., None]
