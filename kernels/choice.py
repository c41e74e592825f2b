"""Which implementation stands for None, by backend. Knows no op."""

import jax

from m2jax.kernels import cuda, native


def default_implementation() -> str:
    """On a CPU the C++ kernels, and where they cannot be compiled the blocked form:
    XLA would otherwise first widen whole matrices (a 100-fold slow-down). On a GPU the
    CUDA kernels, where they can be compiled. Elsewhere "xla"."""
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu_ffi" if native.status().ready else "xla_blocked"
    return "cuda_ffi" if backend == "gpu" and cuda.status().ready else "xla"


def why_slow() -> str | None:
    """Why compiled kernels do not serve where they could; None where they do."""
    status = {"cpu": native.status, "gpu": cuda.status}.get(jax.default_backend())
    return None if status is None or status().ready else status().about


def must_compile() -> bool:
    """Whether the first call will take the seconds that compiling the kernels takes."""
    compiled = {"cpu": native.is_compiled, "gpu": cuda.is_compiled}
    return not compiled.get(jax.default_backend(), lambda: True)()
