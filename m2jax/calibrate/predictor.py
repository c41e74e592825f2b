"""What a predictor is while it is trained: definition, labels, loss and recall.

Knows no layer, file or training loop. The scorer that decode steps run is `lowrank`.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from m2jax.errors import NumericalError

RECALL_SHARES = (0.05, 0.10, 0.25, 0.50)
LABEL_SHARE = 0.25
# Deja Vu adds it to the share of active neurons, so that the active ones of a layer
# that is never active still weigh something.
WEIGHT_FLOOR = 0.005


class LowRank(nnx.Module):
    """x -> (x a^T) b^T: two linear maps, no bias, nothing between them.

    Args:
        rank: r. hidden: D. neurons: F.
    """

    a: nnx.Param
    b: nnx.Param

    def __init__(self, *, rank: int, hidden: int, neurons: int):
        self.a = nnx.Param(jnp.zeros((rank, hidden), jnp.float32))
        self.b = nnx.Param(jnp.zeros((neurons, rank), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """[T, D] float32 -> scores [T, F]."""
        return (x @ self.a[...].T) @ self.b[...].T


class Examples(NamedTuple):
    """What one layer's predictor learns from, and what it is measured on.

    inputs: [n, D] float32 or float16. labels: [n, ceil(F / 8)] bits of
    `pack_labels`. held_inputs: [m, D], of other text. held_importance:
    [m, F] float32, |h| ||down||.
    """

    inputs: np.ndarray
    labels: np.ndarray
    held_inputs: np.ndarray
    held_importance: np.ndarray


def check_examples(data: Examples, name: str) -> None:
    """Raises if arrays do not agree or hold no numbers; `name` is the layer's.

    Raises:
        ValueError: a shape or dtype is wrong, or there are no tokens.
        NumericalError: NaN or infinity.
    """
    (count, hidden), (held, neurons) = data.inputs.shape, data.held_importance.shape
    wanted = {
        "labels": (data.labels, (count, -(-neurons // 8))),
        "held_inputs": (data.held_inputs, (held, hidden)),
    }
    for field, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{name}: {field} are {array.shape}: want {shape}")
    if not count or not held:
        raise ValueError(
            f"{name}: {count} tokens to train on and {held} to measure on: want at "
            "least one of each; give more calibration text"
        )
    if data.labels.dtype != np.uint8:
        raise ValueError(f"{name}: labels are {data.labels.dtype}: want bits in uint8")
    for field in ("inputs", "held_inputs", "held_importance"):
        if not np.isfinite(getattr(data, field)).all():
            raise NumericalError(
                f"{name}: NaN or infinity in the activations ({field}); the model "
                "cannot be calibrated at this precision"
            )


@lru_cache(maxsize=8)
def _graph(rank: int, hidden: int, neurons: int):
    abstract = nnx.eval_shape(
        lambda: LowRank(rank=rank, hidden=hidden, neurons=neurons)
    )
    return nnx.split(abstract)[0]


def scores_of(params: Mapping[str, Array], x: Array) -> Array:
    """Scores [T, F] of `LowRank` with a [r, D] and b [F, r], all float32."""
    rank, hidden = params["a"].shape
    graph = _graph(rank, hidden, params["b"].shape[0])
    return nnx.merge(graph, dict(params))(x)


def init_params(
    rng: np.random.Generator, *, rank: int, hidden: int, neurons: int
) -> dict[str, np.ndarray]:
    """a and b, uniform within 1 / sqrt(inputs), as a linear map without bias starts."""

    def uniform(rows: int, inputs: int) -> np.ndarray:
        bound = inputs**-0.5
        return rng.uniform(-bound, bound, (rows, inputs)).astype(np.float32)

    return {"a": uniform(rank, hidden), "b": uniform(neurons, rank)}


def weighted_loss(scores: Array, labels: Array) -> Array:
    """Binary cross-entropy that weighs the rarer class higher; mean over all elements.

        w = mean(y) + 0.005;  weight = y (1 - w) + w

    so an active neuron weighs 1 and an inactive one as much as the share of actives.

    Args:
        scores: [T, F] float32 logits. labels: [T, F] float32, 0 or 1.

    Source: Deja Vu, arXiv:2310.17157, its published training code.
    """
    share = jnp.mean(labels) + WEIGHT_FLOOR
    weight = labels * (1 - share) + share
    # log(1 + exp(-|s|)) keeps large scores finite.
    entropy = (
        jnp.maximum(scores, 0) - scores * labels + jnp.log1p(jnp.exp(-jnp.abs(scores)))
    )
    return jnp.mean(weight * entropy)


def share_count(share: float, neurons: int) -> int:
    """How many neurons a share of them is: to the nearest, at least 1."""
    return min(neurons, max(1, int(neurons * share + 0.5)))


def top_mask(values: np.ndarray, count: int) -> np.ndarray:
    """True for the `count` largest of each row, ties to the lower id: [m, F] bool.

    Raises:
        ValueError: a value is NaN, or count is not in [1, F].
    """
    neurons = values.shape[1]
    if not 1 <= count <= neurons:
        raise ValueError(f"top_mask: count {count}: want 1 to {neurons}")
    if np.isnan(values).any():
        raise ValueError("top_mask: NaN has no rank")
    least = np.partition(values, neurons - count, axis=1)[:, neurons - count, None]
    mask = values > least
    tied = values == least
    room = count - mask.sum(axis=1, keepdims=True)
    return mask | (tied & (np.cumsum(tied, axis=1) <= room))


def wanted_mask(importance: np.ndarray, *, share: float) -> np.ndarray:
    """The true top share of each row, less those that add nothing: [m, F] bool."""
    return top_mask(importance, share_count(share, importance.shape[1])) & (
        importance > 0
    )


def pack_labels(importance: np.ndarray, *, share: float | None) -> np.ndarray:
    """Labels to train on, as bits: uint8 [n, ceil(F / 8)].

    Args:
        importance: [n, F], |h| ||down||; not negative.
        share: the neuron is among this top share (SiLU, GELU); None: it adds anything
            at all (ReLU), the label of Deja Vu.
    """
    if share is None:
        return np.packbits(importance > 0, axis=1)
    return np.packbits(wanted_mask(importance, share=share), axis=1)


def recall_at(
    scores: np.ndarray,
    importance: np.ndarray,
    shares: Sequence[float] = RECALL_SHARES,
) -> dict[float, float]:
    """How much of the true top-K a scorer's top-K finds, mean over tokens.

        recall = |top-K(score) and top-K(importance)| / K,  K = share * F

    Exact; ties go to the lower id. A neuron of importance 0 is never among the true
    ones, so where fewer than K add anything, K shrinks to them; a token where none
    does counts 1.

    Args:
        scores: [m, F], any order-preserving scale. importance: [m, F], not negative.
        shares: each in (0, 1].

    Raises:
        ValueError: shapes differ, are empty, or a value is NaN.
    """
    if scores.shape != importance.shape or scores.ndim != 2 or not scores.size:
        raise ValueError(
            f"recall_at: scores {scores.shape} and importance {importance.shape}: "
            "want the same [m, F], not empty"
        )
    return {
        share: recall_of(scores, wanted_mask(importance, share=share), share=share)
        for share in shares
    }


def recall_of(scores: np.ndarray, wanted: np.ndarray, *, share: float) -> float:
    """`recall_at` of one share, given its `wanted_mask`."""
    chosen = top_mask(scores, share_count(share, scores.shape[1]))
    hits, true = (chosen & wanted).sum(axis=1), wanted.sum(axis=1)
    return float(np.mean(np.where(true > 0, hits / np.maximum(true, 1), 1.0)))
