"""Keeps compiled programs from one run to the next."""

import os
import warnings

from m2jax.user_cache import cache_folder


def keep_compiled() -> None:
    """Switches on JAX's persistent cache, in a folder that only its owner can open.

    What lies there is run, so a folder of another user's is not used. Without a folder
    that can be written everything works, and compiles anew each time.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        folder = cache_folder() / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            return
        folder.chmod(0o700)
    except OSError:
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    import jax

    # A full disk under the cache is no concern of the run.
    warnings.filterwarnings("ignore", "Error .* persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
