"""Which implementation stands for None, by backend, and what stands in for it where it
does not take a shape. Knows no op."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from m2jax.kernels import cuda, native

FALLBACK = {"cpu_ffi": "xla_blocked", "cuda_ffi": "xla"}

# Of programs that were traced in this process: by op what served where none was named,
# and why it stood in.
_served: dict[str, dict[str, str | None]] = {}

# In words what an implementation takes instead of what it is given; None: it takes it.
WhyNot = Callable[..., str | None]


def default_implementation() -> str:
    """On a CPU the C++ kernels, and where they cannot be compiled the blocked form:
    XLA would otherwise first widen whole matrices (a 100-fold slow-down). On a GPU the
    CUDA kernels, where they can be compiled. Elsewhere "xla"."""
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu_ffi" if native.status().ready else "xla_blocked"
    return "cuda_ffi" if backend == "gpu" and cuda.status().ready else "xla"


def chosen(
    op: str,
    table: Mapping[str, Any],
    implementation: str | None,
    why_not: Mapping[str, WhyNot],
    *given: Any,
    **more: Any,
) -> str:
    """Name of the implementation that serves: the one named; for None the default, or
    what stands in for it.

    Args:
        op: as users call it. table: its implementations.
        why_not: of those that do not take everything, asked with `given` and `more`.

    Raises:
        ValueError: there is none of that name.
        NotImplementedError: the one named does not take what is given.
    """
    named = default_implementation() if implementation is None else implementation
    if named in table:
        why = why_not[named](*given, **more) if named in why_not else None
        if why is None:
            if implementation is None:
                _note(op, named, why_slow())
            return named
    elif implementation is None:
        why = "has no such kernel"
    else:
        raise ValueError(f"{op}: implementation {named!r}: want one of {sorted(table)}")
    if implementation is None:
        _note(op, FALLBACK[named], f"{named} {why}")
        return FALLBACK[named]
    raise NotImplementedError(
        f"{op}: implementation {named!r} {why}; name another, or None: then one that "
        "takes it is chosen"
    )


def _note(op: str, name: str, why: str | None) -> None:
    _served.setdefault(op, {}).setdefault(name, why)


def report() -> dict[str, Any]:
    """What served so far in this process wherever none was named; JSON-able.

    compiled: whether there are kernels compiled for this device; about: by what for
    what, or why there are none; None where there could be none. ops: op to what served
    it, each with the reason (of the first shape) for which it stood in, None where it
    did not.
    """
    status = _status()
    return {
        "compiled": status is not None and status.ready,
        "about": None if status is None else status.about,
        "ops": {op: dict(_served[op]) for op in sorted(_served)},
    }


def _status() -> native.NativeStatus | cuda.CudaStatus | None:
    status = {"cpu": native.status, "gpu": cuda.status}.get(jax.default_backend())
    return None if status is None else status()


def why_slow() -> str | None:
    """Why compiled kernels do not serve where they could; None where they do."""
    status = _status()
    return None if status is None or status.ready else status.about


def must_compile() -> bool:
    """Whether the first call will take the seconds that compiling the kernels takes."""
    compiled = {"cpu": native.is_compiled, "gpu": cuda.is_compiled}
    return not compiled.get(jax.default_backend(), lambda: True)()
