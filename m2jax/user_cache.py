"""Where m2jax keeps for a user what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where m2jax keeps what it can make again: XDG_CACHE_HOME/m2jax."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "m2jax"
