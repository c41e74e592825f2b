"""The model that comes with the package: pystories8M, converted once a user."""

from collections.abc import Callable
from pathlib import Path

from m2jax.convert import convert
from m2jax.store.manifest import VERSION
from m2jax.user_cache import cache_folder

SOURCE = Path(__file__).parent / "data" / "pystories8M"


def bundled_store(progress: Callable[[str, int], None] | None = None) -> Path:
    """The bundled model's store; converted at first use (a few seconds, 19 MB).

    Args:
        progress: told what begins, as `load` tells it.
    """
    store = cache_folder() / f"pystories8M-v{VERSION}"
    manifest = store / "manifest.json"
    if not manifest.exists():
        # Brings JAX along, as converting does.
        from m2jax.kernels.toolchain import one_at_a_time

        store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Whoever is first makes it while the others wait.
        with one_at_a_time(store.with_suffix(".lock")):
            if not manifest.exists():
                if progress is not None:
                    progress("converting the bundled model, once", 0)
                convert(SOURCE, store)
    return store
