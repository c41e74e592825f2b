"""Causal attention of new tokens over a layer's keys and values, in float32.

    softmax(q k / sqrt(d)) v    over the positions that a query sees

`attend(.., implementation=)`: "xla" and "xla_blocked" are one form, the oracle; a few
tokens meet the whole buffer there. "cpu_ffi" is a C++ kernel, of a few tokens, that
reads only keys that one of them sees. None: see `kernels.choice`.
"""

from jax import Array

from m2jax.kernels.attention.native import attend_native, why_not
from m2jax.kernels.attention.reference import attend_xla
from m2jax.kernels.choice import chosen

IMPLEMENTATIONS = {
    "xla": attend_xla,
    "xla_blocked": attend_xla,
    "cpu_ffi": attend_native,
}
WHY_NOT = {"cpu_ffi": why_not}

__all__ = ["IMPLEMENTATIONS", "attend"]


def attend(
    q: Array,
    keys: Array,
    values: Array,
    positions: Array,
    window: Array,
    *,
    implementation: str | None = None,
) -> Array:
    """What each query's head takes from the values of the positions it sees.

    Args:
        q: [T, H, d] float32, rotated.
        keys, values: [G, C, d] float32, those of the queries themselves included. What
            lies behind the last query's position is not looked at.
        positions: int32 [T], consecutive.
        window: int32 scalar, positions a query sees, itself included.

    Returns:
        [T, H, d] float32.

    Raises:
        ValueError, NotImplementedError: no such one; it does not take the shape.
    """
    name = chosen("attention", IMPLEMENTATIONS, implementation, WHY_NOT, q)
    return IMPLEMENTATIONS[name](q, keys, values, positions, window)
