"""The command line `m2jax`. Knows options, text and exit codes; computes nothing."""

from m2jax.cli.app import main

__all__ = ["main"]
