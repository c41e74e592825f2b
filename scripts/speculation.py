"""Measures drafts: how much of them is right, and what they gain; docs/speculation.md.

    .venv/bin/python scripts/speculation.py [--toy] [--out docs/speculation.md]

The bundled model, prompts of 128 tokens from three texts. Raw figures go to
docs/bench/speculation.json beside the page.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import speculation_gains
import speculation_runs as runs
import speculation_tables as tables

from m2jax.bundled import SOURCE
from m2jax.cli.compilation import keep_compiled
from m2jax.convert import convert
from m2jax.machine import machine_facts

ROOT = Path(__file__).parent.parent
BEGUN = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGUN:6.0f} s  {line}", file=sys.stderr, flush=True)


def measure(sizes: runs.Sizes, *, gains_only: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        say("convert")
        store = convert(SOURCE, Path(folder) / "store")
        gains = {
            "gains_machine": machine_facts(),
            "gains": speculation_gains.gains(store, sizes, say),
        }
        if gains_only:
            return gains
        return {
            **gains,
            "acceptance": runs.acceptance(store, sizes, say),
            "widths": runs.widths(store, sizes, say),
            "coupling": runs.coupling(store, sizes, say),
            "rounding": runs.rounding(store, sizes, say),
            "unions": runs.unions(store, sizes, say),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speculation.md")
    parser.add_argument("--toy", action="store_true", help="tiny and quick, for CI")
    parser.add_argument("--from-json", type=Path, help="only write the page again")
    parser.add_argument(
        "--gains-only", action="store_true", help="with --from-json: new gains"
    )
    args = parser.parse_args()
    if args.gains_only and not args.from_json:
        parser.error("--gains-only: want --from-json too")
    found = json.loads(args.from_json.read_text()) if args.from_json else {}
    if not args.from_json or args.gains_only:
        keep_compiled()
        machine = machine_facts()
        sizes = runs.Sizes(toy=args.toy)
        found |= measure(sizes, gains_only=args.gains_only)
        if not args.gains_only:
            machine["minutes"] = (time.monotonic() - BEGUN) / 60
            found["machine"] = machine
        raw = args.out.parent / "bench" / "speculation.json"
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(found) + "\n")
    if "machine" not in found:
        say("gains alone, as of another machine: no page is made of them")
        return
    args.out.write_text(tables.report(found))
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
