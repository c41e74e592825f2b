"""Times one layer's feed-forward block by tokens and planes, and its attention by
tokens and position in a buffer: milliseconds, medians.

    .venv/bin/python scripts/bench_kernels.py [--hidden 4096] [--neurons 11008] \
        [--tokens 1,4,16,64,512] [--implementation xla_blocked]

Random codes and numbers; every neuron at the same precision, and mixes whose classes
each token draws anew (ranking left out). Heads of 128, as many as the hidden size
holds, a group of keys for each. One JSON object on stdout.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from m2jax.ffn import base_pass, class_sum
from m2jax.ffn_spec import FfnSpec
from m2jax.kernels import attention
from m2jax.kernels.sparse_swiglu import PROJECT, whole
from m2jax.machine import machine_facts
from m2jax.mix import PrecisionMix

GROUP, HEAD = 64, 128
PLANES = {"4 bits": ("q4",), "8 bits": ("q4", "r4"), "16 bits": ("w16",)}
MIXES = ("0/25/75", "25/25/50")


def records(
    generator: np.random.Generator, neurons: int, hidden: int
) -> dict[str, jax.Array]:
    def codes() -> np.ndarray:
        return generator.integers(0, 256, (neurons, 3 * hidden // 2), np.uint8)

    # Bits of bfloat16 between 1 and 2.
    numbers = generator.integers(0x3F80, 0x4000, (neurons, 3 * hidden), np.uint16)
    made = {"q4": codes(), "r4": codes(), "w16": numbers}
    return {plane: jnp.asarray(rows) for plane, rows in made.items()}


def median_ms(work: Callable[..., jax.Array], *arrays, repeats: int) -> float:
    compiled = jax.jit(work)
    jax.block_until_ready(compiled(*arrays))
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def mixed_ms(
    x: jax.Array,
    planes: dict[str, jax.Array],
    scales: jax.Array,
    mix: str,
    *,
    repeats: int,
) -> float:
    """The block with the 4-bit pass over all neurons, each token with classes of its
    own: as sweeps of drafts make it."""
    neurons, hidden = len(scales), x.shape[1]
    counts = PrecisionMix.parse(mix).counts(neurons)
    spec = FfnSpec("silu", neurons, hidden, hidden, counts, "base")
    classes = np.repeat([16, 8, 4], counts).astype(np.int32)
    drawn = np.random.default_rng(1).permuted(np.tile(classes, (len(x), 1)), axis=1)

    @jax.jit
    def block(x, planes, scales, bits):
        base = base_pass(x, planes["q4"], scales, spec=spec)
        return class_sum(x, base, bits, planes, scales, spec=spec)

    used = {plane: planes[plane] for plane in spec.wanted}
    return median_ms(block, x, used, scales, jnp.asarray(drawn), repeats=repeats)


def attention_rows(
    generator: np.random.Generator, args: argparse.Namespace
) -> Iterator[dict[str, float]]:
    heads, capacity = max(1, args.hidden // HEAD), args.positions
    keys, values = jnp.asarray(
        generator.normal(size=(2, heads, capacity, HEAD)), jnp.float32
    )
    attend = partial(attention.attend, implementation=args.implementation)
    for tokens, share in product((1, 4, 16), (16, 4, 1)):
        q = jnp.asarray(generator.normal(size=(tokens, heads, HEAD)), jnp.float32)
        end = max(tokens, capacity // share)
        seen = jnp.arange(end - tokens, end, dtype=jnp.int32)
        window = jnp.int32(capacity)
        yield {
            "tokens": tokens,
            "position": end,
            "capacity": capacity,
            "ms": median_ms(
                attend, q, keys, values, seen, window, repeats=args.repeats
            ),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,512")
    parser.add_argument("--positions", type=int, default=2048, help="of the buffer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--implementation", help="unset: what serves by default")
    args = parser.parse_args()
    if args.implementation not in (None, *PROJECT):
        parser.error(f"--implementation: want one of {sorted(PROJECT)}")
    generator = np.random.default_rng(0)
    planes = records(generator, args.neurons, args.hidden)
    scales = jnp.asarray(
        generator.normal(size=(args.neurons, 3, args.hidden // GROUP)), jnp.float16
    )
    found = []
    for tokens in map(int, args.tokens.split(",")):
        x = jnp.asarray(generator.normal(size=(tokens, args.hidden)), jnp.float32)
        row: dict[str, float] = {"tokens": tokens}
        for name, used in PLANES.items():
            rows = {plane: planes[plane] for plane in used}
            block = partial(
                whole, activation="silu", implementation=args.implementation
            )
            own = None if name == "16 bits" else scales
            row[name] = median_ms(block, x, rows, own, repeats=args.repeats)
        if args.implementation is None and tokens > 1:
            for mix in MIXES:
                row[mix] = mixed_ms(x, planes, scales, mix, repeats=args.repeats)
        found.append(row)
    made = {
        "machine": machine_facts(),
        **vars(args),
        "milliseconds": found,
    }
    if args.implementation in (None, *attention.IMPLEMENTATIONS):
        made["attention"] = list(attention_rows(generator, args))
    print(json.dumps(made))


if __name__ == "__main__":
    main()
