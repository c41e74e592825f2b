"""Which implementation stands for None, by backend. Knows no op."""

import jax


def default_implementation() -> str:
    """The blocked form on a CPU, where XLA would otherwise first widen whole matrices
    (a 100-fold slow-down); "xla" elsewhere."""
    return "xla_blocked" if jax.default_backend() == "cpu" else "xla"
