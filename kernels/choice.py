"""Which implementation stands for None, by backend. Knows no op."""

import jax

from m2jax.kernels.native import is_compiled, status


def default_implementation() -> str:
    """On a CPU the C++ kernels, and where they cannot be compiled the blocked form:
    XLA would otherwise first widen whole matrices (a 100-fold slow-down). Elsewhere
    "xla"."""
    if jax.default_backend() != "cpu":
        return "xla"
    return "cpu_ffi" if status().ready else "xla_blocked"


def must_compile() -> bool:
    """Whether the first call will take the seconds that compiling the kernels takes."""
    return jax.default_backend() == "cpu" and not is_compiled()
