"""The model that calibration measures with, against the engine itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m2jax
from m2jax.cache.manager import TierManager
from m2jax.calibrate.evaluator import Evaluator
from m2jax.errors import NumericalError
from m2jax.ffn_spec import FfnSpec
from m2jax.layer_mixes import parse_mixes
from m2jax.mix import ALL_16, ClassCounts, PrecisionMix
from m2jax.ranking import Scores, classes_of, rank
from tests.conftest import TINY
from tests.reference_model import forward

# float32 sums in another order, on log-probabilities and on KLs of about 1e-3.
ROUNDING, KL_ROUNDING = 2e-4, 2e-5
LAYERS, LENGTH = 3, 16


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    return np.random.default_rng(0).integers(3, 90, (3, LENGTH)).tolist()


@pytest.fixture(scope="module")
def engine(tiny_store):
    return m2jax.load(
        tiny_store, mix=ALL_16, scorer="none", planes=("q4", "r4", "w16"), context=64
    )


@pytest.fixture
def evaluator(engine, windows) -> Evaluator:
    return Evaluator(engine, windows)


@pytest.mark.parametrize("scorer", ["base", "gate", "none"])
@pytest.mark.parametrize(
    "mix", ["0/0/100", "25/25/50", "20/20/20", "0/100/0,30/0/0,0/25/75"]
)
def test_a_mix_costs_what_the_engine_says(mix, scorer, tiny_store, evaluator, windows):
    beside = m2jax.load(tiny_store, mix=mix, scorer=scorer, planes=("w16",))
    parts = [beside.compare(window) for window in windows]
    evaluator.ranker = scorer
    found = evaluator.compare(parse_mixes(mix, LAYERS))
    for field, tolerance in (
        ("kl", KL_ROUNDING),
        ("logprob", ROUNDING),
        ("reference_logprob", ROUNDING),
    ):
        wanted = np.concatenate([getattr(part, field) for part in parts])
        np.testing.assert_allclose(getattr(found, field), wanted, atol=tolerance)


def test_16_bits_everywhere_cost_nothing(evaluator):
    assert evaluator.kl([ALL_16] * LAYERS) == 0
    assert evaluator.kl([None] * LAYERS) == 0


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_probe_changes_one_layer_alone(layer, evaluator):
    mix = PrecisionMix(0, 0, 60)
    mixes = [ALL_16] * LAYERS
    mixes[layer] = mix
    found = evaluator.probe(layer, mix)
    assert found > 100 * KL_ROUNDING / LENGTH
    assert found == pytest.approx(evaluator.kl(mixes), abs=KL_ROUNDING)


def test_a_layers_memory_is_given_back_when_all_was_computed_from_it(
    tiny_store, engine, windows, monkeypatch
):
    hbm = engine.plan.footprint.hbm - engine.plan.footprint.records
    options = {"mix": ALL_16, "scorer": "none", "planes": ("q4", "r4", "w16")}
    small = m2jax.load(tiny_store, context=64, hbm=hbm, **options)
    evaluator = Evaluator(small, windows)
    evaluator.reference()
    exact, heavy = evaluator._steps.exact, jnp.ones((1200, 1200))
    made, ready = [], []

    @jax.jit
    def slowly(*arrays):
        x = exact(*arrays)
        for _ in range(3):
            x = x + (heavy @ (heavy * x[0, 0]))[0, 0] * 0
        return x

    def dispatch(*arrays):
        made.append(slowly(*arrays))
        return made[-1]

    def computed(tiers, layer):
        ready.append(all(x.is_ready() for x in made))
        give_back(tiers, layer)

    give_back = TierManager.computed
    monkeypatch.setattr(TierManager, "computed", computed)
    evaluator._steps = evaluator._steps._replace(exact=dispatch)
    evaluator.compare([None] * LAYERS)
    assert ready == [True] * LAYERS
    assert len(made) == LAYERS * len(windows)


def test_streamed_layers_are_measured_as_resident_ones(tiny_store, evaluator, windows):
    whole = evaluator._runner.plan.footprint.hbm
    small = m2jax.load(
        tiny_store,
        mix=ALL_16,
        scorer="none",
        planes=("q4", "r4", "w16"),
        context=64,
        hbm=whole - 1,
        dram="1MiB",
    )
    assert not small.plan.placement.resident
    streamed = Evaluator(small, windows)
    mixes = parse_mixes("25/25/50", LAYERS)
    assert streamed.kl(mixes) == evaluator.kl(mixes)
    assert streamed.probe(2, mixes[0]) == evaluator.probe(2, mixes[0])


def test_the_oracle_is_the_best_ranking_and_chance_the_worst(evaluator):
    found = {}
    for ranker in ("oracle", "base", "random"):
        evaluator.ranker = ranker
        found[ranker] = evaluator.kl([PrecisionMix(30, 0, 0)] * LAYERS)
    assert found["oracle"] < found["random"]
    assert found["base"] < found["random"]


def test_activations_are_those_of_the_reference_model(evaluator, windows):
    """What follows the last layer, from the activations' own sum."""
    observed = evaluator.observe(lambda done, total: None)
    seen = {(layer, window): one for layer, window, one in observed}
    assert sorted(seen) == [(n, w) for n in range(LAYERS) for w in range(len(windows))]
    wanted = forward(TINY, np.array(windows[0]))
    streams = evaluator.reference()
    assert len(streams) == LAYERS + 1
    runner = evaluator._runner
    logits = runner.steps.logits(runner.head, runner.embed, streams[-1][0])
    assert np.abs(np.asarray(logits) - wanted).max() < ROUNDING
    for one in seen.values():
        assert one.importance.shape == (LENGTH, 88)
        assert (one.importance >= 0).all()
        # The base plane's scores are close to the truth, and not the truth.
        agree = np.corrcoef(one.base.ravel(), one.importance.ravel())[0, 1]
        assert 0.9 < agree < 0.99999


