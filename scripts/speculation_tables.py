"""docs/speculation.md from what `speculation_runs` measured."""

import statistics
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from m2jax.cli.tables import markdown
from m2jax.predict import Moved, Passes, Rates, expect_accepted

FINDINGS = Path(__file__).parent / "data" / "speculation-findings.md"


def report(found: dict[str, Any]) -> str:
    """The page: findings by hand, tables by measurement."""
    here = found["machine"]
    parts = [
        "# Drafts\n",
        f"Made by `scripts/speculation.py` in {here['minutes']:.0f} minutes at commit "
        f"{here['commit']} ({here['cpu']}, {here['cores']} cores, {here['backend']}, "
        f"jax {here['versions']['jax']}); raw figures in "
        "`docs/bench/speculation.json`. "
        "The bundled 8 M model; prompts of 128 tokens from Python, stories and "
        "English prose (`scripts/data/text`), 128 new tokens each. The draft is plane "
        "q4 unless said otherwise. One small, briefly trained model: directions, not "
        "laws.\n",
        FINDINGS.read_text() if FINDINGS.exists() else "",
        f"## Gain\n\nMeasured at commit {found.get('gains_machine', here)['commit']}.",
        "Budgets that hold the dense part, plane q4 and a ring of four layers. Held: "
        "SSD reads at the rate at which the planes missing in HBM take 20 draft steps. "
        "Without drafts the same budgets; where the mix does not use plane q4, its "
        "room holds other layers instead, so a token then reads less. "
        "Same placement: a sweep a token, as if q4 lay there unused. Predicted: what "
        "`simulate --accepted --drafted` says of such sweeps, from bytes, the rate and "
        "the time of a resident INT4 step, arithmetic taken to keep up and nothing "
        "read while drafting. Time a token: sum over all prompts.\n",
        gain_table(found["gains"]) + "\n",
        "Sweeps and draft steps beside what they could be at best:\n",
        parts_table(found["gains"]) + "\n",
        "## Acceptance\n",
        "Accepted tokens a sweep (and share of drafted tokens that were right), by "
        "length of the draft.\n",
        acceptance_table(found["acceptance"]) + "\n",
        "## Fewer bits in the draft\n",
        f"Target 16 bits, {found['widths'][0]['drafted']} drafted: accepted a sweep "
        "(share right). The draft is plane q4 rounded to its top bits.\n",
        widths_table(found["widths"]) + "\n",
        "## Drawing: common noise against rejection\n",
        "Chance that a drafted token stands. Rejection: sum of min(p, q). Common "
        "noise: both models take the largest of logits / temperature + the same Gumbel "
        "noise, which hangs on seed and position alone.\n",
        coupling_table(found["coupling"]) + "\n",
        "## Rounding\n",
        "Largest difference of a logprob between a sweep and single tokens, on the "
        "same text; a choice that leads by less than `verify.LEAST_LEAD` is made by a "
        "single token.\n",
        markdown(
            ["target", "largest difference, nats"],
            [
                [row["mix"], f"{row['largest_difference']:.1e}"]
                for row in found["rounding"]
            ],
        )
        + "\n",
        "## What a window of tokens wants\n",
        "Share of a layer's neurons wanted above 4 bits by any token of the window.\n",
        union_table(found["unions"]) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def gain_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(
        [
            "target",
            "SSD",
            "tokens/s without",
            "with drafts",
            "predicted",
            "gain",
            "gain, same placement",
            "worst prompt",
            "tokens a sweep",
            "same tokens",
        ],
        [_gain_row(row) for row in rows],
    )


def _gain_row(row: dict[str, Any]) -> list[str]:
    prompts, rate = row["prompts"], row["ssd_bytes_per_s"]
    plain = sum(p["plain_tpot_s"] for p in prompts)
    draft = sum(p["draft_tpot_s"] for p in prompts)
    worst = min(p["plain_tpot_s"] / p["draft_tpot_s"] for p in prompts)
    count = len(prompts)
    sweeps = sum(p["sweeps"] for p in prompts)
    accepted = sum(p["accepted"] for p in prompts)
    swept = count * row["missing_bytes"] / rate if rate else None
    return [
        row["mix"],
        f"{rate / 1e6:.0f} MB/s" if rate else "free",
        f"{count / plain:.1f}",
        f"{count / draft:.1f}",
        f"{_predicted(row):.1f}" if rate else "",
        f"{plain / draft:.1f}",
        "" if swept is None else f"{swept / draft:.1f}",
        f"{worst:.1f}",
        f"{(accepted + sweeps) / max(sweeps, 1):.1f}",
        f"{sum(p['same_ids'] for p in prompts)} of {count}",
    ]


def _predicted(row: dict[str, Any]) -> float:
    """Tokens/s that `simulate --accepted --drafted` expects of this row's sweeps."""
    prompts = row["prompts"]
    sweeps, drafted, accepted = (
        sum(p[name] for p in prompts) for name in ("sweeps", "drafted", "accepted")
    )
    # A step's bytes at a byte a second: its time is known, not what it reads.
    step = Moved(0, 0, row["resident_step_s"])
    sweep = Moved(row["missing_bytes"], 0, step.hbm)
    found = expect_accepted(
        Passes(plain=sweep, sweep=sweep, draft=step),
        accepted / sweeps,
        drafted / sweeps,
        rates=Rates(ssd=row["ssd_bytes_per_s"], link=inf, hbm=1.0),
    )
    assert found.tokens_per_s is not None
    return found.tokens_per_s


def parts_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        prompts = row["prompts"]
        step = statistics.median(
            p["draft_s"] / p["drafted"] for p in prompts if p["drafted"]
        )
        sweep = statistics.median(
            p["sweep_s"] / p["sweeps"] for p in prompts if p["sweeps"]
        )
        rate = row["ssd_bytes_per_s"]
        best = row["missing_bytes"] / rate if rate else None
        cells.append(
            [
                row["mix"],
                f"{rate / 1e6:.0f} MB/s" if rate else "free",
                f"{1e3 * step:.2f}",
                f"{step / row['resident_step_s']:.2f}",
                f"{1e3 * sweep:.1f}",
                "" if best is None else f"{sweep / best:.2f}",
            ]
        )
    return markdown(
        [
            "target",
            "SSD",
            "draft step, ms",
            "of resident INT4 decoding",
            "sweep, ms",
            "of bytes / bandwidth",
        ],
        cells,
    )


def acceptance_table(rows: Sequence[dict[str, Any]]) -> str:
    lengths = sorted({row["drafted"] for row in rows})
    by: dict[tuple, dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = (row["mix"], row["text"], row["temperature"])
        by.setdefault(key, {})[row["drafted"]] = row
    return markdown(
        ["target", "text", "temperature", *(f"{n} drafted" for n in lengths)],
        [
            [mix, text, f"{heat:g}", *(_accepted(found[n]) for n in lengths)]
            for (mix, text, heat), found in by.items()
        ],
    )


def _accepted(row: dict[str, Any]) -> str:
    return f"{row['accepted_per_sweep']:.1f} ({100 * row['accepted_share']:.0f} %)"


def widths_table(rows: Sequence[dict[str, Any]]) -> str:
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    by: dict[tuple, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault((row["text"], row["temperature"]), {})[row["bits"]] = row
    return markdown(
        ["text", "temperature", *(f"{n} bits" for n in bits)],
        [
            [text, f"{heat:g}", *(_accepted(found[n]) for n in bits)]
            for (text, heat), found in by.items()
        ],
    )


def coupling_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(
        ["text", "temperature", "rejection", "common noise"],
        [
            [
                row["text"],
                f"{row['temperature']:g}",
                f"{row['rejection']:.3f}",
                f"{row['common_noise']:.3f}",
            ]
            for row in rows
        ],
    )


def union_table(rows: Sequence[dict[str, Any]]) -> str:
    windows = sorted({int(w) for row in rows for w in row["share"]})
    of = [{int(w): share for w, share in row["share"].items()} for row in rows]
    return markdown(
        ["mix", *(f"{w} tokens" for w in windows)],
        [
            [row["mix"], *(f"{share[w]:.2f}" if w in share else "" for w in windows)]
            for row, share in zip(rows, of)
        ],
    )
