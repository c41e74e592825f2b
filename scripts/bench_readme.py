"""The README's table of speeds: the bundled model at several budgets, as markdown.

    .venv/bin/python scripts/bench_readme.py [--out docs/bench/NAME.json] [--toy]

Every row is one run of `m2jax bench` in a process of its own; the raw JSON of each run
is kept. Quote ratios within one run: machines differ and are noisy.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from m2jax.bundled import SOURCE
from m2jax.convert import convert
from m2jax.store import open_store

# Dense part, KV cache for 1024 positions: what any run of the bundled model needs.
ALWAYS_BYTES = 7_504_896 + 8 * 2**20


def half_budget(store: Path) -> int:
    """HBM bytes for the always-resident part and half of the neurons' bytes."""
    layout, layers = open_store(store).layout, open_store(store).config.num_layers
    neurons = layers * sum(layout.plane_bytes(plane) for plane in ("q4", "r4", "w16"))
    return ALWAYS_BYTES + neurons // 2


def rows(store: Path) -> list[tuple[str, list[str]]]:
    half = f"{half_budget(store)}B"
    resident = [
        (f"resident, mix {mix}", ["--mix", mix])
        for mix in ("25/25/50", "0/25/75", "0/100/0", "0/0/100", "100/0/0")
    ]
    halves = [
        (f"half of the neurons' bytes in HBM, mix {mix}", ["--mix", mix, "--hbm", half])
        for mix in ("25/25/50", "100/0/0")
    ]
    small = ["--hbm", half, "--dram", "4MiB"]
    return [
        *resident,
        *halves,
        (
            "half of the neurons' bytes in HBM, DRAM of two layers, mix 25/25/50",
            ["--mix", "25/25/50", *small],
        ),
        (
            f"{halves[0][0]}, as an accelerator's (`--emulate-hbm`)",
            [*halves[0][1], "--emulate-hbm"],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the raw JSON goes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="tiny and quick, for CI")
    args = parser.parse_args()
    sizes = ["-p", "16", "-n", "8"] if args.toy else ["-p", "512", "-n", "128"]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        store = convert(SOURCE, Path(folder) / "store")
        chosen = rows(store)[-1:] if args.toy else rows(store)
        for name, options in chosen:
            command = ["bench", str(store), *sizes, "-r", str(args.repeats), *options]
            run = subprocess.run(
                [sys.executable, "-m", "m2jax", *command, "--json"],
                check=True,
                stdout=subprocess.PIPE,
            )
            results.append({"row": name, "options": options, **json.loads(run.stdout)})
            print(f"{name}: done", file=sys.stderr)
    print(markdown(results))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def markdown(results: list[dict]) -> str:
    lines = [
        "| what | pp, tokens/s | tg, tokens/s | DRAM to HBM a token | HBM held |",
        "|---|---:|---:|---:|---:|",
    ]
    for result in results:
        prompt, text = result["results"]
        lines.append(
            f"| {result['row']} | {_speed(prompt)} | {_speed(text)} "
            f"| {text['bytes_per_token']['dram_to_hbm'] / 2**20:.2f} MiB "
            f"| {text['held_bytes']['hbm'] / 2**20:.1f} MiB |"
        )
    return "\n".join(lines)


def _speed(test: dict) -> str:
    return f"{test['tokens_per_s_mean']:.0f} ± {test['tokens_per_s_sd']:.0f}"


if __name__ == "__main__":
    main()
