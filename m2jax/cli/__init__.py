"""The command line `m2jax`. Knows options, text and exit codes; computes nothing."""

from m2jax.cli.app import main, run

__all__ = ["main", "run"]
