"""Where m2jax keeps for a user what it can make again."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """Where m2jax keeps what it can make again: XDG_CACHE_HOME/m2jax.

    Raises:
        OSError: neither that variable nor a home folder is known.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    if not root:
        try:
            root = Path.home() / ".cache"
        except RuntimeError:
            raise FileNotFoundError(
                "this user has no home folder: set XDG_CACHE_HOME to a folder where "
                "m2jax may keep what it makes"
            ) from None
    return Path(root) / "m2jax"


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Of several processes one is within; all at once where files cannot be locked."""
    with path.open("w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
