"""docs/gpu.md from what `bench_gpu.py` measured."""

from pathlib import Path
from typing import Any

from m2jax.cli.tables import markdown
from m2jax.units import format_bytes

FINDINGS = Path(__file__).parent / "data" / "gpu-findings.md"
HIT_RATIOS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
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
        *(_curve(row) for row in found["benches"] if _loads(row)),
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
    head = ["what", "pp", "tg", "bound by", "of its rate", "link a token"]
    head.append("hits, with q4's")
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
                ", ".join(filter(None, (roof.get("bound"), right))),
                f"{roof['percent']:.0f} %" if roof else "",
                format_bytes(round(tg["bytes_per_token"]["dram_to_hbm"])),
                "" if hits is None else f"{hits:.0%}",
            ]
        )
    return markdown(head, lines)


def _loads(row: dict[str, Any]) -> bool:
    """Whether the text, without drafts, loaded records over a link of known rate."""
    if "m2jax" not in row or row["m2jax"]["results"][1]["drafts"]["drafted"]:
        return False
    tg = row["m2jax"]["results"][1]
    moved, hits = tg["bytes_per_token"]["dram_to_hbm"], tg["hit_ratio"]["hbm"]
    neurons = row["m2jax"]["settings"]["neurons"]
    pooled = neurons["k16"] + neurons["k8"] < neurons["all"]
    return bool(tg["roofline"] and moved and hits is not None and pooled)


def _curve(row: dict[str, Any]) -> str:
    """Tokens a second over the hit ratio of records wanted above 4 bits.

    seconds a token = rest + bytes if nothing hits (1 - hit ratio) / rate of the link

    where rest is what the measured text took beside its own bytes: nothing is computed
    while they come.
    """
    settings, tg = row["m2jax"]["settings"], row["m2jax"]["results"][1]
    neurons, moved = settings["neurons"], tg["bytes_per_token"]["dram_to_hbm"]
    wanted = neurons["k16"] + neurons["k8"]
    # Plane q4 is looked up whole by every token, and always there.
    looked_up = wanted + (neurons["all"] if settings["scorer"] == "base" else 0)
    missed = (1 - tg["hit_ratio"]["hbm"]) * looked_up
    most, rate = moved * wanted / missed, tg["roofline"]["bytes_per_s"]["link"]
    rest_s = 1 / tg["tokens_per_s_mean"] - moved / rate
    cells = []
    for ratio in HIT_RATIOS:
        bytes_ = (1 - ratio) * most
        token_s = rest_s + bytes_ / rate
        cells.append(
            [f"{ratio:.0%}", format_bytes(round(bytes_)), f"{1 / token_s:.0f}"]
        )
    return (
        f"## Over the hit ratio: {_name(row)}\n\n"
        f"Measured: {1 - missed / wanted:.0%} of the records wanted above 4 bits were "
        f"in HBM already, {tg['tokens_per_s_mean']:.1f} tokens/s. Computed from that "
        f"for other ratios: {1e3 * rest_s:.2f} ms a token, and "
        f"{format_bytes(round(most))} times the share that misses at "
        f"{rate / 1e9:.1f} GB/s, one after the other.\n\n"
        + markdown(["hits", "link a token", "tokens/s"], cells)
        + "\n"
    )


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
