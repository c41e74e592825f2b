"""The errors m2jax raises on purpose, and the exit code each one means.

ValueError and NotImplementedError keep Python's meaning (a wrong argument; a right one
that cannot run here) and exit with 2; any other OSError is the machine's: 5.
"""

from pathlib import Path


def is_memory_error(error: BaseException) -> bool:
    """Memory that ran out by Python's own word: for an object, or a thread's stack."""
    return isinstance(error, MemoryError) or "start new thread" in str(error)


class DoesNotFit(ValueError):
    """The work needs more HBM, DRAM or disk than it may use; known before it starts."""

    exit_code = 3


class StoreError(OSError):
    """A store that is damaged, incomplete or of an unknown version.

    Args:
        message: what is wrong, what was wanted, what to do.
        path: the file or folder it is about, if one.
    """

    exit_code = 4

    def __init__(self, message: str, *, path: str | Path | None = None):
        super().__init__(message)
        self.path = None if path is None else str(path)


class TierFailed(StoreError):
    """The machine failed under the store: an I/O error, a time-out, a full disk."""

    exit_code = 5


class NumericalError(ArithmeticError):
    """NaN or infinity where numbers were expected: the store holds what gives them."""

    exit_code = 4
