"""Where the time of one resident decode step goes: each piece timed alone, on one
layer after the other, since the weights of one alone may stay in a cache.

    .venv/bin/python scripts/profile_step.py [STORE] [--mix 25/25/50] [--toy]

Pieces of one layer and the output head, least and median microseconds of many calls; a
call of an empty function is shown first, since every piece pays that too when it is
called alone. The last lines compare the sum with the step as one program.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

import m2jax
from m2jax import ffn, model, ranking


def micros(
    function: Callable, turns: list[list[object]], *, calls: int
) -> tuple[float, float]:
    """Least and median microseconds of a compiled call, on each turn's arguments."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*turns[0]))
    times = []
    for call in range(calls):
        args = turns[call % len(turns)]
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(1e6 * (time.perf_counter() - start))
    return min(times), median(times)


def pieces(engine: m2jax.Engine, layer: int) -> dict[str, tuple]:
    """Name to function and arguments."""
    runner = engine._runner
    spec, config = runner.steps.specs[layer], runner.config
    params, planes = runner.layers[layer], runner.tiers.whole_planes(layer)
    noise = np.random.default_rng(0).normal(size=(1, config.hidden_size))
    x = jnp.asarray(noise, jnp.float32)
    kv = runner.new_kv(128)[0]
    attend = partial(model.attend, config=config)
    found = {
        "empty call": (lambda x: x + 1, x),
        "attention": (attend, params.attention, x, kv, jnp.int32(5), params.window),
    }
    base = None
    ids = jnp.arange(spec.ranked_counts.kept, dtype=jnp.int32)
    if spec.base_whole and not spec.uniform:
        base_pass = partial(ffn.base_pass, spec=spec)
        found["base pass"] = (base_pass, x, planes["q4"], params.scales)
        base = base_pass(x, planes["q4"], params.scales)
    if spec.ranked and base is not None:

        def rank(base: ffn.BasePass, h: jax.Array, norms: ffn.Norms) -> jax.Array:
            return ranking.rank(ffn.base_scores(base, h, norms, spec=spec), spec=spec)

        found["rank"] = (rank, base, x, params.norms)
        ids = rank(base, x, params.norms)[0]
    classes = ranking.split_classes(ids, spec=spec)
    rows = {
        plane: ffn.NeuronRows(
            records, None if spec.dense(plane) else classes.by_plane(plane)
        )
        for plane, records in planes.items()
    }
    forward = partial(ffn.feed_forward, spec=spec)
    found["feed-forward"] = (forward, x, base, classes, rows, params.scales)
    head = partial(model.logits, config=config)
    found["output head"] = (head, runner.head, runner.embed, x)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", nargs="?", help="without it the bundled model")
    parser.add_argument("--mix", default="25/25/50")
    parser.add_argument("--toy", action="store_true", help="few calls, for CI")
    args = parser.parse_args()
    calls = 3 if args.toy else 300
    with m2jax.load(args.store, mix=args.mix, context=512) as engine:
        total = 0.0
        print(f"mix {args.mix}, microseconds: least, median of {calls} calls")
        specs = engine._runner.steps.specs
        alike = [
            pieces(engine, layer)
            for layer in range(len(specs))
            if specs[layer] == specs[0]
        ]
        for name, (function, *_) in alike[0].items():
            turns = [list(of_layer[name][1:]) for of_layer in alike]
            least, middle = micros(function, turns, calls=calls)
            print(f"{name:14s} {least:8.0f} {middle:8.0f}")
            if name != "empty call":
                layers = 1 if name == "output head" else engine.config.num_layers
                total += layers * middle
        tokens = 9 if args.toy else 129
        options = {"max_new_tokens": tokens, "ignore_eos": True}
        steps = [
            engine.generate([1, 5, 9], **options).stats.timings.tpot_s or 0.0
            for _ in range(6)
        ]
        print(f"{'sum, a token':14s} {total:17.0f}")
        print(f"{'one program':14s} {1e6 * median(steps[1:]):17.0f}")


if __name__ == "__main__":
    main()
