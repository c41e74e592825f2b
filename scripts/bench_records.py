"""DRAM by layer and by record, in truth; docs/dram.md.

    .venv/bin/python scripts/bench_records.py STORE [--out docs/dram.md]

Two engines of the same budgets on a store's own disk, without drafts, in turn: one
reads whole layers ahead of the computation, the other single records when a layer is
ranked. A store of some GB is wanted, see `bench_ssd.py`: a small model's records are a
fraction of a disk block.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import m2jax
from m2jax.bundled import bundled_store
from m2jax.cli.tables import markdown
from m2jax.engine import Engine
from m2jax.machine import machine_facts
from m2jax.plan import LAYERS, RECORDS
from m2jax.preparing import prepare
from m2jax.store import Store, open_store
from m2jax.units import format_bytes

ROOT = Path(__file__).parent.parent
FINDINGS = Path(__file__).parent / "data" / "dram-findings.md"
BEGUN = time.monotonic()
MIXES = ("0/25/75", "0/10/90")
# Of the bytes of the planes that pass: what DRAM holds beside the ring.
SHARES = (0.2, 0.6)
# As many buffers as DRAM by records has, on a CPU.
RING = 3
PROMPT_TOKENS, CONTEXT = 32, 256


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGUN:6.0f} s  {line}", file=sys.stderr, flush=True)


def engine_of(store: Store, mix: str, share: float, reads: str, slow: str | None):
    """Plane q4 and the dense part in HBM; in DRAM a ring, and a share of the rest."""
    layer = store.layout.plane_bytes("r4")
    rest = int(share * store.config.num_layers * layer)
    alone = prepare(store, mix="0/0/100", draft="none", dense=4, context=CONTEXT)
    return m2jax.load(
        store.path,
        hbm=alone.plan.footprint.hbm,
        dram=RING * layer + rest,
        mix=mix,
        dense=4,
        draft="none",
        context=CONTEXT,
        distance=RING - 2,
        reads=reads,
        emulate_ssd=slow,
    )


def once(engine: Engine, tokens: int, seed: int) -> dict[str, float]:
    """Of one text's tokens after the first; each seed has its own prompt and text."""
    generator = np.random.default_rng(seed)
    prompt = generator.integers(3, engine.config.vocab_size, PROMPT_TOKENS)
    done = engine.generate(
        prompt.tolist(),
        max_new_tokens=tokens,
        temperature=1,
        seed=seed,
        ignore_eos=True,
    )
    decode, steps = done.stats.decode, done.stats.decode_steps
    step_s = done.stats.timings.tpot_s
    assert step_s is not None
    return {
        "token_s": step_s,
        "waited_s": decode.dram_waited_s / steps,
        "ssd_bytes": decode.ssd_read_bytes / steps,
        "hits": decode.dram_hits / max(1, decode.dram_accesses),
    }


def measure(
    store: Store,
    *,
    mixes: Sequence[str],
    shares: Sequence[float],
    tokens: int,
    repeats: int,
    slow: str | None,
) -> list[dict[str, Any]]:
    """Rows: mix, share, reads, and `once` of each run, of the same texts both ways."""
    rows = []
    for mix in mixes:
        for share in shares:
            say(f"{mix}, DRAM of {share:.0%} beside the ring, {slow or 'the disk'}")
            engines = {
                reads: engine_of(store, mix, share, reads, slow)
                for reads in (LAYERS, RECORDS)
            }
            runs: dict[str, list[dict[str, float]]] = {reads: [] for reads in engines}
            # The first run compiles, and fills what DRAM keeps.
            for repeat in range(1 + repeats):
                for reads, engine in engines.items():
                    run = once(engine, tokens, seed=repeat)
                    if repeat:
                        runs[reads].append(run)
            for reads, engine in engines.items():
                slots = engine.plan.placement.dram_slots
                rows.append(
                    {
                        "mix": mix,
                        "share": share,
                        "reads": reads,
                        "how": engine.ssd_reads,
                        "wanted": engine.specs[0].wanted["r4"],
                        "slots": max(slots["r4"]) if slots else 0,
                        "runs": runs[reads],
                    }
                )
                engine.close()
    return rows


def report(found: dict[str, Any], page: str) -> str:
    here, model = found["machine"], found["model"]
    jax = here["versions"]["jax"]
    parts = [
        "# DRAM by layer and by record\n",
        f"Made by `scripts/bench_records.py STORE` at commit {here['commit']} "
        f"({here['cpu']}, {here['cores']} cores, jax {jax}); raw figures in "
        f"`docs/bench/{page}.json`. A store of {model['layers']} layers of hidden size "
        f"{model['hidden']}, {model['neurons']} neurons each, random weights: how "
        "often a wanted neuron was wanted before is that of no trained model, so hits "
        "are given. No drafts, temperature 1, dense part at 4 bits, it and plane q4 in "
        f"HBM; a CPU, rows in place. Both ways in turn, {found['repeats']} runs of "
        f"{found['tokens']} tokens each after one that is not timed, medians.\n",
        FINDINGS.read_text() if FINDINGS.exists() and page == "dram" else "",
    ]
    for name, rows in found["rows"].items():
        parts += [f"## {name}\n", table(rows) + "\n"]
    return "\n".join(part for part in parts if part)


def table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for layers, records in zip(rows[::2], rows[1::2]):
        of = {
            name: [
                statistics.median(run[name] for run in row["runs"])
                for row in (layers, records)
            ]
            for name in ("token_s", "waited_s", "ssd_bytes", "hits")
        }
        cells.append(
            [
                layers["mix"],
                f"{100 * layers['share']:.0f} %",
                f"{records['slots'] / records['wanted']:.2f}",
                f"{of['hits'][1]:.2f}",
                *(format_bytes(round(nbytes)) for nbytes in of["ssd_bytes"]),
                *(f"{1e3 * waited_s:.0f}" for waited_s in of["waited_s"]),
                *(f"{1 / token_s:.2f}" for token_s in of["token_s"]),
                f"{of['token_s'][0] / of['token_s'][1]:.2f}",
            ]
        )
    head = ["mix", "DRAM", "slots, wanted = 1", "hits", "SSD a token: layers"]
    head += ["records", "waits, ms: layers", "records", "tokens/s: layers", "records"]
    return markdown([*head, "records / layers"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--toy", action="store_true", help="the bundled model, once")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dram.md")
    parser.add_argument("--from-json", type=Path, help="only write the page again")
    args = parser.parse_args()
    if args.from_json:
        found = json.loads(args.from_json.read_text())
    elif args.toy or args.store:
        store = open_store(bundled_store() if args.toy else args.store)
        sizes: dict[str, Any] = {"repeats": args.repeats, "tokens": args.tokens}
        mixes, shares = MIXES, SHARES
        if args.toy:
            sizes, mixes, shares = {"repeats": 1, "tokens": 4}, MIXES[:1], SHARES[1:]
        found = {
            "machine": machine_facts(),
            "model": {
                "layers": store.config.num_layers,
                "hidden": store.config.hidden_size,
                "neurons": store.config.intermediate_size,
            },
            **sizes,
            "rows": {
                "On this disk": measure(
                    store, mixes=mixes, shares=shares, slow=None, **sizes
                ),
                "On a disk of 500 MB/s for reads of any size": measure(
                    store, mixes=mixes[:1], shares=shares[-1:], slow="500MB", **sizes
                ),
            },
        }
        raw = args.out.parent / "bench" / f"{args.out.stem}.json"
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(found) + "\n")
    else:
        parser.error("want STORE, --toy or --from-json")
    args.out.write_text(report(found, args.out.stem))
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
