"""m2jax beside llama.cpp and accelerate, the same weights, the same memory.

    .venv/bin/python scripts/bench_peers.py WORK --llama peers/llama/bin/python \
        [--accelerate peers/hf/bin/python] [--large] [--out docs/performance.md]

WORK holds the models that are made: a LLaMA of 1.1 B random weights, its store and GGUF
files (8 GB); --large adds one of 6.7 B for the rows under a memory cap (31 GB). Random
weights are right for speed, and say nothing of drafts: the page says what is right of
them here, and what other shares would give.
How the peers are installed: docs/performance.md. The cap is a memory cgroup, as root.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_cage import caged, why_not
from peer_tables import ACCELERATE, DRAFTING, LLAMA, PROMPT, report

from m2jax.bandwidths import measure
from m2jax.machine import machine_facts

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
BEGUN = time.monotonic()
SMALL = {
    "layers": 22,
    "hidden": 2048,
    "ffn": 5632,
    "heads": 32,
    "kv-heads": 4,
    "vocab": 32000,
}
LARGE = {**SMALL, "layers": 32, "hidden": 4096, "ffn": 11008, "kv-heads": 32}
TOY = {
    "layers": 2,
    "hidden": 64,
    "ffn": 96,
    "heads": 4,
    "kv-heads": 2,
    "vocab": 96,
}
CAP_SHARE = 0.6


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGUN:6.0f} s  {line}", file=sys.stderr, flush=True)


def run(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def made(work: Path, name: str, shape: dict[str, int], *, planes: str) -> Path:
    """A folder with hf/, store/ and the GGUF files of one model."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    options = [part for key, n in shape.items() for part in (f"--{key}", n)]
    python = sys.executable
    if not (folder / "hf" / "config.json").exists():
        say(f"{name}: random weights")
        script = SCRIPTS / "make_checkpoint.py"
        run(python, script, folder / "hf", *options, "--dtype", "float16")
    if not (folder / "store" / "manifest.json").exists():
        say(f"{name}: store")
        store = folder / "store"
        run(python, "-m", "m2jax", "convert", folder / "hf", store, "--planes", planes)
    # Only what is compared.
    kinds = {"small": ("Q8_0", "Q4_0"), "large": ("Q8_0",)}[name]
    for kind in () if shape is TOY else kinds:
        if not (folder / f"{kind}.gguf").exists():
            say(f"{name}: {kind}")
            script = SCRIPTS / "make_gguf.py"
            target = folder / f"{kind}.gguf"
            run(python, script, folder / "hf", target, "--type", kind)
    return folder


def bench(store: Path, *options: object) -> list[str]:
    """The command that measures m2jax; one JSON object on stdout."""
    command = [sys.executable, "-m", "m2jax", "bench", store, "--json", *options]
    return [str(part) for part in command]


def llama(python: Path, model: Path, *options: object) -> list[str]:
    return [str(p) for p in (python, SCRIPTS / "peer_llama.py", model, *options)]


def resident(folder: Path, args: argparse.Namespace, new: int) -> list[dict[str, Any]]:
    """Both fully in memory, in turn, so that the machine's moods meet both."""
    rows = []
    pairs = [("Q8_0", "0/100/0", 8), ("Q4_0", "0/0/100", 4)]
    for kind, mix, dense in pairs:
        for repeat in range(args.repeats):
            say(f"resident {kind}, {repeat + 1} of {args.repeats}")
            own = json.loads(
                run(
                    *bench(
                        folder / "store",
                        *("--mix", mix, "--dense", dense, "--draft", "none"),
                        *("-p", new * 4, "-n", new, "-r", 1, "--context", 8 * new),
                    )
                )
            )
            other = None
            if args.llama:
                options = ("-p", new * 4, "-n", new, "-r", 1)
                model = folder / f"{kind}.gguf"
                other = json.loads(run(*llama(args.llama, model, *options)))
            rows.append({"kind": kind, "mix": mix, "m2jax": own, "llama": other})
    return rows


