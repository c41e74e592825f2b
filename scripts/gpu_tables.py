"""docs/gpu.md from what `bench_gpu.py` measured."""

from pathlib import Path
from typing import Any

from m2jax.cli.tables import markdown
from m2jax.units import format_bytes

FINDINGS = Path(__file__).parent / "data" / "gpu-findings.md"
LINKS = ("host to device", "device memory", "memory, all cores", "kernels", "SSD read")


def report(found: dict[str, Any]) -> str:
    here = found["machine"]
    device = next(c["value"] for c in found["checks"] if c["name"] == "backend")
    parts = [
        "# On an accelerator\n",
        f"Made by `scripts/bench_gpu.py WORK` at commit {here['commit']} ({device}; "
        f"{here['cpu']}, {here['cores']} cores; jax {here['versions']['jax']}); raw "
        "runs in `docs/bench/gpu.json`.\n",
        FINDINGS.read_text() if FINDINGS.exists() else "",
        "## What the machine moves\n",
        markdown(
            ["what", "found"],
            [
                [check["name"], check["value"]]
                for check in found["checks"]
                if check["name"].startswith(LINKS)
            ],
        )
        + "\n",
        "## A model\n",
        f"{_shape(found['shape'])}. m2jax at the mix named, attention and embeddings "
        "at the bits named; tokens a second of a prompt (pp) and a text (tg), means.\n",
        _models(found["benches"]) + "\n",
        "Milliseconds a token of one more run of the text:\n",
        _times(found["benches"]) + "\n",
    ]
    if "kernels" in found:
        parts += [
            "## Kernels\n",
            "Products of one layer, many in one program; microseconds each, and GB/s "
            "of the records that they read.\n",
            _kernels(found["kernels"]) + "\n",
        ]
    if any(found.get(f"{part}_cut") for part in ("benches", "kernels")):
        parts.append("The time was limited (--seconds): not all settings were run.\n")
    return "\n".join(part for part in parts if part)


def _shape(shape: dict[str, int]) -> str:
    return (
        f"{shape['layers']} layers of {shape['hidden']} hidden, {shape['ffn']} "
        f"neurons, {shape['heads']} heads, random weights"
    )


def _name(row: dict[str, Any]) -> str:
    options = " ".join(row["options"])
    return f"{row['mix']}, dense {row['dense']}{', ' if options else ''}{options}"


def _models(rows: list[dict[str, Any]]) -> str:
    head = ["what", "pp", "tg", "bound by", "of its rate", "link a token", "hits"]
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([_name(row), row["failed"], *[""] * (len(head) - 2)])
            continue
        pp, tg = row["m2jax"]["results"]
        roof, drafts = tg["roofline"] or {}, tg["drafts"]
        hits = tg["hit_ratio"]["hbm"]
        right = ""
        if drafts["drafted"]:
            right = f"{drafts['accepted'] / drafts['drafted']:.0%} of drafts right"
        lines.append(
            [
                _name(row),
                f"{pp['tokens_per_s_mean']:.0f}",
                f"{tg['tokens_per_s_mean']:.1f}",
                roof.get("bound", right),
                f"{roof['percent']:.0f} %" if roof else "",
                format_bytes(round(tg["bytes_per_token"]["dram_to_hbm"])),
                "" if hits is None else f"{hits:.0%}",
            ]
        )
    return markdown(head, lines)


def _times(rows: list[dict[str, Any]]) -> str:
    done = [row for row in rows if "m2jax" in row]
    spent = [row["m2jax"]["results"][1]["milliseconds_per_token"] for row in done]
    names = sorted({name for times in spent for name in times})
    return markdown(
        ["what", *names],
        [
            [_name(row), *(f"{times.get(name, 0):.2f}" for name in names)]
            for row, times in zip(done, spent)
        ],
    )


def _kernels(rows: list[dict[str, Any]]) -> str:
    names = sorted({row["name"] for row in rows})
    found: dict[tuple, dict[str, str]] = {}
    for row in rows:
        key = (row["what"], row["plane"], row["rows"], row["tokens"])
        value = row.get("failed") or (
            f"{row['us']:.0f} ({row['bytes'] / row['us'] / 1e3:.0f})"
        )
        found.setdefault(key, {})[row["name"]] = value
    return markdown(
        ["what", "plane", "records", "tokens", *names],
        [
            [*map(str, key), *(cells.get(name, "") for name in names)]
            for key, cells in found.items()
        ],
    )
