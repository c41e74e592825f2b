"""The host's share of a layer-step: one visit to a layer, timed; docs/host.md.

    .venv/bin/python scripts/bench_host.py [--out docs/host.md]    # three minutes

Visits of the engine's own tiers on a CPU that copies as for an accelerator: wanted ids
in, slots out, for every plane that a mix wants records of. Three ways: without bytes
(records of 64 bytes, nothing written to the pool) is bookkeeping alone; with rows, the
loads of a real record's size are gathered; with copies, they are written to the pool.
By default the layers are a 7B model's: F=11008, a quarter wanted above 4 bits, slots
for twice that, adjacent wanted sets share 80 percent.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from m2jax.cache import access
from m2jax.cache.manager import TierManager
from m2jax.cache.policy import POLICIES
from m2jax.cli.tables import markdown
from m2jax.compiled_kernels import prepare_kernels
from m2jax.kernels import directory
from m2jax.machine import machine_facts
from m2jax.plan import Placement
from m2jax.timeline import Timeline

ROOT = Path(__file__).parent.parent
FINDINGS = Path(__file__).parent / "data" / "host-findings.md"
MIXES = {"0/25/75": ("r4",), "25/25/50": ("r4", "w16")}
# A 7B model's.
RECORD_BYTES = {"q4": 6144, "r4": 6144, "w16": 24576}
NARROW_BYTES = 64
# Directories of so many layers, so that each is as cold as in a step of a whole model;
# with real records one layer's, which are more than any cache.
LAYERS = 8
WAYS = ("without bytes", "with rows", "with copies")
FORMS = {"numpy": "NumPy", "native": "C++ (`kernels/directory`)"}
# Of each layer: pools are full by then, and every size of transfer is compiled.
WARM_UP_VISITS = 50


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


def tiers_of(
    planes: Sequence[str], policy: str, way: str, sizes: argparse.Namespace
) -> TierManager:
    """Plane q4 resident, the others in pools, all else in DRAM; bytes of no model."""
    layers = LAYERS if way == "without bytes" else 1
    neurons, used = sizes.neurons, ("q4", *planes)
    slots = dict.fromkeys(planes, (sizes.slots,) * layers)
    place = Placement(
        used=(used,) * layers,
        slots={"q4": (neurons,) * layers, **slots},
        whole=neurons,
        dram_layers=tuple(range(layers)),
        fixed=layers,
        ring=0,
    )
    narrow = way == "without bytes" or sizes.toy
    tiers = TierManager(
        lambda layer, plane, out: out.fill(layer),
        place,
        {plane: NARROW_BYTES if narrow else RECORD_BYTES[plane] for plane in used},
        neurons=neurons,
        original_dtype="float16",
        wanted=({"q4": neurons, **dict.fromkeys(planes, sizes.wanted)},) * layers,
        policy=policy,
    )
    tiers.load_resident(lambda nbytes: None)
    return tiers


def measure(mix: str, policy: str, way: str, sizes: argparse.Namespace):
    """Microseconds of visits after the warm-up, as in the engine's loop.

    Returns:
        mix, policy, way; median_us, min_us, p10_us, p90_us of a visit; plans_us: the
        median of what of it the planes' `Residency.plan` take; hit_ratio of records
        wanted above 4 bits, loads_per_visit.
    """
    planes = MIXES[mix]
    tiers = tiers_of(planes, policy, way, sizes)
    layers = len(tiers.placement.used)
    sets = [
        {
            plane: wanted_sets(
                np.random.default_rng([sizes.seed, layer, place]),
                neurons=sizes.neurons,
                wanted=sizes.wanted,
                overlap=sizes.overlap,
            )
            for place, plane in enumerate(planes)
        }
        for layer in range(layers)
    ]
    # A pool has slots for it: the device's own copy of the ids is not looked at.
    named = jnp.arange(sizes.wanted, dtype=jnp.int32)
    copies = way == "with copies"

    def visit(layer: int) -> float:
        wanted = {plane: next(sets[layer][plane]) for plane in planes}
        start = time.perf_counter_ns()
        with tiers.layer(layer) as seen:
            seen.base()
            for plane, ids in wanted.items():
                seen.wanted(plane, named, ids)
        if copies:
            jax.block_until_ready(list(tiers._pools.values()))
        return (time.perf_counter_ns() - start) / 1e3

    def loads() -> int:
        return sum(own.loads for own in tiers._directory.values())

    def visits(count: int) -> np.ndarray:
        return np.array([visit(n % layers) for n in range(count)])

    with patch.object(
        access, "fill", access.fill if copies else lambda pool, places, rows: pool
    ):
        visits((5 if sizes.toy else WARM_UP_VISITS) * layers)
        before, times_us = loads(), visits(sizes.visits)
        loaded = (loads() - before) / sizes.visits
        tiers.profile(timeline := Timeline())
        visits(sizes.visits)
    tiers.close()
    plans = [e.end_s - e.start_s for e in timeline.events if e.name == "plan"]
    plans_us = 1e6 * np.reshape(plans, (sizes.visits, len(planes))).sum(1)
    p10, median, p90 = np.percentile(times_us, [10, 50, 90])
    return {
        "mix": mix,
        "policy": policy,
        "way": way,
        "median_us": round(float(median), 1),
        "min_us": round(float(times_us.min()), 1),
        "p10_us": round(float(p10), 1),
        "p90_us": round(float(p90), 1),
        "plans_us": round(float(np.median(plans_us)), 1),
        "hit_ratio": round(1 - loaded / (len(planes) * sizes.wanted), 4),
        "loads_per_visit": round(loaded, 1),
    }


def report(found: dict[str, Any]) -> str:
    """docs/host.md from what was measured."""
    here, sizes = found["machine"], found["sizes"]
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in found["results"]:
        rows.setdefault((row["mix"], row["policy"]), {})[row["way"]] = row
    cells = []
    for (mix, policy), ways in rows.items():
        first = ways[WAYS[0]]
        cells.append(
            [
                *(mix, policy.upper(), f"{first['hit_ratio']:.2f}"),
                f"{first['loads_per_visit']:.0f}",
                f"{first['plans_us']:.0f}",
                *(
                    f"{ways[w]['median_us']:.0f} ({ways[w]['p90_us']:.0f})"
                    for w in WAYS
                ),
            ]
        )
    head = ["mix", "policy", "hits", "loads", "directories alone", *WAYS]
    parts = [
        "# The host's share of a layer-step\n",
        f"Made by `scripts/bench_host.py` at commit {here['commit']} ({here['cpu']}, "
        f"{here['cores']} cores, NumPy {here['versions']['numpy']}, jax "
        f"{here['versions']['jax']}); raw figures in `docs/bench/host.json`. One "
        "visit to a layer by the engine's own tiers: ids of the wanted records in, "
        "slots out, for each plane that the mix wants records of. Directories "
        f"decide by {FORMS[found['directory']]}.\n",
        FINDINGS.read_text() if FINDINGS.exists() else "",
        f"{sizes['neurons']} neurons, {sizes['wanted']} wanted of each plane, slots "
        f"for {sizes['slots']}; adjacent wanted sets share "
        f"{100 * sizes['overlap']:.0f} %. Microseconds, medians (and 90th "
        "percentiles). Directories alone: `Residency.plan` of all planes. Without "
        "bytes: all that the host does in a visit but for the loads themselves, which "
        "is bookkeeping. With rows: loads of real records are gathered for the "
        "transfer, too. With copies: and written to the pool, on this CPU; an "
        "accelerator's link takes what it takes.\n",
        markdown(head, cells) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--neurons", type=int, default=11008, help="F (%(default)s)")
    parser.add_argument("--wanted", type=int, default=2752, help="K (%(default)s)")
    parser.add_argument("--slots", type=int, default=5504, help="S (%(default)s)")
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.8,
        help="share of a wanted set that the step before wanted too (%(default)s)",
    )
    parser.add_argument("--visits", type=int, default=400, help="timed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--toy", action="store_true", help="256 neurons, 20 visits: does it run at all"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "host.md")
    parser.add_argument("--from-json", type=Path, help="only write the page again")
    arguments = parser.parse_args()
    if arguments.toy:
        vars(arguments).update(neurons=256, wanted=64, slots=128, visits=20)
    if not 1 <= arguments.wanted <= arguments.slots:
        parser.error("want 1 <= --wanted <= --slots")
    kept = round(arguments.overlap * arguments.wanted)
    if not 2 * arguments.wanted - arguments.neurons <= kept <= arguments.wanted:
        parser.error(f"no two sets of --wanted among --neurons share {kept} ids")
    if arguments.visits < 1:
        parser.error("want --visits of at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.from_json:
        found = json.loads(arguments.from_json.read_text())
    else:
        prepare_kernels()
        names = ("neurons", "wanted", "slots", "overlap", "visits", "seed")
        found = {
            "machine": machine_facts(),
            "directory": directory.default_form(),
            "sizes": {name: getattr(arguments, name) for name in names},
            "results": [
                measure(mix, policy, way, arguments)
                for mix in MIXES
                for policy in POLICIES
                for way in WAYS
            ],
        }
        raw = arguments.out.parent / "bench" / "host.json"
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(found) + "\n")
    arguments.out.write_text(report(found))
    print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
