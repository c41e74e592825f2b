"""A read from SSD that may fail: how often it is tried, and what is said at the end."""

import time
from collections.abc import Callable

import numpy as np

from m2jax.errors import StoreError, TierFailed

READ_ATTEMPTS = 3
BACK_OFF_S = 0.05

# Layer, plane, and where its bytes go.
Read = Callable[[int, str, np.ndarray], None]


def read_with_retries(
    read: Read,
    layer: int,
    plane: str,
    out: np.ndarray,
    *,
    count: Callable[[], None],
) -> int:
    """Reads one layer's plane; an I/O error is tried again, damage is not.

    Args:
        count: called before each time that it is tried again.

    Returns:
        Bytes read.

    Raises:
        StoreError: the store is damaged. TierFailed: the reads kept failing.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            read(layer, plane, out)
            return out.nbytes
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
