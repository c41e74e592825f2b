"""4-bit codes to numbers, in plain XLA. What the codes mean: see `sparse_swiglu`."""

import jax.numpy as jnp
from jax import Array


def nibble_values(packed: Array, scales: Array, *, plane: str) -> tuple[Array, Array]:
    """Both halves of nibble rows as float32.

    Args:
        packed: [..., W / 2] uint8.
        scales: [..., groups] float16.

    Returns:
        First and second half of each row, [..., W / 2] each.
    """
    if plane == "q4":
        first, second, zero = packed << 4, packed & 0xF0, 128
    else:
        first, second, zero = packed & 0x0F, packed >> 4, 8
    half_groups = scales.shape[-1] // 2
    scales = scales.astype(jnp.float32)

    def scaled(codes: Array, group_scales: Array) -> Array:
        values = codes.astype(jnp.float32) - zero
        group = codes.shape[-1] // group_scales.shape[-1]
        grouped = values.reshape(*group_scales.shape, group)
        return (grouped * group_scales[..., None]).reshape(codes.shape)

    return (
        scaled(first, scales[..., :half_groups]),
        scaled(second, scales[..., half_groups:]),
    )
