"""The model that comes with the package: pystories8M, converted once a user."""

import os
from collections.abc import Callable
from pathlib import Path

from m2jax.convert import convert
from m2jax.store.manifest import VERSION

SOURCE = Path(__file__).parent / "data" / "pystories8M"


def cache_folder() -> Path:
    """Where m2jax keeps what it can make again: XDG_CACHE_HOME/m2jax."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "m2jax"


def bundled_store(progress: Callable[[str, int], None] | None = None) -> Path:
    """The bundled model's store; converted at first use (a few seconds, 19 MB)."""
    store = cache_folder() / f"pystories8M-v{VERSION}"
    if not (store / "manifest.json").exists():
        store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        convert(SOURCE, store)
    return store
