"""Replays recorded traces: HBM policies beside Belady, DRAM by layer and by chunk.

    .venv/bin/python scripts/simulate_dram.py [--toy] [--out docs/simulation.md]

The bundled model and its ReLU form on pieces of three texts. Nothing is timed. Raw
figures go to docs/bench/simulation.json beside the page.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import simulate_runs as runs
import simulate_tables as tables
import simulate_tiers
from relu_model import write_relu_model

from m2jax.bundled import SOURCE
from m2jax.cli.compilation import keep_compiled
from m2jax.convert import convert
from m2jax.machine import machine_facts
from m2jax.store import open_store

ROOT = Path(__file__).parent.parent
BEGUN = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGUN:6.0f} s  {line}", file=sys.stderr, flush=True)


def measure(sizes: runs.Sizes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        say("convert")
        stores = {"SwiGLU": convert(SOURCE, place / "swiglu")}
        if not sizes.toy:
            write_relu_model(place / "relu-hf")
            stores["ReLU"] = convert(place / "relu-hf", place / "relu")
        return {
            "chunks": simulate_tiers.stores(open_store(stores["SwiGLU"]).config),
            "models": {
                name: runs.measured(
                    store, sizes, lambda line, of=name: say(f"{of}: {line}")
                )
                for name, store in stores.items()
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "simulation.md")
    parser.add_argument("--toy", action="store_true", help="tiny and quick, for CI")
    parser.add_argument("--from-json", type=Path, help="only write the page again")
    args = parser.parse_args()
    if args.from_json:
        found = json.loads(args.from_json.read_text())
    else:
        keep_compiled()
        sizes = runs.Sizes(toy=args.toy)
        found = {
            "machine": machine_facts(),
            "tokens": len(runs.NAMES) * sizes.texts * (sizes.length - 1),
            **measure(sizes),
        }
        raw = args.out.parent / "bench" / "simulation.json"
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(found) + "\n")
    args.out.write_text(tables.report(found))
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
