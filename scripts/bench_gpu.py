"""m2jax on an accelerator: a LLaMA of 7B's shape, resident and under an HBM cap.

    .venv/bin/python scripts/bench_gpu.py WORK [--store STORE] [--out docs/gpu.md]

WORK holds what is made: 6.7 B random weights (13 GB, removed again) and their store
(9 GB). Random weights are right for speed, and say nothing of hit ratios and drafts:
both stand beside the figures. Kernels are timed many in one program, because a single
call mostly waits for its dispatch. Ten minutes, or less with --seconds: what is most
telling comes first. Every part that fails says so in the page and stops nothing. On a
CPU it only shows that it runs (--toy).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_peers import BEGUN, LARGE, SCRIPTS, TOY, run, say
from gpu_tables import report

from m2jax.cores import cores
from m2jax.kernels import choice, cuda, linear, sparse_swiglu
from m2jax.machine import machine_facts

ROOT = Path(__file__).parent.parent
PRODUCTS, COPIES = 12, 4
GROUP = 64
# Of --seconds.
BENCHES_SHARE = 0.8
CAP = "4GiB"
SMALL_CAP = "100KiB"


def store_of(work: Path, shape: dict[str, int]) -> Path:
    store, checkpoint = work / "store", work / "hf"
    if (store / "manifest.json").exists():
        return store
    options = [part for key, n in shape.items() for part in (f"--{key}", n)]
    if not (checkpoint / "config.json").exists():
        say("random weights")
        script = SCRIPTS / "make_checkpoint.py"
        shards = ("--shards", max(2, cores()), "--dtype", "float16")
        run(sys.executable, script, checkpoint, *options, *shards)
    say("store")
    command = ("-m", "m2jax", "convert", checkpoint, store, "--planes", "q4,r4")
    run(sys.executable, *command)
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    return store


def benches(store: Path, *, toy: bool) -> Iterator[dict[str, Any]]:
    """`m2jax bench` in turn, under the cap and all resident."""
    new, context = (8, 64) if toy else (64, 256)
    cap = ("--hbm", SMALL_CAP if toy else CAP)
    settings = [
        ("capped", "0/25/75", 4, (*cap, "--draft", "none")),
        ("capped", "0/25/75", 4, (*cap, "--draft", "base")),
        ("resident", "0/0/100", 4, ()),
        ("capped", "0/100/0", 4, (*cap, "--draft", "base")),
        ("resident", "0/25/75", 4, ()),
        ("resident", "0/100/0", 8, ()),
        ("capped", "0/100/0", 4, (*cap, "--draft", "none")),
    ]
    for kind, mix, dense, options in settings:
        say(f"{kind} {mix} {' '.join(options)}")
        command = [sys.executable, "-m", "m2jax", "bench", store, "--json"]
        command += ["--mix", mix, "--dense", dense, "--context", context]
        command += ["-r", 1 if toy else 3, "-p", 2 * new, "-n", new, *options]
        begun = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False
        )
        found: dict[str, Any] = {"kind": kind, "mix": mix, "dense": dense}
        found["options"] = list(options)
        found["wall_s"] = time.perf_counter() - begun
        if done.returncode:
            found["failed"] = done.stderr.strip().splitlines()[-1]
        else:
            found["m2jax"] = json.loads(done.stdout)
        yield found


def median_us(product: Callable, x: jax.Array, rows: Any, *arrays: Any) -> float:
    """Of one of PRODUCTS that wait for each other in one program, of COPIES of the
    rows in turn: none is in a cache from the time before."""
    copies = [jax.tree.map(jnp.copy, rows) for _ in range(COPIES)]

    def many(x: jax.Array, copies: list, *arrays: Any) -> jax.Array:
        for i in range(PRODUCTS):
            y = product(x, copies[i % COPIES], *arrays)
            x = x + 1e-30 * sum(part.mean() for part in jax.tree.leaves(y))
        return x

    compiled = jax.jit(many)
    times = []
    for _ in range(12):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(x, copies, *arrays))
        times.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(times[2:]) / PRODUCTS


def kernels(*, toy: bool) -> Iterator[dict[str, Any]]:
    """The products of one layer, by every implementation that may serve here."""
    neurons, width = (64, 256) if toy else (11008, 4096)
    some = neurons // 4
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 256, (neurons, 3 * width // 2), np.uint8))
    # Bits of bfloat16 between 1 and 2.
    numbers = rng.integers(0x3F80, 0x4000, (neurons, 3 * width), np.uint16)
    made = {"q4": codes, "w16": jnp.asarray(numbers)}
    sizes = rng.normal(size=(neurons, 3, width // GROUP))
    scales = jnp.asarray(sizes, jnp.float16)
    picked = jnp.asarray(rng.permutation(neurons)[:some], jnp.int32)
    names = sorted({"xla", choice.default_implementation(), *_others()})
    for tokens, (plane, records), name in (
        (tokens, item, name)
        for tokens in (1, 4, 16)
        for item in made.items()
        for name in names
    ):
        own = scales if plane == "q4" else None
        x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.float32)
        h = jnp.asarray(rng.normal(size=(tokens, neurons)), jnp.float32)
        kind = {"plane": plane, "implementation": name}
        for slots in (None, picked):
            count = neurons if slots is None else some
            read = records.nbytes * count // neurons

            def gate_up(x, records, own, slots, kind=kind):
                options = {"slots": slots, "ids": slots, **kind}
                return sparse_swiglu.project(x, records, own, **options)

            def down(h, records, own, slots, kind=kind):
                options = {"slots": slots, "ids": slots, **kind}
                return sparse_swiglu.accumulate(h, records, own, **options)

            arrays = (records, own, slots)
            about = {"tokens": tokens, "plane": plane, "name": name, "rows": count}
            yield timed("gate and up", gate_up, x, *arrays, read=2 * read // 3) | about
            yield timed("down", down, h[:, :count], *arrays, read=read // 3) | about
    packed = linear.Packed(codes[:, : width // 2], None, scales[:, 0])
    x = jnp.asarray(rng.normal(size=(1, width)), jnp.float32)
    for name in sorted(linear.IMPLEMENTATIONS.keys() & set(names)):

        def matrix(x, packed, name=name):
            return linear.linear(x, packed, implementation=name)

        about = {"tokens": 1, "plane": "q4", "name": name, "rows": neurons}
        yield timed("matrix", matrix, x, packed, read=packed.q4.nbytes) | about


def _others() -> list[str]:
    """Implementations that are not the default and yet run here."""
    if jax.default_backend() != "gpu":
        return []
    found = ["cuda_ffi"] if cuda.status().ready else []
    return [*found, "mosaic_gpu"] if sparse_swiglu.has_mosaic() else found


def timed(what: str, product: Callable, *arrays: Any, read: int) -> dict[str, Any]:
    found: dict[str, Any] = {"what": what, "bytes": read}
    try:
        found["us"] = median_us(product, *arrays)
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--store", type=Path, help="made before by this script")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no more then")
    parser.add_argument("--toy", action="store_true", help="tiny and quick, for CI")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--from-json", type=Path, help="only write the page again")
    args = parser.parse_args()
    raw = args.out.parent / "bench" / "gpu.json"
    if args.from_json:
        args.out.write_text(report(json.loads(args.from_json.read_text())))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    shape = TOY if args.toy else LARGE
    found: dict[str, Any] = {"machine": machine_facts(), "shape": shape}
    store = args.store or store_of(args.work, shape)
    # Its exit code says whether all is well; what it found is wanted in any case.
    doctor = [sys.executable, "-m", "m2jax", "doctor", "--json"]
    seen = subprocess.run(doctor, capture_output=True, text=True, check=False)
    found["checks"] = json.loads(seen.stdout)["checks"]
    raw.parent.mkdir(parents=True, exist_ok=True)
    for part, rows, share in (
        ("benches", benches(store, toy=args.toy), BENCHES_SHARE),
        ("kernels", kernels(toy=args.toy), 1),
    ):
        found[part] = []
        for row in rows:
            found[part].append(row)
            # What is measured is kept, whatever comes after.
            raw.write_text(json.dumps(found) + "\n")
            if time.monotonic() - BEGUN > args.seconds * share:
                found[f"{part}_cut"] = True
                break
    args.out.write_text(report(found))
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
