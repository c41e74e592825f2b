"""m2jax: LLaMA-family models from SSD, DRAM and a mixed-precision HBM cache."""

from importlib.metadata import version

from m2jax.convert import convert
from m2jax.engine import Engine, Generation, Stream
from m2jax.errors import DoesNotFit, NumericalError, StoreError
from m2jax.loading import load
from m2jax.mix import PrecisionMix

__version__ = version("m2jax")

__all__ = [
    "DoesNotFit",
    "Engine",
    "Generation",
    "NumericalError",
    "PrecisionMix",
    "StoreError",
    "Stream",
    "convert",
    "load",
]
