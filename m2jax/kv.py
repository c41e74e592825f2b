"""Keys and values of past tokens, one pair of buffers a layer."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from m2jax.config import ModelConfig

BYTES_PER_VALUE = 4
MIN_CAPACITY = 128
BLOCK_SIZES = (16, 64, 256, 512)


class LayerKV(NamedTuple):
    """One layer's KV cache.

    keys, values: [G, C, d] float32; positions not yet written hold zeros or garbage and
    are masked. Per-layer buffers, because a stacked carry is copied whole each step.
    """

    keys: Array
    values: Array


def init_kv(config: ModelConfig, capacity: int) -> list[LayerKV]:
    shape = (config.num_kv_heads, capacity, config.head_dim)
    return [
        LayerKV(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
        for _ in range(config.num_layers)
    ]


def write(kv: LayerKV, keys: Array, values: Array, position: Array) -> LayerKV:
    """Puts [G, T, d] keys and values at `position` and after it.

    The caller keeps position + T <= C: a slice that leaves the buffer would be moved.
    """
    start = (0, position, 0)
    return LayerKV(
        lax.dynamic_update_slice(kv.keys, keys, start),
        lax.dynamic_update_slice(kv.values, values, start),
    )


def block_sizes(tokens: int) -> list[int]:
    """Lengths of the padded blocks of a prompt: few shapes, few compilations."""
    largest = BLOCK_SIZES[-1]
    sizes = [largest] * (tokens // largest)
    rest = tokens % largest
    if rest:
        sizes.append(next(size for size in BLOCK_SIZES if size >= rest))
    return sizes


def capacity_for(positions: int) -> int:
    """Buffer length for so many positions: a power of two, so that few are compiled."""
    capacity = MIN_CAPACITY
    while capacity < positions:
        capacity *= 2
    return capacity


def kv_bytes(config: ModelConfig, capacity: int) -> int:
    """Bytes of all layers' keys and values for `capacity` positions."""
    per_position = 2 * config.num_kv_heads * config.head_dim * BYTES_PER_VALUE
    return config.num_layers * capacity * per_position
