"""Another model as the draft; drafts that cannot be."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import m2jax
from m2jax.cache.manager import TierManager
from m2jax.errors import DoesNotFit
from tests.conftest import TINY
from tests.drafting import GREEDY, PROMPT, SAMPLED, least_hbm, load


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """The tiny model's first layer, as a draft model."""
    source = tmp_path_factory.mktemp("half") / "source"
    shutil.copytree(TINY, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    weights = {
        name: array
        for name, array in load_file(source / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < 1
    }
    save_file(weights, source / "model.safetensors")
    return m2jax.convert(source, source.parent / "store")


@pytest.mark.parametrize("count", [None, 6])
def test_another_model_may_draft(tiny_store, half, count):
    """Two texts, one after the other: the draft model has read the first one."""
    with (
        load(tiny_store, draft="none") as plain,
        load(tiny_store, draft=half, draft_tokens=count) as drafting,
    ):
        assert drafting.draft == str(half)
        for prompt, options in ((PROMPT, GREEDY), ([1, 17, 9], SAMPLED)):
            wanted, given = (
                engine.generate(prompt, max_new_tokens=50, ignore_eos=True, **options)
                for engine in (plain, drafting)
            )
            assert given.token_ids == wanted.token_ids
            assert not count or given.stats.decode.sweeps > 0


def test_a_draft_model_equal_to_the_target_is_always_right(tiny_store):
    with load(tiny_store, mix="0/25/75", draft=tiny_store, draft_tokens=7) as engine:
        done = engine.generate(PROMPT, max_new_tokens=48, ignore_eos=True, **SAMPLED)
    decode = done.stats.decode
    assert decode.accepted == decode.drafted
    assert decode.sweeps == -(-47 // 8)


def test_the_draft_model_is_within_the_budget(tiny_store, half):
    with load(half, mix="0/25/75", draft="none") as draft:
        beside = draft.plan.footprint.hbm
    with load(tiny_store, draft="none") as plain:
        need = plain.plan.footprint.hbm
    with load(tiny_store, draft=half, hbm=need + beside - 1) as engine:
        assert not engine.plan.placement.resident
        held = engine.generate(PROMPT, max_new_tokens=9).stats.held
        assert held.hbm_bytes <= need + beside - 1
    with load(tiny_store, draft=half, hbm=need + beside) as engine:
        assert engine.plan.placement.resident


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_after_a_draft_that_was_cut_off_the_next_text_is_right(
    error, tiny_store, half, monkeypatch
):
    """The draft model's keys and values were given to the program that was cut off."""

    def fail(tiers):
        raise error

    with (
        load(tiny_store, draft="none") as plain,
        load(tiny_store, draft=half, draft_tokens=6) as engine,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(TierManager, "stage_ahead", fail)
            with pytest.raises(type(error)):
                engine.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
        for prompt in (PROMPT, [1, 17, 9]):
            wanted, given = (
                each.generate(prompt, max_new_tokens=20, ignore_eos=True)
                for each in (plain, engine)
            )
            assert given.token_ids == wanted.token_ids


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"draft": "none", "draft_tokens": 4}, "--draft-tokens 4: with --draft none"),
        ({"draft": "base", "mix": "0/0/100"}, "--draft base: the mix computes all"),
        ({"draft_tokens": 0}, "--draft-tokens 0: want 1 to 63"),
        ({"draft_tokens": 64}, "--draft-tokens 64: want 1 to 63"),
        ({"draft_tokens": 20, "context": 16}, "--draft-tokens 20: want 1 to 15"),
        ({"emulate_ssd": "fast"}, "--emulate-ssd 'fast'"),
        ({"draft": "magic"}, "magic"),
    ],
)
def test_a_draft_that_cannot_be_is_refused(bundled_store, options, says):
    with pytest.raises((ValueError, OSError), match=says):
        load(bundled_store, **options)


def test_a_draft_of_another_vocabulary_is_refused(bundled_store, tiny_store):
    with pytest.raises(ValueError, match=r"--draft .*: has \d+ tokens, the model has"):
        load(bundled_store, draft=tiny_store)


def test_a_base_plane_that_does_not_fit_is_refused_with_the_budget_that_works(
    bundled_store,
):
    need = least_hbm(bundled_store, "100/0/0")
    with pytest.raises(DoesNotFit, match="--draft base wants plane q4 whole"):
        load(bundled_store, mix="100/0/0", draft="base", hbm=need - 1)
    load(bundled_store, mix="100/0/0", draft="base", hbm=need).close()
