"""docs/ssd.md from what `bench_ssd.py` measured."""

import statistics
from pathlib import Path
from typing import Any

from m2jax.cli.tables import markdown
from m2jax.units import format_bytes

FINDINGS = Path(__file__).parent / "data"


def report(found: dict[str, Any], page: str) -> str:
    """The page of that name, with what was found of it if someone wrote that down."""
    here, model, some = found["machine"], found["model"], found["scattered"]
    findings = FINDINGS / f"{page}-findings.md"
    whole_s = statistics.median(some["whole_s"])
    parts = [
        "# Reads from SSD\n",
        f"Made by `scripts/bench_ssd.py STORE` at commit {here['commit']} "
        f"({here['cpu']}, {here['cores']} cores, filesystem {found['filesystem']}); "
        f"raw figures in `docs/bench/{page}.json`. A store of {model['layers']} layers "
        f"of hidden size {model['hidden']}, {model['neurons']} neurons each. Medians "
        "of runs in turn, the page cache cold; what the disk or its host keeps in "
        "memory of its own is not seen here. The disk is shared: read ratios.\n",
        findings.read_text() if findings.exists() else "",
        "## Whole layers\n",
        "Raw: eight direct reads at once of a plane's chunk files, each whole, and "
        "nothing else. Direct: layers as the engine reads them, two at once. "
        "TensorStore: the same through the page cache, which serves where direct "
        "reads are refused.\n",
        whole_table(found["whole_layers"]) + "\n",
        "## Some of the records\n",
        f"Plane {some['plane']}, records of {format_bytes(some['record_bytes'])}, "
        "wanted at random, by themselves or in fours that lie side by side. Direct "
        "reads take the blocks of 4 KiB that hold them; reads that touch are made as "
        "one. One layer at a time by 1, 8 or 32 threads (in Python: what a thread "
        "does between two reads, others wait for); files are open already. Read: what "
        "the kernel fetched, with read-ahead where it went through the page cache. "
        "Cells: time, where that of the whole plane "
        f"({format_bytes(some['plane_bytes'])} in {1e3 * whole_s:.1f} ms, "
        f"{some['plane_bytes'] / whole_s / 1e9:.2f} GB/s) is 1, and GB/s of wanted "
        "bytes.\n",
        scattered_table(some) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def whole_table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        rate = {k: statistics.median(v) for k, v in row["bytes_per_s"].items()}
        cells.append(
            [
                row["plane"],
                format_bytes(row["chunk_bytes"]),
                f"{rate['raw'] / 1e9:.2f}",
                *(
                    text
                    for way in ("direct", "tensorstore")
                    for text in (
                        f"{rate[way] / 1e9:.2f}",
                        f"{100 * rate[way] / rate['raw']:.0f} %",
                    )
                ),
            ]
        )
    head = ["plane", "chunk", "raw, GB/s", "direct", "of raw", "TensorStore", "of raw"]
    return markdown(head, cells)


def scattered_table(some: dict[str, Any]) -> str:
    whole_s, whole_bytes = statistics.median(some["whole_s"]), some["plane_bytes"]
    ways = list(dict.fromkeys((row["way"], row["depth"]) for row in some["rows"]))
    by: dict[tuple, dict[tuple, dict[str, Any]]] = {}
    for row in some["rows"]:
        own = by.setdefault((row["share"], row["group"]), {})
        own[row["way"], row["depth"]] = row

    def cell(row: dict[str, Any]) -> str:
        spent_s = statistics.median(row["seconds"])
        rate = statistics.median(row["useful_bytes"]) / spent_s / 1e9
        return f"{spent_s / whole_s:.2f} ({rate:.2f})"

    def read(found: dict[tuple, dict[str, Any]], way: str) -> str:
        rows = [row for (name, _), row in found.items() if name == way]
        # Nothing is counted by some filesystems.
        counted = [n for row in rows for n in row["fetched_bytes"] if n]
        asked = [n for row in rows for n in row["asked_bytes"]]
        return f"{100 * statistics.median(counted or asked) / whole_bytes:.0f} %"

    cells = [
        [
            f"{100 * share:.0f} %",
            str(group),
            f"{statistics.median(found[ways[0]]['reads']):.0f}",
            read(found, "direct"),
            read(found, "buffered"),
            *(cell(found[way]) for way in ways),
        ]
        for (share, group), found in by.items()
    ]
    head = ["wanted", "in groups of", "reads a layer", "read, direct", "read, buffered"]
    return markdown(head + [f"{way} x {depth}" for way, depth in ways], cells)
