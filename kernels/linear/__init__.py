"""Matrix products with weights stored at 16, 8 or 4 bits, computed in float32.

    y[t, o] = sum_i x[t, i] w[o, i]

`linear(x, w, implementation=)`: "xla" is the oracle, one product over the widened
matrix; "xla_blocked" widens a tile of rows at a time, so that no float32 copy of the
matrix is ever made; "cpu_ffi" is a C++ kernel, "cuda_ffi" a CUDA kernel, each for the
shapes that it takes. None: see `kernels.choice`.
"""

from jax import Array

from m2jax.kernels.choice import chosen, default_implementation
from m2jax.kernels.linear import cuda, native
from m2jax.kernels.linear.cuda import linear_cuda
from m2jax.kernels.linear.native import linear_native
from m2jax.kernels.linear.packed import Packed
from m2jax.kernels.linear.reference import linear_blocked, linear_xla, unpack, widen

IMPLEMENTATIONS = {
    "xla": linear_xla,
    "xla_blocked": linear_blocked,
    "cpu_ffi": linear_native,
    "cuda_ffi": linear_cuda,
}
WHY_NOT = {"cpu_ffi": native.why_not, "cuda_ffi": cuda.why_not}

__all__ = [
    "IMPLEMENTATIONS",
    "Packed",
    "default_implementation",
    "linear",
    "unpack",
    "widen",
]


def linear(x: Array, w: Array | Packed, *, implementation: str | None = None) -> Array:
    """x @ w.T in float32.

    Args:
        x: [T, I] float32.
        w: [O, I] float32, float16, bfloat16 bits as uint16 (`widen`), or packed.
        implementation: one of IMPLEMENTATIONS; None chooses by backend and shape.

    Returns:
        [T, O] float32.

    Raises:
        ValueError, NotImplementedError: no such one; it does not take the shape.
    """
    name = chosen("linear", IMPLEMENTATIONS, implementation, WHY_NOT, x, w)
    return IMPLEMENTATIONS[name](x, w)
