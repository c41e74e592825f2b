"""What `quality.py` measures, as plain JSON values. Writes no report.

Mixes are searched and predictors trained on the calibration texts; every figure of
quality comes from the other two.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from quality_model import JUDGED, TEXTS, Model, Sizes, cut
from quality_quantisers import EVERY_GROUP, gguf_rows, variants

from m2jax.calibrate.entropy import search_three
from m2jax.calibrate.own_text import OwnText
from m2jax.calibrate.run import calibrate
from m2jax.layer_mixes import format_mixes
from m2jax.mix import ALL_16, PrecisionMix

# All that a run at toy size measures of the lists below.
TOY = {"0/100/0", "25/25/50", 0, 50, 6.0}
MATRICES = ("gate", "up", "down")
GROUPS = (32, 64, 128)
DEFAULT_GROUP = 64
GGUF = (("Q4_0", 4), ("Q8_0", 8))
# Skipped percent of the rest at 16 and at 8 bits.
SKIPS = (0, 10, 25, 40, 50, 65)
SKIPS_AT_8 = (25, 50)
MIXES = ("0/100/0", "0/50/50", "0/25/75", "0/10/90", "0/0/100", "25/25/50", "10/10/80")
# What scorers are compared at: the paper's mix, the default, and skipping.
RANKED = ("25/25/50", "0/25/75", "50/0/0")
SEARCHED_BITS = (4.4, 5.0, 6.0, 8.0)
SKIPPING_BITS = (3.5,)
EQUAL_BITS = (4.4, 5.0, 6.0, 8.0)
ENTROPY_BITS = (6.0, 8.0)

Say = Callable[[str], None]


def chosen(values: Sequence[Any], sizes: Sizes) -> list[Any]:
    """Those to be measured."""
    return [value for value in values if not sizes.toy or value in TOY]


def quality_rows(model: Model, say: Say) -> list[dict[str, Any]]:
    """Uniform mixes, skipping and searched mixes, by average bits."""
    rows = []

    def add(kind: str, mixes: Sequence[PrecisionMix], ranker: str = "base") -> None:
        say(f"{kind} {format_mixes(mixes)}")
        rows.append({"kind": kind, **model.quality(mixes, ranker=ranker)})

    for mix in chosen(MIXES, model.sizes):
        add("uniform", model.same(mix))
    for skipped in chosen(SKIPS, model.sizes):
        kept = 100 - skipped
        add("skipping, rest at 16 bits", model.same(f"{kept}/0/0"))
        if skipped in SKIPS_AT_8:
            add("skipping, rest at 8 bits", model.same(f"0/{kept}/0"))
    for bits in chosen(SEARCHED_BITS, model.sizes):
        add(f"searched, {bits:g} bits", model.searched(bits, skip=False))
    for bits in SKIPPING_BITS:
        add(f"searched with skipping, {bits:g} bits", model.searched(bits, skip=True))
    return rows


def ranked_rows(model: Model, say: Say) -> list[dict[str, Any]]:
    """The same mixes by other scorers; predictors are those of `calibrate`."""
    rows = []

    def add(name: str, model: Model, ranker: str) -> None:
        for mix in chosen(RANKED, model.sizes):
            say(f"{mix} ranked by {name}")
            found = model.quality(model.same(mix), ranker=ranker)
            rows.append({"scorer": name, **found})

    for ranker in ("base", "magnitude", "oracle", "gate", "random"):
        add(ranker, model, ranker)
    for ahead in (0, 1):
        predicted = Model(
            model.store, model.sizes, mix="50/0/0", scorer="lowrank", lookahead=ahead
        )
        name = f"lowrank, {ahead} ahead" if ahead else "lowrank"
        add(name, predicted, "lowrank")
        predicted.engine.close()
    return sorted(rows, key=lambda row: RANKED.index(row["mix"]))


def equal_bytes(model: Model, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One precision against mixes at the same average bits.

    One precision: all that the budget gives of it, best neurons first.
    """
    found = []
    for bits in chosen(EQUAL_BITS, model.sizes):
        for name, of, place in (("16 bits", 16, 0), ("8 bits", 8, 1), ("4 bits", 4, 2)):
            share = min(100.0, 100 * bits / of)
            shares = ["0", "0", "0"]
            shares[place] = f"{share:g}"
            mixes = model.same("/".join(shares))
            found.append({"budget": bits, "kind": name, **model.quality(mixes)})
        if bits >= 8:
            continue
        eights = 100 * (bits - 4) / 4
        found.append(
            {
                "budget": bits,
                "kind": "8 and 4 bits",
                **model.quality(model.same(f"0/{eights:g}/{100 - eights:g}")),
            }
        )
    for row in rows:
        if row["kind"].startswith("searched,"):
            bits = float(row["kind"].split()[1])
            found.append({**row, "budget": bits, "kind": "searched"})
    paper = model.quality(model.same("25/25/50"))
    found.append({"budget": 8.0, "kind": "16, 8 and 4 bits, the paper's", **paper})
    return sorted(found, key=lambda row: row["budget"])