def capped(
    folder: Path, args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]
) -> None:
    """All in a cgroup of 60 % of the 8-bit file. Minutes a row, so each is kept."""
    cap = int(CAP_SHARE * (folder / "Q8_0.gguf").stat().st_size)
    model, store = folder / "Q8_0.gguf", folder / "store"

    def own(mix: str, tokens: int, *options: object, dram: int, prompt: int = 0):
        # What Python, JAX and the C library take beside the plan.
        hbm = cap - (dram << 20) - (360 << 20)
        sizes = ("-p", prompt, "-n", tokens, "--context", 1024 if prompt else 64)
        budgets = ("--hbm", f"{hbm}B", "--dram", f"{dram}MiB")
        return bench(
            store, "--mix", mix, "--dense", 4, "-r", 1, *sizes, *budgets, *options
        )

    found: dict[str, Any]
    found = {"cap_bytes": cap, "machine": machine_facts(), "rows": []}
    once = ("-r", 1, "--warm-up", 0)
    commands = {
        LLAMA: llama(args.llama, model, "-p", 0, "-n", 6, *once),
        "m2jax 0/100/0": own("0/100/0", 16, "--draft", "none", dram=264),
        "m2jax 0/25/75": own("0/25/75", 24, "--draft", "none", dram=132),
        DRAFTING: own("0/25/75", 47, "--draft", "base", dram=132),
        "m2jax 0/0/100, all resident": own("0/0/100", 32, dram=1),
        LLAMA + PROMPT: llama(args.llama, model, "-p", 512, "-n", 0, *once),
        "m2jax 0/100/0" + PROMPT: own("0/100/0", 0, dram=264, prompt=512),
    }
    if args.accelerate:
        script = SCRIPTS / "peer_accelerate.py"
        commands[ACCELERATE] = [
            *(str(args.accelerate), str(script), str(folder / "hf"), "-n", "2"),
        ]
    for name, command in commands.items():
        # Minutes a token, so once is enough.
        repeats = 1 if "accelerate" in name else args.cap_repeats
        for repeat in range(repeats):
            say(f"capped {name}, {repeat + 1} of {repeats}")
            found["rows"].append({"name": name, **caged(command, cap)})
            keep(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama", type=Path, help="Python with llama-cpp-python")
    parser.add_argument("--accelerate", type=Path, help="Python with accelerate")
    parser.add_argument("--large", action="store_true", help="rows under a memory cap")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cap-repeats", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="tiny and quick, for CI")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--from-json", type=Path, help="only write the page again")
    parser.add_argument(
        "--capped-only", action="store_true", help="with --from-json: new capped rows"
    )
    args = parser.parse_args()
    if args.capped_only and not args.from_json:
        parser.error("--capped-only: want --from-json too")
    if (args.large or args.capped_only) and (reason := why_not()):
        parser.error(f"rows under a memory cap: {reason}")
    raw = args.out.parent / "bench" / f"{args.out.stem}.json"
    found: dict[str, Any] = {}

    def keep(rows: dict[str, Any]) -> None:
        found["capped"] = rows
        raw.write_text(json.dumps(found) + "\n")

    if args.from_json:
        found = json.loads(args.from_json.read_text())
        if args.capped_only:
            large = made(args.work, "large", LARGE, planes="q4,r4")
            capped(large, args, keep)
    else:
        args.work.mkdir(parents=True, exist_ok=True)
        if args.toy:
            args.repeats = 1
        found = {
            "machine": machine_facts(),
            "bandwidths": measure(args.work).__dict__,
            "small": TOY if args.toy else SMALL,
            "large": LARGE if args.large else None,
        }
        small = made(args.work, "small", found["small"], planes="q4,r4")
        found["resident"] = resident(small, args, new=8 if args.toy else 128)
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(found) + "\n")
        if args.large:
            large = made(args.work, "large", LARGE, planes="q4,r4")
            capped(large, args, keep)
    args.out.write_text(report(found, args.out.stem))
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
