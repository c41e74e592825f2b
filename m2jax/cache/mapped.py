"""Host memory that the device reads by itself: registered with its driver.

A copy from other memory goes through a buffer of the driver's first. Where nothing can
be registered (a CPU; a limit on locked memory) plain memory serves.
"""

from bisect import bisect_right, insort

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.aligned import aligned_buffer
from m2jax.kernels import cuda

# What the device fetches at once.
FETCHED_BYTES = 16


class MappedMemory:
    """Buffers, registered while this lives; `close` before they are let go.

    Registered memory is not swapped, and `dma_map` is JAX's own, semi-public: tested
    by trying.
    """

    def __init__(self) -> None:
        device = jax.local_devices()[0]
        self._client = device.client
        self._registers = device.platform != "cpu"
        self._mapped: dict[int, np.ndarray] = {}
        self._starts: list[int] = []
        self._addresses: dict[int, Array] = {}

    def buffer(self, shape: tuple[int, int]) -> np.ndarray:
        """Uninitialised uint8 [N, R] that starts on a disk block."""
        rows = aligned_buffer(shape)
        if self._registers and rows.nbytes:
            try:
                self._client.dma_map(rows.ctypes.data, rows.nbytes)
            except (AttributeError, RuntimeError):
                self._registers = False
            else:
                self._mapped[rows.ctypes.data] = rows
                insort(self._starts, rows.ctypes.data)
        return rows

    def address(self, rows: np.ndarray) -> Array | None:
        """Of a buffer or a run of rows in one, for `cuda.rows_from_host`; None where
        the device cannot read them."""
        if not self._starts:
            return None
        start = rows.ctypes.data
        if start % FETCHED_BYTES or rows.strides[0] % FETCHED_BYTES:
            return None
        if not self._is_mapped(start, rows.nbytes) or not cuda.status().ready:
            return None
        if start not in self._addresses:
            words = np.array([start & 0xFFFFFFFF, start >> 32], np.uint32)
            self._addresses[start] = jnp.array(words)
        return self._addresses[start]

    def _is_mapped(self, start: int, nbytes: int) -> bool:
        # The last buffer that does not begin behind it.
        place = bisect_right(self._starts, start) - 1
        if place < 0:
            return False
        first = self._starts[place]
        return start + nbytes <= first + self._mapped[first].nbytes

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._mapped.values())

    def close(self) -> None:
        """Once nothing is copied any more."""
        for address in self._mapped:
            self._client.dma_unmap(address)
        self._mapped.clear()
        self._starts.clear()
        self._addresses.clear()
