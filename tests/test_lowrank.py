"""The low-rank scorer in the engine: a store's predictors rank, a layer ahead too."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import m2jax
from m2jax.cache.trace import Trace
from m2jax.draft.loop import Speculation
from m2jax.errors import StoreError
from m2jax.store import open_store
from m2jax.store.calibration import write_part
from m2jax.store.predictors import save_predictors
from tests import drafting
from tests.budgets import PROMPT, Model, assert_same, generate, look
from tests.conftest import TINY

# Of the tiny store: 3 layers of 88 neurons, rows of 48.
LAYERS, HIDDEN, NEURONS, RANK = 3, 48, 88, 8
# float32 sums in another order: a token alone, or in a block with others.
ROUNDING = 2e-4
CASES = [
    ("25/25/50", 0),
    ("25/25/50", 1),
    ("20/20/20", 1),
    ("0/30/20,25/0/25,30/30/30", 1),
    ("30/0/0", 0),
]


def random_predictors(seed: int, *, hidden: int = HIDDEN) -> dict[int, tuple]:
    generator = np.random.default_rng(seed)
    return {
        layer: (
            generator.normal(size=(RANK, hidden)).astype(np.float16),
            generator.normal(size=(NEURONS, RANK)).astype(np.float16),
        )
        for layer in range(LAYERS)
    }


def add_predictors(store: Path, lookahead: int, predictors: dict[int, tuple]) -> None:
    write_part(
        open_store(store),
        f"predictors-{lookahead}",
        lambda folder: save_predictors(folder, predictors),
    )


@pytest.fixture(scope="module")
def calibrated(tiny_store, tmp_path_factory) -> Path:
    """The tiny store with random predictors for both lookaheads."""
    store = tmp_path_factory.mktemp("calibrated") / "store"
    shutil.copytree(tiny_store, store)
    for lookahead in (0, 1):
        add_predictors(store, lookahead, random_predictors(lookahead))
    return store


@pytest.fixture(scope="module", params=CASES, ids=str)
def model(request, calibrated) -> Model:
    mix, lookahead = request.param
    return Model(calibrated, mix, "lowrank", lookahead=lookahead)


def test_every_tier_says_what_everything_resident_says(model):
    wanted = model.seen("greedy")
    assert_same(look(model.resident), wanted)
    assert_same(look(model.load(hbm=model.smallest_hbm)), wanted)
    slots = model.load(hbm=model.whole_hbm - 1, dram=model.smallest_dram)
    assert_same(look(slots), wanted)


def test_a_block_of_tokens_is_ranked_as_each_token_alone(model):
    done = generate(model.resident)
    ids = [*PROMPT, *done.token_ids]
    taught = model.resident.logprobs(ids)[len(PROMPT) - 1 :]
    assert np.abs(taught - done.logprobs).max() < ROUNDING


def test_layers_are_ranked_by_their_own_predictor_and_the_right_input(calibrated):
    """Decoded by hand, a layer at a time, from the activations of the engine."""
    engine = m2jax.load(calibrated, mix="30/0/0", scorer="lowrank", lookahead=1)
    predictors = random_predictors(1)
    trace = Trace()
    engine.record(trace)
    inputs = []
    steps = engine.runner.steps
    kept = steps.attend_and_rank

    def watched(*args, **options):
        attended, kv, ahead = kept(*args, **options)
        inputs.append(np.asarray(attended.h)[0])
        return attended, kv, ahead

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(steps.__dict__, "attend_and_rank", watched)
        engine.generate(PROMPT, max_new_tokens=2, ignore_eos=True)
    by_layer = {entry.layer: entry.wanted for entry in trace.entries()}
    for layer in range(LAYERS):
        seen = inputs[max(layer - 1, 0)].astype(np.float64)
        a, b = (matrix.astype(np.float64) for matrix in predictors[layer])
        scores = b @ (a @ seen)
        wanted = np.argsort(-scores, kind="stable")[: len(by_layer[layer])]
        assert set(by_layer[layer].tolist()) == set(wanted.tolist())


def test_lookahead_changes_what_is_computed(calibrated):
    found = [
        m2jax.load(
            calibrated, mix="20/20/20", scorer="lowrank", lookahead=lookahead
        ).logits(PROMPT)
        for lookahead in (0, 1)
    ]
    assert np.abs(found[0] - found[1]).max() > 10 * ROUNDING


@pytest.mark.parametrize("scorer", ["lowrank", "none"])
def test_a_plane_that_lies_whole_for_a_draft_is_picked_from(
    scorer, calibrated, monkeypatch
):
    """The draft wants all of q4, the target the records of its classes."""
    mixed = {"mix": "20/20/20", "scorer": scorer}
    tight = drafting.least_hbm(calibrated, **mixed)
    with (
        drafting.load(calibrated, **mixed, draft="none") as plain,
        drafting.load(calibrated, **mixed, draft="base", hbm=tight) as drafted,
    ):
        wanted = generate(plain)
        assert generate(drafted).token_ids == wanted.token_ids
        traces = []
        for engine in (plain, drafted):
            traces.append(Trace())
            engine.record(traces[-1])
            generate(engine)
            engine.record(None)
        ours, theirs = (
            [(e.step, e.layer, e.plane, e.wanted.tolist()) for e in trace.entries()]
            for trace in traces
        )
        assert ours == theirs
        # Every token alone: then logprobs are the same numbers too.
        monkeypatch.setattr(Speculation, "_round", lambda *_: ([], [], True))
        assert generate(drafted).logprobs == wanted.logprobs


def test_predictors_count_in_the_hbm_budget(calibrated):
    plain, ranked = (
        m2jax.load(calibrated, mix="20/20/20", scorer=scorer).plan.footprint.dense
        for scorer in ("base", "lowrank")
    )
    exact = LAYERS * RANK * (HIDDEN + NEURONS) * 2
    assert exact <= ranked - plain <= exact + 64 * LAYERS


def test_a_plan_counts_the_predictors(m2jax_command, calibrated, tiny_store):
    options = ("--mix", "20/20/20", "--scorer", "lowrank", "--json")
    facts = m2jax_command("plan", calibrated, *options).facts
    foot = m2jax.load(calibrated, mix="20/20/20", scorer="lowrank").plan.footprint
    assert facts["tiers"]["hbm"]["dense_bytes"] == foot.dense
    assert facts["tiers"]["hbm"]["need_bytes"] == foot.hbm
    done = m2jax_command("plan", tiny_store, *options)
    assert done.code == 2
    assert "no predictors for lookahead 0" in done.error
    config = TINY / "config.json"
    done = m2jax_command("plan", config, *options)
    assert done.code == 2
    assert "only a store has" in done.error


def test_without_predictors_the_scorer_is_refused(tiny_store):
    with pytest.raises(ValueError, match=r"no predictors for lookahead 0.*calibrate"):
        m2jax.load(tiny_store, mix="20/20/20", scorer="lowrank")
    with pytest.raises(ValueError, match="--lookahead 2: want 0 or 1"):
        m2jax.load(tiny_store, mix="20/20/20", scorer="lowrank", lookahead=2)


def test_predictors_of_another_shape_are_refused(tiny_store, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    add_predictors(store, 0, random_predictors(0, hidden=HIDDEN + 2))
    with pytest.raises(StoreError, match=r"layer 0.*another model"):
        m2jax.load(store, mix="20/20/20", scorer="lowrank")


def test_a_mix_of_one_class_needs_no_predictor(tiny_store):
    wanted = m2jax.load(tiny_store, mix="0/100/0").logits(PROMPT)
    found = m2jax.load(tiny_store, mix="0/100/0", scorer="lowrank").logits(PROMPT)
    assert np.array_equal(found, wanted)
