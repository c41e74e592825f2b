"""docs/simulation.md from what `simulate_runs` counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2jax.cli.tables import markdown
from m2jax.units import format_bytes

FINDINGS = Path(__file__).parent / "data" / "simulation-findings.md"
POLICIES = ("lru", "lfu", "random", "belady")
KEPT = {
    "whole_layers": "whole layers (the engine)",
    "pinned": "pinned layers, wanted chunks",
    "lru": "chunks, LRU",
    "lfu": "chunks, LFU",
    "belady": "chunks, Belady",
}


def report(found: dict[str, Any]) -> str:
    """The page: findings by hand, tables by replay."""
    here, models = found["machine"], found["models"]
    parts = [
        "# Caches by simulation\n",
        f"Made by `scripts/simulate_dram.py` at commit {here['commit']} "
        f"({here['cpu']}, {here['cores']} cores, {here['backend']}, jax "
        f"{here['versions']['jax']}); raw figures in `docs/bench/simulation.json`. "
        f"Wanted sets of {found['tokens']} tokens of Python, stories and English prose "
        "(`scripts/data/text`), each decoded after those before it, replayed from cold "
        "by the engine's own `Residency`. Bytes are counted, nothing is timed. The "
        "bundled 8 M model (SwiGLU) and its ReLU form: small, briefly trained models: "
        "directions, not laws.\n",
        FINDINGS.read_text() if FINDINGS.exists() else "",
        "## Policies of the HBM cache\n",
        "Hit ratio of records that are wanted by id (planes r4 and w16). Slots: of "
        "every pool, as a multiple of what a token wants; at 1 LRU is ATU, and there "
        "is nothing to choose. Last column: what crosses the link a token under LRU, "
        "and under Belady, which no policy beats.\n",
    ]
    parts += [
        f"{name}:\n\n{policy_table(model['policies'])}\n"
        for name, model in models.items()
    ]
    parts += [
        "## DRAM by layer and by chunk\n",
        f"KiB read from SSD a token, at DRAM of {_budgets(models)} % of the bytes of "
        "the planes that pass. Plane q4 is whole in HBM; r4 and w16 have pools "
        "under LRU, of a multiple of what a token wants; DRAM is asked for what they "
        "lack. DRAM is what is kept from one layer to the next; what a layer asks for, "
        "and reads in flight, come on top in every column. From cold: what is pinned "
        "is read once, and counted. Whole layers: the first ones pinned, the others "
        "read whole, whatever is asked for. Wanted chunks: of the others only chunks "
        "of so many neurons that hold a record asked for. LRU, LFU, Belady: chunks of "
        "all layers compete for all of DRAM, each plane for its share.\n",
    ]
    parts += [
        f"{name}:\n\n{dram_table(model['dram'])}\n" for name, model in models.items()
    ]
    parts += [
        "Share of a layer's chunks that hold a record wanted by any token of a sweep "
        "(without hits in HBM: a sweep streams whole planes):\n",
    ]
    parts += [
        f"{name}:\n\n{sweep_table(model['sweeps'])}\n" for name, model in models.items()
    ]
    parts += [
        "What a chunk is in stores of published shapes (bfloat16):\n",
        chunk_table(found["chunks"]) + "\n",
        "## Choice among equals\n",
        "What would be loaded if, of the last ranks of the wanted set and as many "
        "after them, neurons that have a slot were taken first. The wanted set: the "
        "first 25 % of ranks recorded at mix 0/35/65; LRU. Leeway: ranks on either "
        "side of the cut, as a share of the wanted set. Swapped: of the wanted set, "
        "neurons that rank would not have taken.\n",
    ]
    parts += [
        f"{name}:\n\n{choice_table(model['choice'])}\n"
        for name, model in models.items()
    ]
    return "\n".join(part for part in parts if part)


def _budgets(models: dict[str, Any]) -> str:
    rows = next(iter(models.values()))["dram"]
    return " / ".join(
        f"{100 * budget:.0f}" for budget in sorted({row["budget"] for row in rows})
    )


def policy_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(
        ["mix", "slots", *POLICIES, "link, LRU / Belady"],
        [
            [
                row["mix"],
                f"{row['held']:g}",
                *(f"{row[policy]['hit_ratio']:.3f}" for policy in POLICIES),
                " / ".join(
                    format_bytes(round(row[policy]["link_bytes_per_token"]))
                    for policy in ("lru", "belady")
                ),
            ]
            for row in rows
        ],
    )


def dram_table(rows: Sequence[dict[str, Any]]) -> str:
    by: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        by.setdefault((row["mix"], row["held"], row["chunk"]), []).append(row)
    return markdown(
        ["mix", "slots", "neurons a chunk", "chunks asked for", *KEPT.values()],
        [
            [
                mix,
                f"{held:g}" if held else "none",
                str(chunk) if held else "any",
                f"{100 * found[0]['asked_share']:.0f} %",
                *(
                    " / ".join(
                        f"{row['ssd_bytes_per_token'][kind] / 1024:,.0f}"
                        for row in found
                    )
                    for kind in KEPT
                ),
            ]
            for (mix, held, chunk), found in by.items()
        ],
    )


def sweep_table(rows: Sequence[dict[str, Any]]) -> str:
    widths = sorted({int(width) for row in rows for width in row["share"]})
    shares = [{int(w): share for w, share in row["share"].items()} for row in rows]
    return markdown(
        ["mix", "neurons a chunk", *(f"{width} tokens" for width in widths)],
        [
            [row["mix"], str(row["chunk"]), *(f"{share[w]:.2f}" for w in widths)]
            for row, share in zip(rows, shares)
        ],
    )


def chunk_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(
        ["model", "neurons a chunk", "r4: record, chunk", "w16: record, chunk"],
        [
            [
                row["model"],
                str(row["chunk_neurons"]),
                *(
                    f"{format_bytes(row[plane]['record_bytes'])}, "
                    f"{format_bytes(row[plane]['chunk_bytes'])}"
                    for plane in ("r4", "w16")
                ),
            ]
            for row in rows
        ],
    )


def choice_table(rows: Sequence[dict[str, Any]]) -> str:
    base = {row["held"]: row["load_share"] for row in rows if not row["leeway"]}
    return markdown(
        ["slots", "leeway", "loads, of the wanted set", "of those without", "swapped"],
        [
            [
                f"{row['held']:g}",
                f"{100 * row['leeway']:.0f} %",
                f"{row['load_share']:.3f}",
                f"{row['load_share'] / base[row['held']]:.2f}",
                f"{100 * row['swapped_share']:.1f} %",
            ]
            for row in rows
        ],
    )
