"""Who of each token's neurons scores best.

`best(scores, ends)` names them, `levels(scores, ends)` says of every neuron how good it
is. Ties go to the lower id. "xla" and "xla_blocked" rank or sort whole rows; "cpu_ffi"
is a C++ kernel that looks for the scores at the ends alone. None: see `kernels.choice`.
"""

from collections.abc import Sequence

from jax import Array

from m2jax.kernels.choice import chosen
from m2jax.kernels.selection import native, reference

BEST = {
    "xla": reference.best_xla,
    "xla_blocked": reference.best_xla,
    "cpu_ffi": native.best_native,
}
LEVELS = {
    "xla": reference.levels_xla,
    "xla_blocked": reference.levels_xla,
    "cpu_ffi": native.levels_native,
}

__all__ = ["BEST", "LEVELS", "best", "levels"]


def best(
    scores: Array, ends: Sequence[int], *, implementation: str | None = None
) -> Array:
    """Ids of the best of each row, class by class.

    Args:
        scores: [T, F] float32, larger is better.
        ends: of the classes, ascending, at most F: the best ends[0] of a row, then
            those up to ends[1], and so on.

    Returns:
        int32 [T, ends[-1]]. The order within a class is the implementation's own: best
        first, or by id.
    """
    return BEST[chosen("selection", BEST, implementation, {})](scores, tuple(ends))


def levels(scores: Array, ends: Array, *, implementation: str | None = None) -> Array:
    """How many of the ends each neuron's place in its row is below.

    Args:
        scores: [T, F] float32, larger is better.
        ends: int32 [E], ascending, from 0 to F. Values, not shapes.

    Returns:
        int32 [T, F] of 0 to E.
    """
    return LEVELS[chosen("selection", LEVELS, implementation, {})](scores, ends)
