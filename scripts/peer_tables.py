"""A page of docs/ from what `bench_peers.py` measured."""

import statistics
from pathlib import Path
from typing import Any

from m2jax.cli.tables import markdown
from m2jax.predict import expected_tokens
from m2jax.units import format_bytes

# Names of rows under a cap.
LLAMA, ACCELERATE = "llama.cpp Q8_0, mmap", "transformers + accelerate, fp16"
DRAFTING, PROMPT = "m2jax 0/25/75, drafts", ", prompt of 512"
PARTS = ("drafted", "accepted")
SHARES, LENGTHS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98), range(1, 64)
FINDINGS = Path(__file__).parent / "data"
INSTALL = "\n".join(
    (
        "```bash",
        "python3 -m venv peers/llama peers/hf",
        'CMAKE_ARGS="-DGGML_NATIVE=ON" peers/llama/bin/pip install '
        "llama-cpp-python==0.3.36",
        "peers/hf/bin/pip install torch==2.13.0 transformers==4.57.6 "
        "accelerate==1.15.0 safetensors",
        "```",
        "Where the machine names AMX and cannot run it, llama.cpp crashes: give it "
        "GGML_NATIVE=OFF and each of GGML_AVX2, GGML_AVX512, GGML_AVX512_VNNI, .. =ON, "
        "as here.",
        "",
    )
)


def report(found: dict[str, Any], page: str) -> str:
    """The page of that name, with what was found of it if someone wrote that down."""
    here, findings = found["machine"], FINDINGS / f"{page}-findings.md"
    parts = [
        "# Speed\n",
        "Made by `scripts/bench_peers.py WORK --llama .. --accelerate .. --large` at "
        f"commit {here['commit']} ({here['cpu']}, {here['cores']} cores, "
        f"{here['backend']}, jax {here['versions']['jax']}); raw runs in "
        f"`docs/bench/{page}.json`. The machine is shared and noisy: read ratios. "
        "Random weights; only the row with drafts hangs on their values.\n",
        findings.read_text() if findings.exists() else "",
        "## What the machine moves\n",
        machine_table(found["bandwidths"]) + "\n",
        "## Resident\n",
        f"{_shape(found['small'])}. Median of the runs, in turn; text of 128 tokens "
        "(tg) and prompt of 512 (pp), tokens/s. m2jax: the mix named, attention and "
        "embeddings at the same bits.\n",
        resident_table(found["resident"]) + "\n",
    ]
    if "capped" in found:
        commit = found["capped"].get("machine", here)["commit"]
        parts += [
            f"## Under a memory cap\n\nMeasured at commit {commit}.",
            f"{_shape(found['large'])}; a cgroup of "
            f"{format_bytes(found['capped']['cap_bytes'])}, 60 % of the 8-bit file, "
            "everything counted, page cache cold. m2jax: neurons at the mix named, "
            "attention and embeddings at 4 bits; plane q4 is resident where the mix is "
            "0/25/75. Text (a few tokens), and where named a prompt of 512.\n",
            capped_table(found["capped"]) + "\n",
            drafts_table(found["capped"]),
        ]
    parts += ["## The peers\n", INSTALL]
    return "\n".join(part for part in parts if part)


def _shape(shape: dict[str, int]) -> str:
    return (
        f"{shape['layers']} layers, hidden size {shape['hidden']}, "
        f"{shape['ffn']} neurons a layer"
    )


def machine_table(rates: dict[str, Any]) -> str:
    rows = [
        ["memory, read by all cores", f"{rates['memory'] / 1e9:.1f}"],
        *(
            [f"copy of {format_bytes(int(size))}", f"{rate / 1e9:.1f}"]
            for size, rate in rates["link"].items()
        ),
        *(
            [
                f"SSD, {'direct' if way['direct'] else 'buffered, cold'}, "
                f"{format_bytes(way['bytes'])} x {way['in_flight']}",
                f"{way['bytes_per_s'] / 1e9:.2f}",
            ]
            for way in rates["ssd"]
        ),
    ]
    return markdown(["what", "GB/s"], rows)


