"""Conversion of Hugging Face checkpoints to stores. Knows no cache and no engine."""

from m2jax.convert.run import convert

__all__ = ["convert"]
