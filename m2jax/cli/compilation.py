"""Keeps compiled programs from one run to the next."""

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from m2jax.user_cache import cache_folder

# What JAX warns of, with the program's name.
_FAILED = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([^']+)'"
)
_SUFFIX = "-cache"


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

    _mend(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _mend(folder: Path) -> None:
    """Has entries removed that cannot be read, so that JAX writes them again.

    It writes an entry in place, and never one that is there: what a full disk or a kill
    left half would be read in vain, and compiled, by every later run.
    """
    with suppress(OSError):
        for path in folder.glob(f"*{_SUFFIX}"):
            if path.stat().st_size == 0:
                path.unlink()
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        failed = _FAILED.match(str(message))
        if failed is None:
            before(message, category, filename, lineno, file, line)
        # A full disk under the cache is no concern of the run.
        elif failed[1] == "reading":
            _remove(folder, failed[2])

    warnings.filterwarnings("always", _FAILED.pattern)
    warnings.showwarning = show


def _remove(folder: Path, program: str) -> None:
    """Removes a program's entries: JAX does not say for which shapes it was."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(f"{program}-") and path.name.endswith(_SUFFIX):
                path.unlink(missing_ok=True)
