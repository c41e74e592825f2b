"""m2jax: LLaMA-family models from SSD, DRAM and a mixed-precision HBM cache.

import m2jax

store = m2jax.convert("path/of/a/checkpoint", "path/of/a/store")
with m2jax.load(store, hbm="8GiB", dram="16GiB") as engine:
    for piece in engine.stream("Once upon a time", max_new_tokens=64):
        print(piece, end="", flush=True)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from m2jax.convert import convert
from m2jax.errors import DoesNotFit, NumericalError, StoreError, TierFailed
from m2jax.mix import PrecisionMix

if TYPE_CHECKING:
    from m2jax.engine import Engine
    from m2jax.loading import load
    from m2jax.stream import Generation, Stream

__version__ = version("m2jax")

__all__ = [
    "DoesNotFit",
    "Engine",
    "Generation",
    "NumericalError",
    "PrecisionMix",
    "StoreError",
    "Stream",
    "TierFailed",
    "convert",
    "load",
]

# These import jax, which takes seconds that `m2jax --help` and `info` need not wait.
_LAZY = {
    "Engine": "m2jax.engine",
    "Generation": "m2jax.stream",
    "Stream": "m2jax.stream",
    "load": "m2jax.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
