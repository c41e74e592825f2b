"""Whole planes on their way through the device: copies that live for two visits.

On a CPU fresh memory costs more than the copy, page by page, so there the copies lie in
the same two buffers in turn, and JAX sees them where they are.
"""

import jax
import numpy as np
from jax import Array

from m2jax.aligned import aligned_buffer
from m2jax.cache.device import to_device

# As many layers may be in transit, see `plan.STAGING_BUFFERS`.
COPIES = 2


class Staging:
    """Makes the copies of one engine.

    A copy is valid until the second one of its plane after it is made: by then the
    caller has waited for all that was computed from it.
    """

    def __init__(self) -> None:
        self._reuse = jax.default_backend() == "cpu"
        self._buffers: dict[str, list[np.ndarray]] = {}

    def copy(self, plane: str, rows: np.ndarray) -> Array:
        """Rows [N, R] on the device, in their own dtype."""
        if not self._reuse:
            return to_device(rows)
        buffers = self._buffers.setdefault(plane, [])
        if len(buffers) < COPIES:
            raw = aligned_buffer((rows.shape[0], rows[:1].nbytes))
            buffers.append(raw.view(rows.dtype))
        else:
            buffers.append(buffers.pop(0))
        np.copyto(buffers[-1], rows)
        return jax.device_put(buffers[-1])
