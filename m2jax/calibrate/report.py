"""What calibration found, for people: sentences that say what to do, then tables."""

from typing import Any

import numpy as np

from m2jax.units import format_bytes

# Above: skipping neurons is free in effect; what a ReLU model shows.
TRULY_SPARSE = 0.3
# A cache that holds the wanted set once over saves little below, much above.
LOW_OVERLAP, HIGH_OVERLAP = 0.5, 0.75
# A predictor below this recall of the top quarter misses one wanted neuron in four.
GOOD_RECALL = 0.75


def report_text(facts: dict[str, Any]) -> str:
    """The report of `calibrate.run.calibrate`'s facts."""
    parts = _sentences(facts), _layers(facts), _costs(facts), _hits(facts)
    return "\n\n".join("\n".join(lines) for lines in parts)


def _median(facts: dict[str, Any], *path: str) -> float:
    found = []
    for layer in facts["layers"]:
        value: Any = layer
        for name in path:
            value = value[name]
        found.append(value)
    return float(np.median(found))


def _sentences(facts: dict[str, Any]) -> list[str]:
    zeros, held = _median(facts, "zero_share"), _median(facts, "neurons_for_95")
    overlap = _median(facts, "overlap", "25")
    lines = [
        f"On {facts['tokens']:,} tokens, in the median layer {100 * held:.0f} % of the "
        "neurons hold 95 % of the output's energy; "
        + (
            f"{100 * zeros:.0f} % of activations are exactly zero: skipping those "
            "costs nothing."
            if zeros > TRULY_SPARSE
            else f"{100 * zeros:.1f} % of activations are exactly zero: skipping is "
            "lossy, give fewer bits instead."
        ),
        f"Of the top quarter, a token wants {100 * overlap:.0f} % of what the token "
        "before wanted: "
        + (
            "a small cache pays."
            if overlap > HIGH_OVERLAP
            else "a cache must hold well over one wanted set to pay."
            if overlap < LOW_OVERLAP
            else "a cache pays where it holds more than one wanted set."
        ),
        f"The most wanted tenth of the neurons takes "
        f"{100 * _median(facts, 'top_10_taken_by', '10'):.0f} % of all places in the "
        "top tenth (10 % would be no skew).",
    ]
    order = facts["order"]
    gain = 1 - order["ordered"] / order["stored"] if order["stored"] else 0.0
    lines.append(
        f"A token's top quarter touches {100 * order['stored']:.0f} % of chunks of "
        f"{order['chunk']} neurons as stored, {100 * order['ordered']:.0f} % if "
        "ordered by what is wanted together: ordering "
        f"{'pays' if gain > 0.1 else 'does not pay'}."
    )
    lines += [_scorer_line(name, layers) for name, layers in _scorers(facts).items()]
    return lines


def _scorers(facts: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    # The first layers have none so far before them.
    found = {
        name: [layer for layer in layers if layer]
        for name, layers in facts["recall"].items()
        if any(layers)
    }
    for ahead, layers in facts["predictors"].items():
        name = f"lowrank (rank {layers[0]['rank']}, lookahead {ahead})"
        found[name] = [layer["recall"] for layer in layers]
    return found


def _scorer_line(name: str, layers: list[dict[str, float]]) -> str:
    means = {k: float(np.mean([layer[k] for layer in layers])) for k in layers[0]}
    verdict = "" if means["25"] >= GOOD_RECALL else ": too little to skip by"
    shares = ", ".join(f"{value:.2f} at {share} %" for share, value in means.items())
    return f"Scorer {name} finds of the true top neurons {shares}{verdict}."


def _layers(facts: dict[str, Any]) -> list[str]:
    recalls = {"base": facts["recall"]["base"]}
    for layers in facts["predictors"].values():
        recalls.setdefault("lowrank", [layer["recall"] for layer in layers])
    lines = [
        "layer  zero %  for 95 %  overlap 5/10/25/50 %     union of 4/16/64  gini  "
        f"recall of 25 %: {', '.join(recalls)}",
    ]
    for place, layer in enumerate(facts["layers"]):
        overlap = "  ".join(f"{value:.2f}" for value in layer["overlap"].values())
        union = "  ".join(
            "n/a " if value is None else f"{value:.2f}"
            for value in layer["union"]["25"].values()
        )
        lines.append(
            f"{place:5d}  {100 * layer['zero_share']:6.1f}  "
            f"{100 * layer['neurons_for_95']:8.1f}  {overlap}     {union}  "
            f"{layer['gini']:.2f}  "
            + "  ".join(f"{of[place]['25']:.2f}" for of in recalls.values())
        )
    return lines


def _costs(facts: dict[str, Any]) -> list[str]:
    return ["scorer   reads KiB a layer  keeps KiB  time us"] + [
        f"{name:7s}  {cost['read_bytes'] / 1024:17.1f}  "
        f"{cost['kept_bytes'] / 1024:9.1f}  {cost['micros']:7.0f}"
        for name, cost in facts["scorer_costs"].items()
    ]


def _hits(facts: dict[str, Any]) -> list[str]:
    if not facts["hits"]:
        return [f"mix {facts['mix']} wants no neuron by itself: nothing to cache."]
    lines = [
        f"hit ratios to expect at mix {facts['mix']}:",
        "plane  slots    of F  HBM, all layers    LRU    LFU  Belady  random",
    ]
    lines += [
        f"{row['plane']:5s}  {row['slots']:5d}  {100 * row['share']:4.0f} %  "
        f"{format_bytes(row['hbm_bytes']):>15s}  {row['lru']:.3f}  {row['lfu']:.3f}   "
        f"{row['belady']:.3f}   {row['random']:.3f}"
        for row in facts["hits"]
    ]
    return lines
