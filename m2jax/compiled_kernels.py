"""Makes the compiled kernels ready before a model is loaded. Knows no model."""

import logging
from collections.abc import Callable
from functools import lru_cache

from m2jax.kernels import directory, toolchain
from m2jax.kernels.choice import must_compile, why_slow
from m2jax.memory import free_dram_bytes

log = logging.getLogger("m2jax")


def prepare_kernels(
    progress: Callable[[str, int], None] = lambda what, nbytes: None,
) -> None:
    """Compiles the kernels where they serve and were not compiled here before. Warns
    once in a process where there are none, unless the user wants none."""
    if must_compile():
        progress("compiling kernels, once on this machine", 0)
        toolchain.fit_memory(free_dram_bytes())
    # Registers them now, not while the first step is traced.
    reason = why_slow()
    # Wherever the host keeps directories, which is where no device does.
    without = directory.prepare()
    reason = reason or without
    if reason is not None and not toolchain.is_switched_off():
        _warn(reason)


@lru_cache
def _warn(reason: str) -> None:
    log.warning("no compiled kernels, slower ones serve: %s", reason)
