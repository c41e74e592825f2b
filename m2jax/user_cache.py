"""Where m2jax keeps for a user what it can make again."""

import os
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
