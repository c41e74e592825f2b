"""The HBM tier: slot pools, and what writes them (within one program: `fetched`).

A pool is one layer's [S, R] records at one plane. Knows arrays and slots; who wants
what is `residency`'s business.
"""

from collections.abc import Mapping
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.aligned import aligned_buffer
from m2jax.kernels import cuda

# JAX uses arrays that start on so many bytes where they lie.
JAX_BYTES = 64

STORED_DTYPES = {
    "float16": np.dtype(np.float16),
    # Bits: XLA:CPU of jax 0.10 widens whole bfloat16 arrays before it gathers.
    "bfloat16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
}


def record_view(rows: np.ndarray, *, plane: str, original_dtype: str) -> np.ndarray:
    """uint8 [N, R] bytes as the numbers a pool holds; no copy."""
    if plane != "w16":
        return rows
    return rows.view(STORED_DTYPES[original_dtype])


def init_pool(slots: int, row: np.ndarray) -> Array:
    """An empty pool for records like `row` [R]."""
    return jnp.zeros((slots, row.shape[0]), row.dtype)


@partial(jax.jit, donate_argnums=0)
def fill(pool: Array, slots: Array, rows: Array) -> Array:
    """Writes neuron records into slots of a donated pool.

        pool[slots[m]] = rows[m];  a slot equal to S is padding and is dropped

    Args:
        pool: [S, R]; donated, do not use it again.
        slots: int32 [M], distinct but for padding.
        rows: [M, R]; this many bytes cross the link.

    Returns:
        The pool, in the same buffer.

    Source: M2Cache, arXiv:2410.14740, section 5.3.
    """
    return pool.at[slots].set(rows, mode="drop")


@partial(jax.jit, donate_argnums=0, static_argnames="rows")
def fill_from_host(
    pool: Array, load: Array, address: Array, *, rows: int
) -> tuple[Array, Array]:
    """`fill` with rows that the device fetches itself: see `cuda.rows_from_host`.

    Args:
        load: int32 [3, M]: slots of all that are wanted; slots to fill, S for padding;
            ids of the rows for them, -1 for padding.
        address: of `rows` records like the pool's.

    Returns:
        The pool, in the same buffer, and load[0].
    """
    slots, places, ids = load
    return cuda.fill_from_host(pool, address, ids, places, rows=rows), slots


@cache
def in_order(count: int) -> Array:
    """int32 [count]: the slots of records that lie in the order of their ids."""
    return jnp.arange(count, dtype=jnp.int32)


@partial(jax.jit, static_argnames=("like", "rows"))
def from_host(
    address: Array, ids: Array, *, like: jax.ShapeDtypeStruct, rows: int
) -> Array:
    """The records `ids` of `rows` at an address, each like `like` [R]: [K, R]."""
    return cuda.rows_from_host(address, ids, like, rows=rows)


def to_device(rows: np.ndarray) -> Array:
    """A copy on the device; wait for it before the rows are overwritten. On a CPU
    `device_put` would alias an aligned buffer."""
    if jax.default_backend() == "cpu":
        return jnp.array(rows, copy=True)
    return jax.device_put(rows)


def to_device_together(arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Copies on the device, for good. On a CPU in one buffer: NumPy asks for huge pages
    where an array of its own would be too small for one, and every token reads all."""
    if jax.default_backend() != "cpu":
        return {name: jax.device_put(array) for name, array in arrays.items()}
    starts = np.cumsum([0] + [-(-a.nbytes // JAX_BYTES) for a in arrays.values()])
    buffer = aligned_buffer((1, int(starts[-1]) * JAX_BYTES))[0]
    placed = {}
    for start, (name, array) in zip(starts * JAX_BYTES, arrays.items(), strict=False):
        own = buffer[start : start + array.nbytes].view(array.dtype)
        own = own.reshape(array.shape)
        own[...] = array
        placed[name] = as_it_lies(own)
    return placed


def as_it_lies(rows: np.ndarray) -> Array:
    """Rows on the device; on a CPU where they lie, if they are aligned: then they must
    not be overwritten while the array is used."""
    return jax.device_put(rows)
