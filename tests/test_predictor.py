"""The low-rank scorer: its product, loss, labels and recall, and its stored form."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.calibrate.predictor import (
    init_params,
    pack_labels,
    recall_at,
    scores_of,
    top_mask,
    weighted_loss,
)
from m2jax.errors import StoreError
from m2jax.lowrank import Predictor, default_rank, predict
from m2jax.store.predictors import load_predictors, save_predictors

# float32 sums of up to 256 products of values near 1, against float64.
PRODUCT_TOLERANCE = 1e-4
# A mean of some hundred float32 logarithms, against float64.
LOSS_TOLERANCE = 1e-6
# "A few percent of the layer": what the default rank may cost of the 16-bit bytes.
MOST_BYTES = 0.06
SHARES = (0.05, 0.10, 0.25, 0.50)


def random_predictor(rng: np.random.Generator, *, rank: int, hidden: int, neurons: int):
    params = init_params(rng, rank=rank, hidden=hidden, neurons=neurons)
    return Predictor(params["a"].astype(np.float16), params["b"].astype(np.float16))


# 20,000 rows of rank 40 are more than one tile, and no tile divides 20,011.
@pytest.mark.parametrize("neurons", [33, 20_000, 20_011])
@pytest.mark.parametrize("tokens", [1, 5])
def test_scores_are_the_product_of_both_maps(tokens: int, neurons: int):
    rng = np.random.default_rng(tokens)
    predictor = random_predictor(rng, rank=40, hidden=72, neurons=neurons)
    x = rng.normal(size=(tokens, 72)).astype(np.float32)
    a, b = (np.asarray(part, np.float64) for part in predictor)
    scores = jax.jit(predict)(predictor, jnp.asarray(x))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, x @ a.T @ b.T, atol=PRODUCT_TOLERANCE)


def test_training_scores_as_decoding_does():
    rng = np.random.default_rng(2)
    predictor = random_predictor(rng, rank=8, hidden=24, neurons=50)
    params = {
        name: jnp.asarray(part, jnp.float32)
        for name, part in predictor._asdict().items()
    }
    x = jnp.asarray(rng.normal(size=(6, 24)), jnp.float32)
    np.testing.assert_allclose(
        scores_of(params, x), predict(predictor, x), atol=PRODUCT_TOLERANCE
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_the_loss_weighs_each_class_by_the_share_of_the_other(share: float):
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(8, 30), scale=3).astype(np.float32)
    labels = (rng.random((8, 30)) < share).astype(np.float32)
    floor = labels.mean(dtype=np.float64) + 0.005
    weight = np.where(labels == 1, 1.0, floor)
    chance = 1 / (1 + np.exp(-scores.astype(np.float64)))
    entropy = -np.where(labels == 1, np.log(chance), np.log(1 - chance))
    loss = weighted_loss(jnp.asarray(scores), jnp.asarray(labels))
    assert float(loss) == pytest.approx(
        np.mean(weight * entropy), rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE
    )


def test_the_loss_of_scores_far_out_is_finite_and_pulls_back():
    scores = jnp.asarray([[1e4, -1e4, 1e4, -1e4]], jnp.float32)
    labels = jnp.asarray([[0, 1, 1, 0]], jnp.float32)
    loss, slope = jax.value_and_grad(weighted_loss)(scores, labels)
    assert np.isfinite(loss)
    assert slope[0, 0] > 0 > slope[0, 1]
    assert slope[0, 2] == slope[0, 3] == 0


def brute_recall(scores: np.ndarray, importance: np.ndarray, share: float) -> float:
    found = []
    for score, weight in zip(scores, importance):
        count = max(1, math.floor(share * len(score) + 0.5))
        ids = range(len(score))
        chosen = sorted(ids, key=lambda i: (-score[i], i))[:count]
        true = sorted(ids, key=lambda i: (-weight[i], i))[:count]
        true = {i for i in true if weight[i] > 0}
        found.append(len(true & set(chosen)) / len(true) if true else 1.0)
    return float(np.mean(found))


@pytest.mark.parametrize("steps", [3, 20, 10_000])
def test_recall_equals_a_loop_over_tokens_with_ties_and_zeros(steps: int):
    rng = np.random.default_rng(steps)
    scores = np.round(rng.normal(size=(40, 61)) * steps).astype(np.float32)
    # Some tokens have few neurons that add anything, the first has none.
    dead = rng.random((40, 61)) < np.linspace(1, 0, 40)[:, None]
    importance = np.where(dead, 0, np.abs(np.round(rng.normal(size=(40, 61)) * steps)))
    recall = recall_at(scores, importance.astype(np.float32), SHARES)
    assert recall == {
        share: pytest.approx(brute_recall(scores, importance, share))
        for share in SHARES
    }


def test_a_scorer_that_orders_as_importance_does_has_recall_one_at_every_share():
    importance = np.random.default_rng(4).exponential(size=(30, 40))
    assert recall_at(np.log(importance), importance, SHARES) == dict.fromkeys(SHARES, 1)
    assert recall_at(-importance, importance, SHARES) == dict.fromkeys(SHARES, 0)


@pytest.mark.parametrize(
    ("scores", "importance", "words"),
    [
        (np.ones((2, 8)), np.ones((2, 7)), "want the same"),
        (np.ones((0, 8)), np.ones((0, 8)), "not empty"),
        (np.full((2, 8), np.nan), np.ones((2, 8)), "NaN"),
        (np.ones((2, 8)), np.full((2, 8), np.nan), "NaN"),
    ],
)
def test_recall_refuses_what_has_no_order(scores, importance, words):
    with pytest.raises(ValueError, match=words):
        recall_at(scores, importance)


def test_a_mask_has_exactly_the_count_asked_for_in_every_row():
    values = np.random.default_rng(5).integers(0, 4, (50, 23))
    for count in (1, 7, 23):
        assert (top_mask(values, count).sum(axis=1) == count).all()
    for count in (0, 24):
        with pytest.raises(ValueError, match="want 1 to 23"):
            top_mask(values, count)


def test_labels_are_the_top_share_or_whatever_adds_anything():
    rng = np.random.default_rng(6)
    importance = np.maximum(rng.normal(size=(20, 43)), 0)
    active = np.unpackbits(pack_labels(importance, share=None), axis=1)
    np.testing.assert_array_equal(active[:, :43], importance > 0)
    top = np.unpackbits(pack_labels(importance + 1, share=0.25), axis=1)
    assert (top.sum(axis=1) == 11).all()
    least = np.where(top[:, :43], importance, np.inf).min(axis=1)
    most = np.where(top[:, :43], -np.inf, importance).max(axis=1)
    assert (least >= most).all()


# Hidden size and neurons of Llama 2 7B, 13B and 70B, Llama 3 8B, SmolLM2, pystories8M.
@pytest.mark.parametrize(
    ("hidden", "neurons"),
    [
        (4096, 11008),
        (5120, 13824),
        (8192, 28672),
        (4096, 14336),
        (576, 1536),
        (256, 704),
    ],
)
def test_a_predictor_of_the_default_rank_is_small_beside_its_layer(hidden, neurons):
    rank = default_rank(hidden, neurons)
    assert rank % 8 == 0
    assert rank * (hidden + neurons) <= MOST_BYTES * 3 * hidden * neurons
    assert (rank + 8) * 8 > hidden


@pytest.mark.parametrize(("hidden", "neurons"), [(4, 9), (9, 4), (1, 1), (48, 5)])
def test_the_default_rank_never_exceeds_either_side(hidden: int, neurons: int):
    assert 1 <= default_rank(hidden, neurons) <= min(hidden, neurons)


def stored_predictors() -> dict[int, Predictor]:
    rng = np.random.default_rng(7)
    return {
        layer: random_predictor(rng, rank=4 + layer, hidden=24, neurons=50)
        for layer in range(3)
    }


def test_stored_predictors_come_back_bit_for_bit(tmp_path: Path):
    predictors = stored_predictors()
    save_predictors(tmp_path / "one", predictors)
    loaded = load_predictors(tmp_path / "one", layers=3, hidden=24, neurons=50)
    for (a, b), predictor in zip(loaded, predictors.values(), strict=True):
        assert a.dtype == b.dtype == np.float16
        np.testing.assert_array_equal(a, predictor.a)
        np.testing.assert_array_equal(b, predictor.b)


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 2, "hidden": 24, "neurons": 50},
        {"layers": 4, "hidden": 24, "neurons": 50},
        {"layers": 3, "hidden": 32, "neurons": 50},
        {"layers": 3, "hidden": 24, "neurons": 64},
    ],
)
def test_predictors_of_another_model_are_refused(tmp_path: Path, sizes):
    save_predictors(tmp_path / "part", stored_predictors())
    with pytest.raises(StoreError, match="another model"):
        load_predictors(tmp_path / "part", **sizes)


def test_maps_of_different_ranks_are_refused(tmp_path: Path):
    predictors = stored_predictors()
    predictors[1] = predictors[1]._replace(a=predictors[2].a)
    save_predictors(tmp_path / "part", predictors)
    with pytest.raises(StoreError, match="layer 1"):
        load_predictors(tmp_path / "part", layers=3, hidden=24, neurons=50)


def test_a_predictor_that_is_no_number_is_refused(tmp_path: Path):
    predictors = stored_predictors()
    np.asarray(predictors[2].b)[3, 1] = np.nan
    save_predictors(tmp_path / "part", predictors)
    with pytest.raises(StoreError, match="layer 2"):
        load_predictors(tmp_path / "part", layers=3, hidden=24, neurons=50)


@pytest.mark.parametrize("part", ["predictors", "predictors/state/_METADATA"])
def test_predictors_that_cannot_be_read_are_a_store_error(tmp_path: Path, part: str):
    save_predictors(tmp_path, stored_predictors())
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="calibrate again"):
        load_predictors(tmp_path, layers=3, hidden=24, neurons=50)
