"""What scoring one layer's neurons for one token costs here: bytes and time."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.calibrate.fit import FitOptions
from m2jax.calibrate.windows import ahead_scores
from m2jax.engine import Engine
from m2jax.lowrank import Predictor, default_rank, predict

CALLS = 30


def scorer_costs(engine: Engine, options: FitOptions | None) -> dict[str, Any]:
    """Per scorer: bytes it reads and bytes it keeps on the device beside the planes, a
    layer, and the median time of a call, microseconds.

    base reads gate and up rows of q4, which the 4-bit class has there anyway.
    """
    runner, spec = engine.runner, engine.specs[0]
    params, planes = runner.layers[0], runner.tiers.whole_planes(0)
    rank = options.rank if options and options.rank else None
    rank = rank or default_rank(spec.hidden_size, spec.neurons)
    noise = np.random.default_rng(0).normal(size=(1, spec.hidden_size))
    x = jnp.asarray(noise, jnp.float32)
    maps = Predictor(
        jnp.zeros((rank, spec.hidden_size), jnp.float16),
        jnp.zeros((spec.neurons, rank), jnp.float16),
    )
    kept = sum(array.nbytes for array in maps)
    base = partial(ahead_scores, spec=spec)
    costs = {
        "base": {
            "read_bytes": planes["q4"].nbytes * 2 // 3,
            "kept_bytes": 0,
            "micros": _micros(base, params, planes["q4"], x),
        },
        "lowrank": {
            "read_bytes": kept,
            "kept_bytes": kept,
            "micros": _micros(predict, maps, x),
        },
    }
    runner.tiers.computed(0)
    return costs


def _micros(function: Callable[..., Array], *args: Any) -> float:
    run = jax.jit(function)
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)
