"""The C++ kernels: compiled once a machine, then called through XLA's FFI on a CPU.

`library()` says whether they are there and, if not, why. Nothing else depends on them:
every op has an XLA form.
"""

import jax
import numpy as np
from jax import Array

from m2jax.kernels.native.build import NativeLibrary, is_compiled, library

# What a code of a plane counts in its group's scale.
STEPS = {"q4": np.float32(16), "r4": np.float32(1)}

__all__ = ["STEPS", "NativeLibrary", "call", "is_compiled", "library"]


def call(name: str, shape: jax.ShapeDtypeStruct, *arrays: Array, **attributes) -> Array:
    """The kernel `name` on arrays, as part of a traced program.

    Raises:
        RuntimeError: the kernels are not there.
    """
    if not library().ready:
        raise RuntimeError(f"no C++ kernels: {library().about}")
    return jax.ffi.ffi_call(name, shape)(*arrays, **attributes)
