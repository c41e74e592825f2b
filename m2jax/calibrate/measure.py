"""One sweep over a model at 16 bits: what its neurons do, layer by layer."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from m2jax.cache.trace import Trace
from m2jax.calibrate.evaluator import Evaluator
from m2jax.calibrate.predictor import recall_at
from m2jax.calibrate.sparsity import LayerSparsity, chunk_reads
from m2jax.ffn_spec import FfnSpec
from m2jax.ranking import Scores, rank

TRACE_TOKENS = 1024
SCORED_AHEAD = 2
# Records that an ordered store would keep together, for the figure of the report.
ORDER_CHUNK = 16

# What is being done, how much of it is done, and in all.
Progress = Callable[[str, int, int], None]


def measure(
    evaluator: Evaluator, specs: tuple[FfnSpec, ...], progress: Progress
) -> tuple[Trace, np.ndarray, dict[str, Any]]:
    """One sweep: sparsity, recall of the base scorers, wanted sets, neuron orders.

    Returns:
        The wanted sets of the first tokens, orders [L, F], and facts of the report:
        layers, recall, order.

    Raises:
        NumericalError: activations hold NaN; names the layer.
    """
    trace = Trace()
    layers: list[dict[str, Any]] = []
    orders: list[np.ndarray] = []
    chunks: list[list[float]] = []
    recalls: dict[str, list[list[dict[float, float]]]] = {}
    sparsity, step, wanted = LayerSparsity(specs[0].neurons), 0, []

    def finish(layer: int) -> None:
        order = sparsity.order()
        orders.append(order)
        layers.append(sparsity.facts())
        random = np.random.default_rng(layer).permutation(len(order))
        chunks.append(
            [
                chunk_reads(by.astype(np.int32), wanted, ORDER_CHUNK)
                for by in (np.arange(len(order)), order, random)
            ]
        )

    seen_layer = 0
    observed = evaluator.observe(
        lambda done, total: progress("measuring sparsity", done, total),
        lookahead=SCORED_AHEAD,
    )
    for layer, window, seen in observed:
        if layer != seen_layer:
            finish(seen_layer)
            sparsity, step, wanted = LayerSparsity(specs[0].neurons), 0, []
            seen_layer = layer
        importance = np.asarray(seen.importance)
        sparsity.add(importance)
        scorers = {"base": seen.base, "gate": seen.gate}
        scorers |= {f"base, {d + 1} ahead": s for d, s in enumerate(seen.ahead)}
        for name, scores in scorers.items():
            parts = recalls.setdefault(name, [[] for _ in specs])[layer]
            parts.append(recall_at(np.asarray(scores), importance))
        if step < TRACE_TOKENS:
            scores = Scores(jnp.asarray(seen.base), jnp.asarray(seen.precise))
            step = _record(trace, specs[layer], layer, step, scores)
            if window == 0:
                share = specs[layer].neurons // 4
                wanted = [np.argsort(-row)[:share] for row in importance]
    finish(seen_layer)
    stored, ordered, random = np.mean(chunks, axis=0).tolist()
    return (
        trace,
        np.stack(orders),
        {
            "layers": layers,
            "recall": {
                name: [_mean_recall(parts) if parts else None for parts in by_layer]
                for name, by_layer in recalls.items()
            },
            "order": {
                "chunk": ORDER_CHUNK,
                "stored": stored,
                "ordered": ordered,
                "random": random,
            },
        },
    )


def _mean_recall(parts: list[dict[float, float]]) -> dict[str, float]:
    return {
        f"{100 * share:g}": float(np.mean([part[share] for part in parts]))
        for share in parts[0]
    }


def _record(trace: Trace, spec: FfnSpec, layer: int, step: int, scores: Scores) -> int:
    """Notes the wanted sets of a window's tokens, as decoding would want them."""
    k16, k8, _ = spec.counts
    if spec.ranked and k16 + k8:
        for place, ids in enumerate(np.asarray(rank(scores, spec=spec))):
            if k8 and not spec.dense("r4"):
                trace.record(step + place, layer, "r4", ids[k16 : k16 + k8])
            if k16 and not spec.dense("w16"):
                trace.record(step + place, layer, "w16", ids[:k16])
    return step + len(scores.kept)
