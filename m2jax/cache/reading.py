"""Reads from SSD: what is counted, how often one that fails is tried, and what is said
at the end.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

import numpy as np

from m2jax.errors import StoreError, TierFailed

READ_ATTEMPTS = 3
BACK_OFF_S = 0.05

# Layer, plane, and where its bytes go.
Read = Callable[[int, str, np.ndarray], None]
# Layer, plane, ascending ids, rows and which of them: `ChunkStore.read_records`.
ReadRecords = Callable[[int, str, np.ndarray, np.ndarray, np.ndarray], int]
Result = TypeVar("Result")


@dataclass
class DramCounters:
    """Since the start.

    accesses, hits: of layers, and those that were read for an earlier access already;
    where single records are read, of these, and those that had a slot.
    read_bytes: asked of the disk. retries: of reads that failed.
    """

    accesses: int = 0
    hits: int = 0
    read_bytes: int = 0
    waited_s: float = 0.0
    retries: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, **more: float) -> None:
        """Adds to the counts that are named; any thread may call it."""
        with self._lock:
            for name, count in more.items():
                setattr(self, name, getattr(self, name) + count)

    def retried(self) -> None:
        self.add(retries=1)


def no_records(*_: object) -> int:
    """A `ReadRecords` where nobody may ask for any."""
    raise AssertionError("this placement reads whole layers")


def read_with_retries(
    read: Callable[..., Result],
    layer: int,
    plane: str,
    *where: np.ndarray,
    count: Callable[[], None],
) -> Result:
    """A `Read` or a `ReadRecords`; an I/O error is tried again, damage is not.

    Args:
        where: what `read` is given beside layer and plane.
        count: called before each time that it is tried again.

    Raises:
        StoreError: the store is damaged. TierFailed: the reads kept failing.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            return read(layer, plane, *where)
        except OSError as error:
            damaged = isinstance(error, StoreError) and not isinstance(
                error, TierFailed
            )
            if damaged:
                raise
            if attempt + 1 == READ_ATTEMPTS:
                raise TierFailed(
                    f"layer {layer}, plane {plane}: {error} ({READ_ATTEMPTS} attempts)",
                    path=getattr(error, "path", None),
                ) from error
            count()
            time.sleep(BACK_OFF_S * 4**attempt)
    raise AssertionError("unreachable")
