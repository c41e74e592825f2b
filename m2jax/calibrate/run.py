"""`calibrate`: what a model's neurons do on a text, and predictors of it, kept.

Sweeps over the model at 16 bits, a layer at a time: one to measure, one a lookahead to
train predictors. Puts the pieces together and prints nothing.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.cache.trace import Trace
from m2jax.calibrate.evaluator import Evaluator
from m2jax.calibrate.examples import examples
from m2jax.calibrate.fit import FitOptions, check_rank, fit_model, start_work
from m2jax.calibrate.fitted import Fitted
from m2jax.calibrate.measure import Progress, measure
from m2jax.calibrate.sparsity import expected_hits
from m2jax.calibrate.text import calibration_windows, check_window
from m2jax.calibrate.timing import scorer_costs
from m2jax.calibrate.work import claimed, remove_layers
from m2jax.errors import StoreError, TierFailed
from m2jax.ffn_spec import make_specs
from m2jax.layer_mixes import format_mixes
from m2jax.loading import load
from m2jax.mix import ALL_16, PrecisionMix
from m2jax.preparing import check_planes, choose_mixes, default_mix
from m2jax.store import Store, open_store
from m2jax.store.calibration import check_writable, write_json_part, write_part
from m2jax.store.predictors import save_predictors

DEFAULT_TOKENS = 16384
DEFAULT_WINDOW = 256
LOOKAHEADS = (0, 1)
POSSIBLE_LOOKAHEADS = (0, 1, 2)

log = logging.getLogger("m2jax")


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
    options = options or FitOptions()
    if not {*lookaheads} <= {*POSSIBLE_LOOKAHEADS}:
        raise ValueError(
            f"lookaheads {lookaheads}: want some of {POSSIBLE_LOOKAHEADS}, or ()"
        )
    opened = open_store(store)
    check_planes(opened, ("q4", "w16"))
    check_window(window, opened.config.context)
    check_rank(options, hidden=opened.config.hidden_size, neurons=opened.layout.neurons)
    check_writable(opened)
    mixes = _mixes(opened, mix)
    specs = make_specs(
        opened.config, opened.layout, mixes, scorer="base", planes=opened.planes
    )
    with (
        load(
            store,
            mix=ALL_16,
            scorer="none",
            planes=("q4", "w16"),
            context=window,
            hbm=hbm,
            dram=dram,
        ) as engine,
        claimed(opened.path) as work,
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
        works = {ahead: work / f"lookahead-{ahead}" for ahead in lookaheads}
        headers = {
            ahead: {
                "model": opened.digest,
                "text": facts["text_sha256"],
                "tokens": tokens,
                "window": window,
                "lookahead": ahead,
            }
            for ahead in lookaheads
        }
        # What another run left unfinished is refused before the work, not after.
        for ahead in lookaheads:
            start_work(works[ahead], header=headers[ahead], options=options)
        trace, orders, measured = measure(evaluator, specs, progress)
        facts |= measured
        facts["hits"] = [
            {**row, "hbm_bytes": row["slots"] * _slot_bytes(opened, row["plane"])}
            for row in expected_hits(trace, opened.layout.neurons)
        ]
        facts["scorer_costs"] = scorer_costs(engine, options)
        fitted = {
            ahead: fit_model(
                examples(evaluator, ahead, opened, works[ahead]),
                works[ahead],
                header=headers[ahead],
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
        remove_layers(work)
    return facts


def _mixes(store: Store, mix: str | None) -> tuple[PrecisionMix, ...]:
    """As `choose_mixes`; the default where the store's own is damaged or foreign: this
    run is how a calibration is repaired."""
    try:
        return choose_mixes(store, mix)
    except TierFailed:
        raise
    except StoreError as error:
        log.warning("%s; taking the default mix", error)
        return choose_mixes(store, default_mix(store.planes))


def _slot_bytes(store: Store, plane: str) -> int:
    """Of one slot in every layer."""
    return store.config.num_layers * store.layout.record_bytes(plane)


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
    thresholds = [layer["threshold"] for layer in facts["layers"]]
    write_json_part(store, "thresholds", {"importance": thresholds})
    write_json_part(store, "report", facts)
