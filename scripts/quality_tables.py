"""docs/quality.md from what `quality_runs` measured. Computes no figure of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.cli.tables import markdown

SHARES = ("5", "10", "25", "50")
TEXTS = (("python", "Python"), ("stories", "stories"))


def kl(value: float) -> str:
    """KL in thousandths of a nat."""
    return f"{1000 * value:.3g}"


def of_texts(row: dict[str, Any]) -> list[str]:
    """KL with its error, NLL added, and the share of equal top tokens, both texts."""
    cells = []
    for name, _ in TEXTS:
        at = row["texts"][name]
        cells += [
            f"{kl(at['kl_mean'])} ± {kl(at['kl_error'])}",
            f"{np.exp(at['reference_nll_per_token'] + at['nll_ratio']):.3f}",
            f"{100 * at['same_top_share']:.1f}",
        ]
    return cells


HEADS = [
    f"{head}, {text}" for _, text in TEXTS for head in ("KL / 1000", "PPL", "top-1 %")
]


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(
        ["what", "mix 16/8/4", "bits", "KiB a token", *HEADS],
        [
            [
                row["kind"],
                short(row["mix"]),
                f"{row['bits']:.2f}",
                f"{row['bytes_per_token'] / 1024:,.0f}",
                *of_texts(row),
            ]
            for row in rows
        ],
    )


def ranked_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(
        ["mix 16/8/4", "scorer", *HEADS],
        [[row["mix"], row["scorer"], *of_texts(row)] for row in rows],
    )


def short(mix: str) -> str:
    return mix if "," not in mix else "one a layer"


def equal_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(
        ["bits", "what", "mix 16/8/4", *HEADS],
        [
            [f"{row['budget']:g}", row["kind"], short(row["mix"]), *of_texts(row)]
            for row in rows
        ],
    )


def objective_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(
        ["bits", "objective", "mix 16/8/4", *HEADS],
        [
            [f"{row['budget']:g}", row["objective"], short(row["mix"]), *of_texts(row)]
            for row in rows
        ],
    )


def entropy_points(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["objective"] == "entropy":
            points = ", ".join(
                f"{point['mix']}: {point['entropy']:.4f}" for point in row["points"]
            )
            lines.append(f"- {row['budget']:g} bits: {points}")
    return "\n".join(lines)


def quantiser_table(rows: Sequence[dict[str, Any]]) -> str:
    by: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        by.setdefault((row["name"], row["group"]), {})[row["bits"]] = row["kl"]

    def cell(found: dict[str, float] | None) -> str:
        if found is None:
            return ""
        return " / ".join(kl(found[name]) for name, _ in TEXTS)

    return markdown(
        ["quantiser", "group", "4 bits: KL / 1000", "8 bits: KL / 1000"],
        [
            [name, str(group), cell(at.get(4)), cell(at.get(8))]
            for (name, group), at in by.items()
        ],
    )


def recall_table(models: dict[str, dict[str, Any]]) -> str:
    rows = []
    for model, facts in models.items():
        found = dict(facts["calibration"]["recall"])
        found |= {
            f"lowrank, rank {layers[0]['rank']}"
            + (f", {ahead} ahead" if ahead != "0" else ""): [
                layer["recall"] for layer in layers
            ]
            for ahead, layers in facts["calibration"]["predictors"].items()
        }
        for name, layers in found.items():
            known = [layer for layer in layers if layer]
            if not known:
                continue
            means = [np.mean([layer[share] for layer in known]) for share in SHARES]
            least = [min(layer[share] for layer in known) for share in SHARES]
            rows.append(
                [
                    model,
                    name,
                    *(f"{m:.2f} ({low:.2f})" for m, low in zip(means, least)),
                ]
            )
    return markdown(["model", "scorer", *(f"top {s} %" for s in SHARES)], rows)


def recall_by_layer(facts: dict[str, Any]) -> str:
    """Recall of the true top 25 % in every layer."""
    named = dict(facts["recall"])
    named |= {
        f"lowrank, {ahead} ahead": [layer["recall"] for layer in layers]
        for ahead, layers in facts["predictors"].items()
    }
    count = len(next(iter(named.values())))
    rows = [
        [name, *(f"{layer['25']:.2f}" if layer else "" for layer in layers)]
        for name, layers in named.items()
    ]
    return markdown(["scorer", *(f"layer {n}" for n in range(count))], rows)


def cost_table(facts: dict[str, Any]) -> str:
    return markdown(
        ["scorer", "reads, KiB a layer", "keeps beside the planes, KiB", "time, us"],
        [
            [
                name,
                f"{cost['read_bytes'] / 1024:.0f}",
                f"{cost['kept_bytes'] / 1024:.0f}",
                f"{cost['micros']:.0f}",
            ]
            for name, cost in facts["scorer_costs"].items()
        ],
    )


def overlap_table(models: dict[str, dict[str, Any]]) -> str:
    rows = []
    for model, facts in models.items():
        layers = facts["calibration"]["layers"]
        for place, layer in enumerate(layers):
            rows.append(
                [
                    model,
                    str(place),
                    f"{100 * layer['zero_share']:.1f}",
                    f"{100 * layer['neurons_for_95']:.0f}",
                    *(f"{layer['overlap'][share]:.2f}" for share in SHARES),
                    *(two(layer["union"]["25"][w]) for w in ("4", "16", "64")),
                ]
            )
    return markdown(
        [
            "model",
            "layer",
            "zero %",
            "neurons for 95 %, %",
            *(f"overlap, top {s} %" for s in SHARES),
            *(f"union of {w}, top 25 %" for w in ("4", "16", "64")),
        ],
        rows,
    )


def two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def hits_table(facts: dict[str, Any]) -> str:
    return markdown(
        ["plane", "slots / F", "LRU", "LFU", "Belady", "random"],
        [
            [
                row["plane"],
                f"{row['share']:.2f}",
                *(f"{row[p]:.3f}" for p in ("lru", "lfu", "belady", "random")),
            ]
            for row in facts["hits"]
        ],
    )


def plot(models: dict[str, dict[str, Any]], path: Path) -> None:
    """KL against bytes a token, one series a kind of mix."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "m2jax"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(models), figsize=(6 * len(models), 4.5), squeeze=False
    )
    for ax, (model, facts) in zip(axes[0], models.items()):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in facts["quality"]:
            kind = row["kind"].split(",")[0]
            at = np.mean([row["texts"][name]["kl_mean"] for name, _ in TEXTS])
            if row["bytes_per_token"] and at > 0:
                series.setdefault(kind, []).append((row["bytes_per_token"], float(at)))
        for kind, points in series.items():
            xs, ys = zip(*sorted(points))
            ax.plot([x / 1024 for x in xs], ys, marker="o", lw=1, label=kind)
        ax.set(
            title=model,
            xlabel="KiB a token over the link, no hits",
            ylabel="KL to 16 bits, nats a token",
            xscale="log",
            yscale="log",
        )
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
