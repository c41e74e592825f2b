"""Layers whose wanted neurons are known: what predictors are tested on."""

import numpy as np

from m2jax.calibrate.fit import FitOptions
from m2jax.calibrate.fitted import Fitted
from m2jax.calibrate.predictor import Examples, pack_labels

HIDDEN, NEURONS, PLANTED_RANK = 24, 60, 4
QUICK = FitOptions(rank=PLANTED_RANK, epochs=3, learning_rate=1e-2)


def planted(seed: int = 0, *, count: int = 3000, relu: bool = True) -> Examples:
    """Neurons that are active where a map of rank 4 says so: h = relu(x a b)."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(HIDDEN, PLANTED_RANK))
    b = rng.normal(size=(PLANTED_RANK, NEURONS))
    # Labels say nothing of a neuron's scale, so all have one.
    b /= np.linalg.norm(b, axis=0)
    x = rng.normal(size=(count + 400, HIDDEN)).astype(np.float32)
    score = x @ a @ b
    importance = (np.maximum(score, 0) if relu else np.exp(score)).astype(np.float32)
    share = None if relu else 0.25
    labels = pack_labels(importance[:count], share=share)
    return Examples(x[:count], labels, x[count:], importance[count:])


def assert_same(one: Fitted, other: Fitted) -> None:
    for mine, theirs in zip(one.predictor, other.predictor):
        assert mine.dtype == theirs.dtype == np.float16
        np.testing.assert_array_equal(mine, theirs)
    assert one.recall == other.recall
    assert (one.sparsity, one.epochs) == (other.sparsity, other.epochs)