def resident_table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        runs = [row for row in rows if row["kind"] == kind]
        own = {
            test: statistics.median(
                result["tokens_per_s_mean"]
                for run in runs
                for result in run["m2jax"]["results"]
                if result["test"].startswith(test)
            )
            for test in ("tg", "pp")
        }
        percent = statistics.median(
            result["roofline"]["percent"]
            for run in runs
            for result in run["m2jax"]["results"]
            if result["roofline"] and result["test"].startswith("tg")
        )
        cell = [runs[0]["mix"], f"{own['tg']:.1f}", f"{percent:.0f} %"]
        if runs[0]["llama"]:
            tg, pp = (
                statistics.median(x for run in runs for x in run["llama"][name])
                for name in ("new_tokens_per_s", "prompt_tokens_per_s")
            )
            cell += [kind, f"{tg:.1f}", f"{own['tg'] / tg:.2f}"]
            cell += [f"{own['pp']:.0f}", f"{pp:.0f}", f"{own['pp'] / pp:.2f}"]
        else:
            cell += [kind, "", "", f"{own['pp']:.0f}", "", ""]
        cells.append(cell)
    return markdown(
        [
            "m2jax",
            "tg",
            "of memory rate",
            "llama.cpp",
            "tg",
            "ratio",
            "m2jax pp",
            "llama.cpp pp",
            "ratio",
        ],
        cells,
    )


def capped_table(found: dict[str, Any]) -> str:
    rates: dict[str, list[float]] = {}
    for row in found["rows"]:
        rates.setdefault(row["name"], [])
        if row["found"]:
            rates[row["name"]] += _rate(row["found"])
    middle = {name: statistics.median(rate) for name, rate in rates.items() if rate}

    def beside(name: str, other: str) -> str:
        there = name.startswith("m2jax") and {name, other} <= middle.keys()
        return f"{middle[name] / middle[other]:.1f}" if there else ""

    cells = []
    for name in rates:
        shown = f"{middle[name]:.3f}" if name in middle else "does not run at this cap"
        # Of accelerate only texts were measured.
        others = (LLAMA + PROMPT, "") if name.endswith(PROMPT) else (LLAMA, ACCELERATE)
        cells.append([name, shown, *(beside(name, other) for other in others)])
    return markdown(["what", "tokens/s", "of llama.cpp's", "of accelerate's"], cells)


def drafts_table(found: dict[str, Any]) -> str:
    """What the drafts of the run cost, and what they would give if more or fewer of
    them were right."""
    runs = [
        row["found"]["results"][-1]["drafts"]
        for row in found["rows"]
        if row["name"] == DRAFTING and row["found"]
    ]
    if not runs:
        return ""
    step, sweep = (
        statistics.median(run[part] for run in runs) for part in ("step_s", "sweep_s")
    )
    drafted, accepted = (sum(run[part] for run in runs) for part in PARTS)
    cells = []
    for share in SHARES:
        rates = {k: expected_tokens(share, k) / (k * step + sweep) for k in LENGTHS}
        best = max(LENGTHS, key=lambda k: rates[k])
        cells.append([f"{100 * share:.0f} %", str(best), f"{rates[best]:.2f}"])
    return (
        f"In the runs with drafts {accepted} of {drafted} drafted tokens were right, a "
        f"drafted token took {step:.3f} s, a sweep {sweep:.2f} s. With other shares "
        "right, by these times:\n\n"
        + markdown(["right", "drafted a sweep", "tokens/s"], cells)
        + "\n"
    )


def _rate(found: dict[str, Any]) -> list[float]:
    if "results" in found:
        return [found["results"][-1]["tokens_per_s_mean"]]
    return found["new_tokens_per_s"] or found["prompt_tokens_per_s"]
