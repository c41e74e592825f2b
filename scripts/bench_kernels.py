"""Times one layer's feed-forward block by tokens and planes: milliseconds, medians.

    .venv/bin/python scripts/bench_kernels.py [--hidden 4096] [--neurons 11008] \
        [--tokens 1,4,16,64,512] [--implementation cpu_ffi|xla_blocked]

Random codes and numbers; every neuron at the same precision. One JSON object on stdout.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from m2jax.kernels.choice import default_implementation
from m2jax.kernels.sparse_swiglu import PROJECT, whole
from m2jax.machine import machine_facts

GROUP = 64
PLANES = {"4 bits": ("q4",), "8 bits": ("q4", "r4"), "16 bits": ("w16",)}


def records(
    generator: np.random.Generator, neurons: int, hidden: int
) -> dict[str, jax.Array]:
    def codes() -> np.ndarray:
        return generator.integers(0, 256, (neurons, 3 * hidden // 2), np.uint8)

    # Bits of bfloat16 between 1 and 2.
    numbers = generator.integers(0x3F80, 0x4000, (neurons, 3 * hidden), np.uint16)
    made = {"q4": codes(), "r4": codes(), "w16": numbers}
    return {plane: jnp.asarray(rows) for plane, rows in made.items()}


def median_ms(
    x: jax.Array, rows, scales, *, implementation: str, repeats: int
) -> float:
    block = jax.jit(
        lambda x, rows, scales: whole(
            x, rows, scales, activation="silu", implementation=implementation
        )
    )
    jax.block_until_ready(block(x, rows, scales))
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(block(x, rows, scales))
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,512")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--implementation", default=default_implementation())
    args = parser.parse_args()
    if args.implementation not in PROJECT:
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
            row[name] = median_ms(
                x,
                rows,
                None if name == "16 bits" else scales,
                implementation=args.implementation,
                repeats=args.repeats,
            )
        found.append(row)
    about = {"machine": machine_facts(), **vars(args)}
    print(json.dumps({**about, "milliseconds": found}))


if __name__ == "__main__":
    main()
