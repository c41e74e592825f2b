"""Trains predictors from recorded activations, layer after layer, resumably.

Knows no model and no text: whoever calls brings inputs and labels, and a header that
says where they came from.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.calibrate.fitted import Fitted, finished, keep_layer, open_work
from m2jax.calibrate.predictor import (
    RECALL_SHARES,
    Examples,
    check_examples,
    init_params,
    recall_at,
    recall_of,
    scores_of,
    wanted_mask,
    weighted_loss,
)
from m2jax.errors import NumericalError
from m2jax.lowrank import Predictor, default_rank, predict

WEIGHT_DECAY = 0.01
GOOD_RECALL = 0.99
# Few examples must still make steps enough to learn from.
MIN_STEPS_EPOCH = 32
SCORED_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How predictors are trained.

    rank: r; None: `lowrank.default_rank`. epochs: at most. batch: examples a step;
    fewer where an epoch would be under 32 steps. patience: epochs without a better
    recall after which training stops; it also stops at a recall above 0.99.
    learning_rate: Deja Vu's 1e-4 wants its 400,000 tokens; with a tenth of them 20
    epochs end far too early.
    """

    rank: int | None = None
    seed: int = 0
    epochs: int = 20
    batch: int = 1024
    learning_rate: float = 1e-3
    patience: int = 5

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: want 0 or more")
        for field in ("rank", "epochs", "batch", "patience"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} {value}: want at least 1")
        if not 0 < self.learning_rate < 1:
            raise ValueError(
                f"learning rate {self.learning_rate}: want it between 0 and 1"
            )


def check_rank(options: FitOptions, *, hidden: int, neurons: int) -> None:
    """Raises ValueError if the rank is above what a layer of this shape can have."""
    most = min(hidden, neurons)
    if options.rank is not None and options.rank > most:
        raise ValueError(f"rank {options.rank}: want 1 to {most}, for this model")


def fit_layer(
    data: Examples,
    *,
    name: str = "layer",
    options: FitOptions | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Trains one layer's predictor by AdamW; the best epoch by held-out recall wins.

    Recall is that of the share of neurons that the labels call active. The same
    arguments give the same bytes. An interrupted layer starts over.

    Args:
        name: for messages.
        progress: called after each epoch with its number from 1 and its recall.

    Raises:
        ValueError: shapes do not agree, or the rank is above D or F.
        NumericalError: NaN or infinity in the inputs, or training diverged.
        NotImplementedError: optax is missing.

    Source: Deja Vu, arXiv:2310.17157, its published training code.
    """
    options = FitOptions() if options is None else options
    check_examples(data, name)
    count, hidden = data.inputs.shape
    neurons = data.held_importance.shape[1]
    check_rank(options, hidden=hidden, neurons=neurons)
    rank = options.rank or default_rank(hidden, neurons)
    steps = max(-(-count // options.batch), min(count, MIN_STEPS_EPOCH))
    size = count // steps
    rng = np.random.default_rng(options.seed)
    init, step = _compiled(options.learning_rate, neurons)
    start = init_params(rng, rank=rank, hidden=hidden, neurons=neurons)
    params = jax.tree.map(jnp.asarray, start)
    state = init(params)
    share = int(np.bitwise_count(data.labels).sum()) / (count * neurons)
    wanted = wanted_mask(data.held_importance, share=share)
    best, best_recall, stale, epoch = None, -1.0, 0, 0
    while (
        epoch < options.epochs
        and stale < options.patience
        and best_recall <= GOOD_RECALL
    ):
        epoch += 1
        order = rng.permutation(count)[: steps * size].reshape(steps, size)
        for ids in order:
            params, state = step(params, state, data.inputs[ids], data.labels[ids])
        predictor = _stored(params, name)
        scores = _scores(predictor, data.held_inputs)
        recall = recall_of(scores, wanted, share=share)
        stale = 0 if recall > best_recall else stale + 1
        if not stale:
            best, best_recall = predictor, recall
        if progress is not None:
            progress(epoch, recall)
    assert best is not None
    scores = _scores(best, data.held_inputs)
    return Fitted(
        predictor=best,
        recall=recall_at(scores, data.held_importance, RECALL_SHARES),
        sparsity=float(np.mean(scores <= 0)),
        epochs=epoch,
    )


@lru_cache(maxsize=4)
def _compiled(learning_rate: float, neurons: int):
    """The optimiser's init and one step of it; shared by layers of equal shape."""
    try:
        import optax
    except ImportError:
        raise NotImplementedError(
            "training a predictor needs optax: in m2jax's folder, "
            "pip install -e '.[train]'"
        ) from None
    optimiser = optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY)

    def loss(params: dict[str, Array], x: Array, packed: Array) -> Array:
        labels = jnp.unpackbits(packed, axis=1, count=neurons).astype(jnp.float32)
        return weighted_loss(scores_of(params, x.astype(jnp.float32)), labels)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: Array, packed: Array) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, x, packed)
        # optax 0.2 raises a float to an int32 power.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(optimiser.init), step


def _stored(params: Mapping[str, Array], name: str) -> Predictor:
    """The parameters as the store will hold them, so that this is what is measured."""
    with np.errstate(over="ignore"):
        a, b = (np.asarray(params[part]).astype(np.float16) for part in ("a", "b"))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise NumericalError(
            f"{name}: the predictor's training diverged; use a smaller learning rate"
        )
    return Predictor(a, b)


_predict = jax.jit(predict)


def _scores(predictor: Predictor, inputs: np.ndarray) -> np.ndarray:
    blocks = range(0, len(inputs), SCORED_ROWS)
    return np.concatenate(
        [
            _predict(predictor, inputs[at : at + SCORED_ROWS].astype(np.float32))
            for at in blocks
        ]
    )


def start_work(folder: Path, *, header: Mapping[str, Any], options: FitOptions) -> None:
    """Makes a work folder this run's, or raises ValueError: it is another run's."""
    open_work(folder, {**header, "options": dataclasses.asdict(options)})


def fit_model(
    layers: Iterable[tuple[int, Examples]],
    folder: Path,
    *,
    header: Mapping[str, Any],
    options: FitOptions | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[int, Fitted]:
    """Trains layer after layer, keeping each finished one in a work folder.

    The same call goes on after the last finished layer and ends with the same bytes; a
    layer that was interrupted starts over. One process a folder: the caller sees to it.

    Args:
        layers: may be lazy: nothing is taken from it before the folder is found to
            agree. It may leave out the layers that `fitted.finished(folder)` names.
        folder: made if missing; the caller removes it when the predictors are stored.
        header: JSON values: digests of model and text, lookahead, label rule.
        progress: called after each epoch with the layers done, epoch and recall.

    Returns:
        Every layer in the folder, the finished ones included.

    Raises:
        ValueError: the folder is of another header or options. And as `fit_layer`.
        OSError: the machine failed.
    """
    options = FitOptions() if options is None else options
    start_work(folder, header=header, options=options)
    fitted = finished(folder)
    for layer, data in layers:
        if layer in fitted:
            continue
        done = len(fitted)
        result = fit_layer(
            data,
            name=f"layer {layer}",
            options=options,
            progress=progress and partial(progress, done),
        )
        keep_layer(folder, layer, result)
        fitted[layer] = result
    return dict(sorted(fitted.items()))
