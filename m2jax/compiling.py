"""Seconds that XLA has spent compiling in this process, by JAX's own events."""

import jax

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


class _Clock:
    seconds = 0.0

    def __call__(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _BACKEND_COMPILE:
            self.seconds += duration_secs


_clock = _Clock()
jax.monitoring.register_event_duration_secs_listener(_clock)


def compile_seconds() -> float:
    """Total since this module was imported; loads from a persistent cache count too."""
    return _clock.seconds
