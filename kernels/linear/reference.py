"""The product in plain XLA: the oracle, and a form that widens tile by tile."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from m2jax.kernels.linear.packed import Packed
from m2jax.kernels.nibbles import nibble_values
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


def exact_matmul(x: Array, y: Array) -> Array:
    """x @ y in float32: a GPU would round both to 10 bits of mantissa, a TPU to 7."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def times_rows(x: Array, rows: Array) -> Array:
    """x @ rows.T with the rows on the left, where XLA:CPU needs no transposed copy.

    Args:
        x: [T, I] float32. rows: [O, I] float32.

    Returns:
        [T, O] float32.
    """
    if x.shape[0] == 1:
        return exact_matmul(rows, x[0])[None]
    return exact_matmul(rows, x.T).T


def unpack(w: Packed) -> Array:
    """A packed matrix, or rows of one, as float32 [O, W]."""
    halves = [
        jnp.concatenate(nibble_values(codes, w.scales, plane=plane), axis=-1)
        for plane, codes in w.planes.items()
    ]
    return sum(halves[1:], start=halves[0])


def padded_to(x: Array, w: Packed) -> Array:
    """[T, I] -> [T, W]: zeros meet the zero padding of the rows."""
    return jnp.pad(x, [(0, 0), (0, 2 * w.q4.shape[1] - x.shape[1])])


def linear_xla(x: Array, w: Array | Packed) -> Array:
    if isinstance(w, Packed):
        return times_rows(padded_to(x, w), unpack(w))
    return times_rows(x, widen(w))


def linear_blocked(x: Array, w: Array | Packed) -> Array:
    if isinstance(w, Packed):
        rows, width = w.q4.shape[0], 2 * w.q4.shape[1]
    else:
        rows, width = w.shape
    tile = tile_rows(rows, width, tokens=x.shape[0])
    if tile == rows:
        return linear_xla(x, w)
    whole = rows // tile * tile

    def tiled(array: Array) -> Array:
        return array[:whole].reshape(-1, tile, array.shape[1])

    y = lax.map(lambda block: linear_xla(x, block), jax.tree.map(tiled, w))
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], whole)
    if whole == rows:
        return y
    rest = jax.tree.map(lambda array: array[whole:], w)
    return jnp.concatenate([y, linear_xla(x, rest)], axis=1)
