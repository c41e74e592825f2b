"""The product in plain XLA: the oracle, and a form that widens tile by tile."""

import jax.numpy as jnp
from jax import Array, lax

from m2jax.kernels.tiles import tile_rows


def widen(w: Array) -> Array:
    """Stored weights as float32: float16 and float32 by value, uint16 as bfloat16 bits.

    bfloat16 is held as bits because XLA:CPU of jax 0.10 widens a whole bfloat16 array
    before it slices or gathers from it.
    """
    if w.dtype == jnp.uint16:
        bits = w.astype(jnp.uint32) << 16
        return lax.bitcast_convert_type(bits, jnp.float32)
    return w.astype(jnp.float32)


def linear_xla(x: Array, w: Array) -> Array:
    return jnp.einsum("ti,oi->to", x, widen(w))


def linear_blocked(x: Array, w: Array) -> Array:
    rows, width = w.shape
    tile = tile_rows(rows, width)
    if tile == rows:
        return linear_xla(x, w)
    whole = rows // tile * tile
    tiles = w[:whole].reshape(-1, tile, width)
    y = lax.map(lambda block: linear_xla(x, block), tiles)
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], whole)
    if whole == rows:
        return y
    return jnp.concatenate([y, linear_xla(x, w[whole:])], axis=1)