def objectives(
    model: Model, rows: list[dict[str, Any]], say: Say
) -> list[dict[str, Any]]:
    """The paper's entropy objective beside KL, both judged by KL on unseen text."""
    prompts = [
        window[:16]
        for name in JUDGED
        for window in cut(
            model.engine, f"{name}_calibration", length=model.sizes.window, count=4
        )
    ]
    own = OwnText(
        model.engine, prompts, ranker="base", new_tokens=4 if model.sizes.toy else 48
    )
    found = []
    for bits in chosen(ENTROPY_BITS, model.sizes):
        say(f"entropy at {bits:g} bits")
        line = search_three(own.entropy, bits=bits, step=model.sizes.entropy_step)
        points = [{"mix": str(mix), "entropy": entropy} for mix, entropy in line.points]
        best = model.quality((line.best.mix,) * model.layers)
        found.append({"budget": bits, "objective": "entropy", "points": points, **best})
        found += [
            {**row, "budget": bits, "objective": "KL"}
            for row in rows
            if row["kind"] == f"searched, {bits:g} bits"
        ]
    return found


def quantisers(model: Model, say: Say) -> list[dict[str, Any]]:
    """KL of feed-forward rows quantised in other ways, at 4 and at 8 bits."""
    width, layers = model.engine.config.hidden_size, model.layers
    energies = np.zeros((layers, width))
    judges = model.judges_of(model.sizes.quantiser_windows)
    for layer, _, seen in model.calibration.observe(lambda done, total: None):
        energies[layer] += np.square(np.asarray(seen.h)).mean(axis=0)
    found = []

    def judge(name: str, group: int, bits: int, back: Callable) -> None:
        say(f"quantiser {name}, {bits} bits, groups of {group}")

        @functools.cache
        def made(layer: int) -> Any:
            planes = model.engine.runner.tiers.whole_planes(layer)
            rows = np.asarray(planes["w16"]).astype(np.float32)
            rows = rows.reshape(len(rows), 3, -1)
            parts = [back(rows[:, n], m, layer) for n, m in enumerate(MATRICES)]
            return jnp.asarray(np.stack(parts, axis=1).reshape(len(rows), -1))

        kl = {}
        for text, judge_of in judges.items():
            judge_of.replace = lambda layer, planes: {**planes, "w16": made(layer)}
            kl[text] = judge_of.kl((ALL_16,) * layers)
            judge_of.replace = None
        found.append({"name": name, "group": group, "bits": bits, "kl": kl})

    for group in (DEFAULT_GROUP,) if model.sizes.toy else GROUPS:

        def energy(matrix: str, layer: int) -> np.ndarray:
            of_input = energies[layer].astype(np.float32)
            return np.ones_like(of_input) if matrix == "down" else of_input

        for (name, bits), make in variants(group, energy).items():
            if group == DEFAULT_GROUP or name in EVERY_GROUP:
                judge(name, group, bits, make)
    for kind, bits in GGUF:
        judge(
            f"GGUF {kind}", 32, bits, lambda rows, *_, kind=kind: gguf_rows(rows, kind)
        )
    return found


def scorers(store: Path, sizes: Sizes, say: Say) -> dict[str, Any]:
    """`calibrate` on both calibration texts: recall, overlap, sparsity, hit ratios."""
    from m2jax.calibrate.fit import FitOptions

    say("calibrate")
    text = "".join(
        (TEXTS / f"{name}_calibration.txt").read_text()[: 4000 if sizes.toy else None]
        for name in JUDGED
    )
    return calibrate(
        store,
        text,
        mix="25/25/50",
        tokens=sizes.calibration_tokens,
        window=sizes.window,
        lookaheads=(0, 1) if sizes.toy else (0, 1, 2),
        options=FitOptions(epochs=sizes.epochs),
    )
