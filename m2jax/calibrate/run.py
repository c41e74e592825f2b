"""`calibrate`: what a model's neurons do on a text, and predictors of it, kept.

Sweeps over the model at 16 bits, a layer at a time: one to measure, one a lookahead to
train predictors. Puts the pieces together and prints nothing.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.cache.trace import Trace
from m2jax.calibrate.evaluator import Evaluator
from m2jax.calibrate.fit import FitOptions, fit_model
from m2jax.calibrate.fitted import Fitted, finished
from m2jax.calibrate.predictor import LABEL_SHARE, Examples, pack_labels, recall_at
from m2jax.calibrate.sparsity import LayerSparsity, chunk_reads, expected_hits
from m2jax.calibrate.text import calibration_windows, check_window
from m2jax.calibrate.timing import scorer_costs
from m2jax.errors import TierFailed
from m2jax.ffn_spec import FfnSpec, make_specs
from m2jax.layer_mixes import format_mixes
from m2jax.loading import check_planes, choose_mixes, load
from m2jax.mix import ALL_16
from m2jax.store import Store, open_store
from m2jax.store.calibration import write_json_part, write_part
from m2jax.store.predictors import save_predictors

DEFAULT_TOKENS = 16384
DEFAULT_WINDOW = 256
TRACE_TOKENS = 1024
# One window in so many is held out of training, to measure recall on.
HELD_OUT = 16
LOOKAHEADS = (0, 1)
SCORED_AHEAD = 2
WORK = ".m2jax-calibrate"
# Records that an ordered store would keep together, for the figure of the report.
ORDER_CHUNK = 16

# What is being done, how much of it is done, and in all.
Progress = Callable[[str, int, int], None]


def calibrate(
    store: str | Path,
    text: str,
    *,
    mix: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    lookaheads: tuple[int, ...] = LOOKAHEADS,
    options: FitOptions | None = None,
    hbm: str | int | None = None,
    dram: str | int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measures sparsity, trains predictors, records a trace; keeps all in the store.

    Interrupted while it trains, the same call goes on after the last finished layer.

    Args:
        text: calibration text, unlike any that quality is judged on.
        mix: whose wanted sets the trace records; None = the store's own.
        tokens, window: how much of the text is used, in windows of this length.
        lookaheads: layers between what a predictor sees and what it ranks; () trains
            none.
        options: of the training.

    Returns:
        The report's facts; see `calibrate.report.report_text`.

    Raises:
        ValueError: a wrong option, or a text that does not serve. NumericalError: NaN,
        names the layer. StoreError: the store is damaged or cannot be written.
    """
    opened = open_store(store)
    check_planes(opened, ("q4", "w16"))
    check_window(window, opened.config.context)
    mixes = choose_mixes(opened, mix)
    specs = make_specs(
        opened.config, opened.layout, mixes, scorer="base", planes=opened.planes
    )
    work = opened.path / WORK
    with (
        _claimed(work),
        load(
            store,
            mix=ALL_16,
            scorer="none",
            planes=("q4", "w16"),
            context=window,
            hbm=hbm,
            dram=dram,
        ) as engine,
    ):
        windows = calibration_windows(
            engine.tokenizer, text, length=window, tokens=tokens, least=2
        )
        evaluator = Evaluator(engine, windows)
        facts: dict[str, Any] = {
            "mix": format_mixes(mixes),
            "tokens": sum(map(len, windows)),
            "window": window,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        trace, orders, measured = _measure(evaluator, specs, progress)
        facts |= measured
        facts["hits"] = expected_hits(trace, opened.layout.neurons)
        facts["scorer_costs"] = scorer_costs(engine, options)
        fitted = {
            ahead: fit_model(
                _examples(evaluator, ahead, opened, work / f"lookahead-{ahead}"),
                work / f"lookahead-{ahead}",
                header={
                    "model": opened.digest,
                    "text": facts["text_sha256"],
                    "tokens": tokens,
                    "window": window,
                    "lookahead": ahead,
                },
                options=options,
                progress=_training(progress, ahead, len(specs)),
            )
            for ahead in lookaheads
        }
    facts["predictors"] = {
        str(ahead): [_predictor_facts(layers[layer]) for layer in sorted(layers)]
        for ahead, layers in fitted.items()
    }
    _keep(opened, facts, trace, orders, fitted)
    shutil.rmtree(work, ignore_errors=True)
    return facts


@contextmanager
def _claimed(work: Path) -> Iterator[None]:
    """One calibration a store at a time; the lock goes with its process."""
    try:
        work.mkdir(exist_ok=True)
        fd = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise TierFailed(f"{work}: {error.strerror}", path=work) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{work}: another process calibrates this store") from None
        yield
    finally:
        os.close(fd)


def _measure(
    evaluator: Evaluator, specs: tuple[FfnSpec, ...], progress: Progress
) -> tuple[Trace, np.ndarray, dict[str, Any]]:
    """One sweep: sparsity, recall of the base scorers, wanted sets, neuron orders."""
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
            step = _record(trace, specs[layer], layer, step, np.asarray(seen.base))
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


def _record(
    trace: Trace, spec: FfnSpec, layer: int, step: int, scores: np.ndarray
) -> int:
    """Notes the wanted sets of a window's tokens, as decoding would want them."""
    k16, k8, _ = spec.counts
    if spec.ranked and k16 + k8:
        order = np.argsort(-scores, axis=1, kind="stable")
        for place, ids in enumerate(order):
            if k8 and not spec.dense("r4"):
                trace.record(step + place, layer, "r4", ids[k16 : k16 + k8])
            if k16 and not spec.dense("w16"):
                trace.record(step + place, layer, "w16", ids[:k16])
    return step + len(scores)


def _examples(
    evaluator: Evaluator, ahead: int, store: Store, work: Path
) -> Iterator[tuple[int, Examples]]:
    """Each layer's examples, lazily; layers that are trained already are left out."""
    relu = store.config.hidden_act == "relu"
    share = None if relu else LABEL_SHARE
    inputs: list[list[np.ndarray]] = []
    labels: list[np.ndarray] = []
    held: list[np.ndarray] = []
    done = finished(work) if work.exists() else {}
    count = evaluator.windows
    for layer, window, seen in evaluator.observe(lambda done, total: None):
        if window == 0:
            inputs, labels, held = [*inputs, []][-ahead - 1 :], [], []
        inputs[-1].append(np.asarray(seen.h))
        importance = np.asarray(seen.importance)
        if _is_held_out(window, count):
            held.append(importance)
        else:
            labels.append(pack_labels(importance, share=share))
        if window + 1 == count and layer not in done:
            # Layers before the first are seen by nobody: the first sees itself.
            by_window = inputs[0]
            yield (
                layer,
                Examples(
                    np.concatenate(
                        [
                            h
                            for w, h in enumerate(by_window)
                            if not _is_held_out(w, count)
                        ]
                    ),
                    np.concatenate(labels),
                    np.concatenate(
                        [h for w, h in enumerate(by_window) if _is_held_out(w, count)]
                    ),
                    np.concatenate(held),
                ),
            )


def _is_held_out(window: int, count: int) -> bool:
    return window % min(HELD_OUT, count) == min(HELD_OUT, count) - 1


def _training(
    progress: Progress, ahead: int, layers: int
) -> Callable[[int, int, float], None]:
    def report(done: int, epoch: int, recall: float) -> None:
        progress(f"training predictors, lookahead {ahead}", done, layers)

    return report


def _predictor_facts(fitted: Fitted) -> dict[str, Any]:
    return {
        "recall": {f"{100 * s:g}": value for s, value in fitted.recall.items()},
        "sparsity": fitted.sparsity,
        "epochs": fitted.epochs,
        "rank": int(fitted.predictor.a.shape[0]),
    }


def _keep(
    store: Store,
    facts: dict[str, Any],
    trace: Trace,
    orders: np.ndarray,
    fitted: dict[int, dict[int, Fitted]],
) -> None:
    """Writes every part; each is whole or as it was."""
    for ahead, layers in fitted.items():
        pairs = {layer: one.predictor for layer, one in layers.items()}
        write_part(
            store,
            f"predictors-{ahead}",
            lambda folder, pairs=pairs: save_predictors(folder, pairs),
        )
    write_part(store, "order", lambda folder: np.save(folder / "order.npy", orders))
    write_part(store, "trace", lambda folder: trace.save(folder / "trace.npz"))
    write_json_part(store, "report", facts)
