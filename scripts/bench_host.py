"""Times the host's bookkeeping: one `Residency.plan` per layer-step. NumPy only.

Default sizes are one layer of a 7B model: F=11008, K=2752, S=5504, adjacent wanted sets
share 80 percent.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from m2jax.cache.policy import POLICIES
from m2jax.cache.residency import Residency

WARM_UP_STEPS = 50


def wanted_sets(
    generator: np.random.Generator, *, neurons: int, wanted: int, overlap: float
) -> Iterator[np.ndarray]:
    """Random int32 [K] sets without end; round(overlap K) ids are the last set's."""
    kept = round(overlap * wanted)
    order = generator.permutation(neurons).astype(np.int32)
    while True:
        yield order[:wanted].copy()
        generator.shuffle(order[:wanted])
        generator.shuffle(order[wanted:])
        fresh = order[wanted : 2 * wanted - kept].copy()
        order[wanted : 2 * wanted - kept] = order[kept:wanted]
        order[kept:wanted] = fresh
        generator.shuffle(order[:wanted])


def measure(policy: str, sizes: argparse.Namespace) -> dict[str, object]:
    """Microseconds of `plan` over the steps after the warm-up."""
    sets = wanted_sets(
        np.random.default_rng(sizes.seed),
        neurons=sizes.neurons,
        wanted=sizes.wanted,
        overlap=sizes.overlap,
    )
    residency = Residency(sizes.neurons, sizes.slots, POLICIES[policy](sizes.neurons))
    for _ in range(WARM_UP_STEPS):
        residency.plan(next(sets))
    hits, accesses = residency.hits, residency.accesses
    times_us = np.empty(sizes.steps)
    for step in range(sizes.steps):
        wanted = next(sets)
        start = time.perf_counter_ns()
        residency.plan(wanted)
        times_us[step] = (time.perf_counter_ns() - start) / 1e3
    p10, median, p90 = np.percentile(times_us, [10, 50, 90])
    hits, accesses = residency.hits - hits, residency.accesses - accesses
    return {
        "policy": policy,
        "median_us": round(float(median), 1),
        "min_us": round(float(times_us.min()), 1),
        "p10_us": round(float(p10), 1),
        "p90_us": round(float(p90), 1),
        "hit_ratio": round(hits / accesses, 4),
        "loads_per_step": round((accesses - hits) / sizes.steps, 1),
    }


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neurons", type=int, default=11008, help="F (%(default)s)")
    parser.add_argument("--wanted", type=int, default=2752, help="K (%(default)s)")
    parser.add_argument("--slots", type=int, default=5504, help="S (%(default)s)")
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.8,
        help="share of a wanted set that the step before wanted too (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=300, help="timed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--toy", action="store_true", help="256 neurons, 20 steps: does it run at all"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    if arguments.toy:
        vars(arguments).update(neurons=256, wanted=64, slots=128, steps=20)
    if not 1 <= arguments.wanted <= arguments.slots:
        parser.error("want 1 <= --wanted <= --slots")
    kept = round(arguments.overlap * arguments.wanted)
    if not 2 * arguments.wanted - arguments.neurons <= kept <= arguments.wanted:
        parser.error(f"no two sets of --wanted among --neurons share {kept} ids")
    if arguments.steps < 1:
        parser.error("want --steps of at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    results = [measure(policy, arguments) for policy in POLICIES]
    names = ("neurons", "wanted", "slots", "overlap", "steps", "seed")
    sizes = {name: getattr(arguments, name) for name in names}
    if arguments.json:
        print(json.dumps({"machine": machine(), "sizes": sizes, "results": results}))
        return
    for facts in (machine(), sizes, *results):
        print(", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
