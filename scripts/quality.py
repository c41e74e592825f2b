"""Measures what precision costs in quality, and writes docs/quality.md.

    .venv/bin/python scripts/quality.py [--toy] [--out docs/quality.md]

Models: the bundled one (SwiGLU) and its ReLU form, made from a small difference of
weights by `relu_model.py`. The raw figures go to docs/bench/quality.json beside.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import quality_runs as runs
import quality_tables as tables
from quality_model import Model, Sizes
from relu_model import write_relu_model

from m2jax.bundled import SOURCE
from m2jax.cli.compilation import keep_compiled
from m2jax.convert import convert

ROOT = Path(__file__).parent.parent
FINDINGS = Path(__file__).parent / "data" / "quality-findings.md"


BEGUN = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGUN:6.0f} s  {line}", file=sys.stderr, flush=True)


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Every figure of the report."""
    write_relu_model(folder / "relu")
    sources = {"SwiGLU": SOURCE, "ReLU": folder / "relu"}
    found: dict[str, Any] = {}
    for name, source in sources.items():
        say(f"== {name}")
        store = convert(source, folder / f"{name}.store")
        model = Model(store, sizes)
        rows = runs.quality_rows(model, say)
        found[name] = {
            "quality": rows,
            "equal": runs.equal_bytes(model, rows),
            "objectives": runs.objectives(model, rows, say),
            "quantisers": runs.quantisers(model, say) if name == "SwiGLU" else [],
        }
        found[name]["calibration"] = runs.scorers(store, sizes, say)
        found[name]["ranked"] = runs.ranked_rows(model, say)
        model.engine.close()
    return found


def machine() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":")[1].strip()
    except OSError:
        pass
    return {
        "commit": commit,
        "cpu": cpu,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def report(found: dict[str, Any], facts: dict[str, Any], picture: str) -> str:
    """The page: findings by hand, tables by measurement."""
    models = found["models"]
    sections = [
        "# What precision costs\n",
        f"Made by `scripts/quality.py` in {facts['minutes']:.0f} minutes at commit "
        f"{facts['commit']} ({facts['cpu']}, {facts['backend']}, jax {facts['jax']}); "
        f"raw figures in `docs/bench/quality.json`. Two 8 M models: the bundled SwiGLU "
        "one and its ReLU form (`docs/training.md`). Judged on held-out Python and "
        "stories, 24 windows of 256 tokens each; searched and trained on other text "
        "(`scripts/data/text`). KL is that of the 16-bit model to the one measured, in "
        "thousandths of a nat a token, with the standard error over tokens; top-1: how "
        "often both find the same token likeliest. Bits: average of a feed-forward "
        "weight, scales apart. KiB a token: records of r4 and w16 that move if none "
        "is hit and q4 is resident. Small, briefly trained models: directions, not "
        "laws.\n",
        FINDINGS.read_text() if FINDINGS.exists() else "",
        f"![KL against bytes a token]({picture})\n",
    ]
    for name, model in models.items():
        sections += [
            f"## (a) Quality against bits: {name}\n",
            tables.quality_table(model["quality"]) + "\n",
        ]
    sections += ["## (b) Scorers: recall of the true top neurons\n"]
    sections += [
        "Mean over layers, the worst layer in brackets. The truth is |h| times the "
        "norm of the down column at 16 bits. `base` is the same by gate and up of "
        "plane q4 (by which it leaves neurons out), `gate` by its gate alone; ahead: "
        "scored from the input of 1 or 2 layers before.\n",
        tables.recall_table(models) + "\n",
    ]
    for name, model in models.items():
        sections += [
            f"Top 25 % by layer, {name}:\n",
            tables.recall_by_layer(model["calibration"]) + "\n",
        ]
    first = next(iter(models.values()))["calibration"]
    sections += [
        *(
            f"The same mixes by each scorer, {name} (magnitude: one score for all, as "
            "in the paper, where base gives bits by expected error; oracle: magnitude "
            "by the 16-bit weights):\n\n" + tables.ranked_table(model["ranked"]) + "\n"
            for name, model in models.items()
        ),
        "Cost of scoring one token in one layer, here:\n",
        tables.cost_table(first) + "\n",
        "## (c) Sparsity, overlap of adjacent tokens, working sets\n",
        tables.overlap_table(models) + "\n",
    ]
    for name, model in models.items():
        sections += [
            f"Hit ratios to expect at mix 25/25/50, {name}:\n",
            tables.hits_table(model["calibration"]) + "\n",
        ]
    for name, model in models.items():
        sections += [
            f"## (d) One precision or several at equal bytes: {name}\n",
            tables.equal_table(model["equal"]) + "\n",
        ]
    for name, model in models.items():
        sections += [
            f"## (e) Entropy or KL as the objective: {name}\n",
            tables.objective_table(model["objectives"]) + "\n",
            "Entropy of the model's own text, nats a token, at every mix tried:\n",
            tables.entropy_points(model["objectives"]) + "\n",
        ]
    sections += [
        "## (f) Quantisers\n",
        "Feed-forward weights alone, Python / stories; SwiGLU. One float16 scale a "
        "group (GGUF: a block of 32).\n",
        tables.quantiser_table(next(iter(models.values()))["quantisers"]) + "\n",
    ]
    return "\n".join(part for part in sections if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.md")
    parser.add_argument("--toy", action="store_true", help="tiny and quick, for CI")
    parser.add_argument("--from-json", type=Path, help="only write the page again")
    args = parser.parse_args()
    raw = args.out.parent / "bench" / "quality.json"
    if args.from_json:
        found = json.loads(args.from_json.read_text())
    else:
        keep_compiled()
        here = machine()
        with tempfile.TemporaryDirectory() as folder:
            models = measure(Path(folder), Sizes(toy=args.toy))
        minutes = (time.monotonic() - BEGUN) / 60
        found = {"machine": {**here, "minutes": minutes}, "models": models}
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(found) + "\n")
    picture = args.out.with_suffix(".svg")
    tables.plot(found["models"], picture)
    args.out.write_text(report(found, found["machine"], picture.name))
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