def test_scores_ahead_are_the_layers_own_scores_of_earlier_inputs(evaluator):
    seen = {}
    for layer, window, one in evaluator.observe(lambda done, total: None, lookahead=2):
        seen[layer, window] = one
        assert len(one.ahead) == min(layer, 2)
    params = evaluator._runner.layers[2]
    q4 = evaluator._runner.tiers.whole_planes(2)["q4"]
    for distance in (1, 2):
        wanted = evaluator._steps.ahead(params, q4, seen[2 - distance, 1].h)
        assert np.array_equal(seen[2, 1].ahead[distance - 1], wanted)
        assert not np.allclose(seen[2, 1].ahead[distance - 1], seen[2, 1].base)


def test_nan_names_its_layer(engine, windows):
    params = engine.runner.layers[1]
    broken = Evaluator(engine, windows)
    bad = params._replace(
        attention={
            **params.attention,
            "ffn_norm": params.attention["ffn_norm"].at[3].set(0x7FC0),
        }
    )
    kept = engine.runner.layers
    engine.runner.layers = [kept[0], bad, kept[2]]
    try:
        with pytest.raises(NumericalError, match="layer 1: activations hold NaN"):
            list(broken.observe(lambda done, total: None))
        with pytest.raises(NumericalError, match="layer 1: activations hold NaN"):
            broken.probe(0, PrecisionMix(0, 0, 100))
    finally:
        engine.runner.layers = kept


def test_nan_of_the_head_is_not_blamed_on_a_layer(engine, windows, monkeypatch):
    head, broken = engine.runner.head, Evaluator(engine, windows)
    spoiled = {name: one.at[0].set(0x7FC0) for name, one in head.items()}
    monkeypatch.setattr(engine.runner, "head", spoiled)
    with pytest.raises(NumericalError, match="head: activations hold NaN"):
        broken.probe(0, PrecisionMix(0, 0, 100))


def test_a_class_whose_plane_is_missing_is_refused(engine, windows):
    def without_r4(layer, planes):
        return {plane: planes[plane] for plane in ("q4", "w16")}

    evaluator = Evaluator(engine, windows, replace=without_r4)
    assert evaluator.probe(0, PrecisionMix(0, 0, 100)) > 0
    with pytest.raises(ValueError, match="at 8 bits want plane r4, and there is only"):
        evaluator.probe(0, PrecisionMix(0, 25, 75))


@pytest.mark.parametrize("seed", range(20))
def test_classes_by_value_are_the_classes_by_rank(seed):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(6, 37)).astype(np.float32)
    if seed % 2:
        # Ties, zeros of both signs and nothing else.
        scores = generator.choice([0.0, -0.0, 1.0, -1.0], (6, 37)).astype(np.float32)
    edges = np.sort(generator.integers(0, 38, 3)).astype(np.int32)
    found = np.asarray(classes_of(Scores(scores), edges))
    order = np.argsort(-scores, axis=1, kind="stable")
    by_rank = np.repeat([16, 8, 4, 0], np.diff([0, *edges, 37]))
    wanted = np.zeros_like(found)
    np.put_along_axis(wanted, order, by_rank[None, :], axis=1)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("seed", range(20))
def test_who_is_kept_and_who_gets_more_bits_are_two_questions(seed):
    """By value, by rank and by hand: the least are left out, then errors decide."""
    generator = np.random.default_rng(seed)
    kept = generator.normal(size=(5, 31)).astype(np.float32)
    precise = generator.uniform(size=(5, 31)).astype(np.float32)
    if seed % 2:
        kept = generator.integers(0, 3, (5, 31)).astype(np.float32)
        precise = generator.integers(0, 3, (5, 31)).astype(np.float32)
    counts = ClassCounts(*np.diff(np.sort(generator.integers(0, 32, 4))).tolist())
    spec = FfnSpec("silu", 31, 8, 32, counts, "base")
    scores = Scores(jnp.asarray(kept), jnp.asarray(precise))
    wanted = np.zeros((5, 31), int)
    for token in range(5):
        among = np.argsort(-kept[token], kind="stable")[: counts.kept]
        order = among[np.lexsort([among, -precise[token, among]])]
        wanted[token, order] = np.repeat([16, 8, 4], counts)
    edges = np.cumsum(counts).astype(np.int32)
    assert np.array_equal(classes_of(scores, edges), wanted)
    if counts.kept:
        named = spec.ranked_counts
        for token, ids in enumerate(np.asarray(rank(scores, spec=spec))):
            bits = np.repeat([16, 8, 4], named)
            found = np.zeros(31, int) if spec.skips else np.full(31, 4)
            found[ids] = bits
            assert np.array_equal(found, wanted[token])
