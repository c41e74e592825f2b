"""Memory that direct reads and JAX can use where it lies."""

import numpy as np

# A disk block, and more than the 64 bytes from which JAX sees an array in place.
ALIGN_BYTES = 4096


def aligned_buffer(shape: tuple[int, int]) -> np.ndarray:
    """Uninitialised uint8 [N, R] that starts on a disk block."""
    size = shape[0] * shape[1]
    raw = np.empty(size + ALIGN_BYTES, np.uint8)
    offset = -raw.ctypes.data % ALIGN_BYTES
    return raw[offset : offset + size].reshape(shape)
