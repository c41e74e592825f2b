"""A store whose reads take as long as those of a slower SSD."""

import threading
import time

import numpy as np

from m2jax.arguments import shown
from m2jax.store.arrays import ChunkStore
from m2jax.units import parse_bytes

# Slower than any disk: loading would seem to hang.
LEAST_RATE = 10**6


def emulated_rate(asked: str | int | None) -> int | None:
    """Bytes a second of --emulate-ssd, LEAST_RATE or more; None stays None."""
    rate = parse_bytes(asked, name="--emulate-ssd")
    if rate is not None and rate < LEAST_RATE:
        raise ValueError(
            f"--emulate-ssd {shown(asked)}: want 1MB or more, which are read a second"
        )
    return rate


class SlowChunks:
    """Reads of another ChunkStore, held to so many bytes a second in all.

    The SSD it stands for serves one read after the other, whoever asks.
    """

    def __init__(self, chunks: ChunkStore, bytes_per_s: int):
        self._chunks, self._rate = chunks, bytes_per_s
        self._lock = threading.Lock()
        self._free_s = 0.0

    def read(self, layer: int, plane: str, out: np.ndarray) -> None:
        """See `ChunkStore.read`."""
        done = self._served(time.perf_counter(), out.nbytes)
        self._chunks.read(layer, plane, out)
        time.sleep(max(0.0, done - time.perf_counter()))

    def read_records(
        self,
        layer: int,
        plane: str,
        ids: np.ndarray,
        out: np.ndarray,
        slots: np.ndarray,
    ) -> int:
        """See `ChunkStore.read_records`; held to bytes, whatever each read costs."""
        begun = time.perf_counter()
        read = self._chunks.read_records(layer, plane, ids, out, slots)
        time.sleep(max(0.0, self._served(begun, read) - time.perf_counter()))
        return read

    def _served(self, asked_s: float, nbytes: int) -> float:
        """When so many bytes, asked for at a time, have come."""
        with self._lock:
            self._free_s = max(asked_s, self._free_s) + nbytes / self._rate
            return self._free_s
