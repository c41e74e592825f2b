"""Wanted sets of a model on text, into a trace: text it writes, or text as it stands.

The engine records (`Engine.record`); what lies where does not change what it notes.
"""

from collections.abc import Callable, Sequence

import numpy as np

from m2jax.cache.trace import Trace
from m2jax.demand import make_demand
from m2jax.engine import Engine
from m2jax.errors import NumericalError
from m2jax.kv import block_sizes
from m2jax.replay import named

# Decode steps that are recorded, and in all, as far as can be told.
Progress = Callable[[int, int], None]


def record_generated(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    *,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Trace:
    """Wanted sets of the text that follows each prompt, one prompt after another.

    The first new token follows from the prompt alone: a text of n has n - 1 steps.

    Args:
        new_tokens: after each prompt; past the end-of-text token, too.

    Raises:
        ValueError: see `Engine.stream`, `replay.named`.
    """
    named(make_demand(engine.specs))
    total = len(prompts) * (new_tokens - 1)
    trace = Trace()
    tiers = engine.runner.tiers
    engine.record(trace)
    try:
        for prompt in prompts:
            stream = engine.stream(
                prompt,
                max_new_tokens=new_tokens,
                temperature=temperature,
                seed=seed,
                ignore_eos=True,
            )
            for _ in stream:
                progress(tiers.step, total)
    finally:
        engine.record(None)
    return trace


def record_text(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    *,
    progress: Progress = lambda done, total: None,
) -> Trace:
    """Wanted sets of given tokens, each decoded by itself after those before it.

    Args:
        windows: token ids, at least two each; each window is a text of its own.

    Raises:
        ValueError: see `Engine.encode`, `replay.named`.
        NumericalError: the model gives NaN.
    """
    named(make_demand(engine.specs))
    runner = engine.runner
    total = sum(len(window) - 1 for window in windows)
    trace = Trace()
    engine.record(trace)
    try:
        for window in windows:
            first, *others = engine.encode(list(window))
            kv = runner.new_kv(max(sum(block_sizes(1)), len(window)))
            x = runner.prefill([first], kv)[-1][:1]
            for position, token in enumerate(others, start=1):
                x = runner.decode(token, position, kv)
                progress(runner.tiers.step, total)
            if not np.all(np.isfinite(np.asarray(x))):
                raise NumericalError("the model's activations hold NaN or infinity")
    finally:
        engine.record(None)
    return trace
