"""The C++ kernels: compiled once a machine, then called through XLA's FFI on a CPU.

`status()` says whether they are there and, if not, why. Nothing else depends on them:
every op has an XLA form.
"""

import jax
import numpy as np
from jax import Array

from m2jax.kernels.native.build import NativeStatus, is_compiled, status

# What a code of a plane counts in its group's scale.
STEPS = {"q4": np.float32(16), "r4": np.float32(1)}

# More tokens are a matrix product: that of blocks where it is compiled, else XLA's.
# Measured where both ways take the same time (numbers beside words: at 96 tokens); but
# for codes beside words, whose activations are coarser: a sweep that verifies drafts
# has at most 64 tokens, and is not theirs.
FEW_TOKENS = 32
FEW_BESIDE_BLOCKS = {
    "tiles": {"codes": 2, "numbers": 8},
    "words": {"codes": 64, "numbers": 64},
    "": {"codes": FEW_TOKENS, "numbers": FEW_TOKENS},
}

__all__ = [
    "STEPS",
    "NativeStatus",
    "are_few",
    "call",
    "has_blocks",
    "is_compiled",
    "status",
    "why_not",
]


def are_few(tokens: int, rows: str) -> bool:
    """Whether the kernels that widen every weight for a few tokens are the better.

    Args:
        rows: of "codes" or "numbers".
    """
    return tokens <= FEW_BESIDE_BLOCKS[status().blocks][rows]


def has_blocks(rows: str) -> bool:
    """Whether there are kernels for more tokens than a few; rows: as for `are_few`."""
    return status().blocks == "tiles" or (
        status().blocks == "words" and rows == "codes"
    )


def why_not(tokens: int, rows: str) -> str | None:
    """What the kernels take instead of so many tokens; None where they take them.

    Args:
        rows: as for `are_few`.
    """
    if are_few(tokens, rows) or has_blocks(rows):
        return None
    most = FEW_BESIDE_BLOCKS[status().blocks][rows]
    return f"takes up to {most} tokens by {rows} on this CPU, not {tokens}"


def call(name: str, shape: jax.ShapeDtypeStruct, *arrays: Array, **attributes) -> Array:
    """The kernel `name` on arrays, as part of a traced program.

    Raises:
        RuntimeError: the kernels are not there.
    """
    if not status().ready:
        raise RuntimeError(f"no C++ kernels: {status().about}")
    return jax.ffi.ffi_call(name, shape)(*arrays, **attributes)
