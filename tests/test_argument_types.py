"""What callers give: taken as Python's own numbers, or refused in one line."""

import pydoc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m2jax
from m2jax import PrecisionMix
from m2jax.engine import Engine
from m2jax.errors import TierFailed
from m2jax.sampling import Sampling

IDS = [3, 17, 5, 80]
PASSES = ("generate", "stream", "logits", "logprobs", "compare")
NO_INTEGERS = (True, np.True_, "64", 64.0, 1.5, np.float32(1), [1])
NO_NUMBERS = ("0.5", b"0.5", None, True, np.True_, 1j, [0.5], np.array([0.5]))
INTEGER_TYPES = (np.int64, np.uint8, jnp.int32)


@pytest.fixture(scope="module")
def tiny(tiny_store: Path) -> Engine:
    return m2jax.load(tiny_store, mix="0/25/75", context=40)


def refusal(run, *args, **options) -> str:
    """The one line of a ValueError."""
    with pytest.raises(ValueError) as caught:
        run(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    ("ids", "got"),
    [
        ([1, 2.7], "2.7 at place 1"),
        ([True], "True at place 0"),
        (["1", "2"], "'1' at place 0"),
        ([[1, 2]], "[1, 2] at place 0"),
        (np.array([1.5]), "array([1.5])"),
        (np.array([True]), "array([ True])"),
        (np.array([[1, 2], [3, 4]]), "array([[1, 2], [3, 4]])"),
        (np.int64(5), "np.int64(5)"),
        (b"abc", "b'abc'"),
        ({1: 2}, "{1: 2}"),
        (None, "None"),
        (5, "5"),
    ],
    ids=str,
)
def test_token_ids_that_are_no_integers_are_refused(tiny, name, ids, got):
    message = refusal(getattr(tiny, name), ids)
    assert message.endswith(f" a sequence of token ids, got {got}")


@pytest.mark.parametrize("name", ["logits", "logprobs", "compare"])
def test_passes_over_token_ids_take_no_text(tiny, name):
    message = refusal(getattr(tiny, name), "text")
    assert message == "token_ids: want a sequence of token ids, got 'text'"


@pytest.mark.parametrize(
    "ids",
    [
        tuple(IDS),
        np.array(IDS, np.uint8),
        jnp.array(IDS),
        [np.int64(token) for token in IDS],
        [jnp.int32(token) for token in IDS],
    ],
    ids=["tuple", "numpy", "jax", "numpy integers", "jax integers"],
)
def test_integers_of_numpy_and_jax_are_token_ids(tiny, ids):
    assert tiny.encode(ids) == IDS
    assert all(type(token) is int for token in tiny.encode(ids))
    assert (tiny.logprobs(ids) == tiny.logprobs(IDS)).all()


@pytest.mark.parametrize("option", ["temperature", "top_p", "min_p"])
@pytest.mark.parametrize("number", [np.float32, np.float64, jnp.float32, jnp.bfloat16])
def test_real_scalars_are_sampling_options_and_have_a_hash(option, number):
    plain, given = Sampling(**{option: 0.5}), Sampling(**{option: number(0.5)})
    assert given == plain
    assert hash(given) == hash(plain)


@pytest.mark.parametrize("option", ["top_k", "seed"])
@pytest.mark.parametrize("number", INTEGER_TYPES)
def test_integer_scalars_are_sampling_options_and_have_a_hash(option, number):
    plain, given = Sampling(**{option: 7}), Sampling(**{option: number(7)})
    assert given == plain
    assert hash(given) == hash(plain)


@pytest.mark.parametrize(
    "option", ["temperature", "top_p", "min_p", "repetition_penalty"]
)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_a_sampling_option_that_is_no_number_is_refused(option, value):
    assert refusal(Sampling, **{option: value}).startswith(f"{option} {value!r}: want")


@pytest.mark.parametrize("option", ["top_k", "seed", "max_new_tokens"])
@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_an_option_of_a_text_that_is_no_integer_is_refused(tiny, option, value):
    message = refusal(tiny.generate, IDS, **{option: value})
    assert message.startswith(f"{option} {value!r}: want an integer from 0")


@pytest.mark.parametrize("number", INTEGER_TYPES)
def test_new_tokens_may_be_counted_by_any_integer(tiny, number):
    assert len(tiny.generate(IDS, max_new_tokens=number(3)).token_ids) <= 3


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("hbm", "--hbm"),
        ("dram", "--dram"),
        ("emulate_ssd", "--emulate-ssd"),
        ("context", "--context"),
        ("distance", "--prefetch"),
        ("draft_tokens", "--draft-tokens"),
        ("lookahead", "--lookahead"),
        ("dense", "--dense"),
    ],
)
@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_an_option_of_an_engine_that_is_no_integer_is_refused(
    tiny_store, option, name, value
):
    message = refusal(m2jax.load, tiny_store, **{option: value})
    assert message.startswith(f"{name} {value!r}: want ")


@pytest.mark.parametrize("value", ["64", 64.0])
def test_a_context_is_refused_before_a_draft_model_is_loaded(tiny_store, value):
    message = refusal(m2jax.load, tiny_store, draft=tiny_store, context=value)
    assert message.startswith(f"--context {value!r}: want 1 to ")


@pytest.mark.parametrize("number", [np.int64, jnp.int32])
def test_an_engine_takes_any_integers(tiny_store, number):
    options = {"hbm": 1 << 29, "dram": 1 << 29, "context": 40, "distance": 1}
    options |= {"draft_tokens": 4, "lookahead": 0, "dense": 8, "emulate_ssd": 10**9}
    given = {name: number(value) for name, value in options.items()}
    with m2jax.load(tiny_store, draft="ngram", **given) as engine:
        assert type(engine.context) is int
        assert type(engine.plan.hbm_budget_bytes) is int
        assert engine.dense == 8
        engine.generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("mix", (0, 25, 75), "want a text as in '0/25/75', a PrecisionMix, or"),
        ("mix", 5, "want a text as in '0/25/75', a PrecisionMix, or"),
        ("mix", ["0/25/75"] * 3, "want a text as in '0/25/75', a PrecisionMix, or"),
        ("planes", "w16", r"want a sequence, as in ('w16',)"),
        ("planes", None, r"want a sequence, as in ('w16',)"),
        ("in_place", "x", "want True, False or None"),
        ("policy", ["lru"], "want one of ['lfu', 'lru']"),
    ],
)
def test_an_option_of_another_type_is_refused_with_what_is_wanted(
    tiny_store, option, value, wanted
):
    message = refusal(m2jax.load, tiny_store, **{option: value})
    assert message.startswith(f"{option} {value!r}: {wanted}")


def test_mixes_for_another_number_of_layers_are_refused(tiny_store):
    mixes = [PrecisionMix(0, 25, 75)] * 2
    assert refusal(m2jax.load, tiny_store, mix=mixes).startswith("2 mixes: the model")


@pytest.mark.parametrize("share", ["25", None, True])
def test_a_share_of_a_mix_that_is_no_number_is_refused(share):
    message = refusal(PrecisionMix, 0, share, 75)
    assert message == f"percent8 {share!r}: want a number from 0 to 100"


def test_shares_of_a_mix_may_be_numbers_of_jax():
    assert hash(PrecisionMix(*jnp.array([0.0, 25.0, 75.0]))) == hash(
        PrecisionMix(0, 25, 75)
    )


def test_no_stop_strings_may_be_none(tiny):
    assert tiny.generate(IDS, max_new_tokens=2, stop=None).prompt_tokens == len(IDS)


@pytest.mark.parametrize("rate", [8, "999KB", np.int64(999_999)])
def test_an_emulated_ssd_slower_than_any_is_refused(tiny_store, rate):
    message = refusal(m2jax.load, tiny_store, emulate_ssd=rate)
    assert message.startswith(f"--emulate-ssd {rate!r}: want 1MB or more")


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_a_closed_engine_says_so_and_may_be_closed_again(tiny_store, draft):
    with m2jax.load(tiny_store, mix="0/25/75", context=40, draft=draft) as engine:
        ended = engine.stream(IDS, max_new_tokens=0)
        assert list(ended) == []
        stream = engine.stream(IDS, max_new_tokens=4)
    engine.close()
    for name in PASSES:
        with pytest.raises(RuntimeError, match="the engine is closed"):
            getattr(engine, name)(IDS)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        next(stream)
    assert list(ended) == []
    assert ended.result().token_ids == []


def test_a_stream_under_way_ends_with_its_engine(bundled_store):
    with m2jax.load(bundled_store, draft="none", context=64) as engine:
        stream = engine.stream("Once upon a time", max_new_tokens=8)
        assert next(stream)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        next(stream)
    with pytest.raises(RuntimeError, match="has no result"):
        stream.result()


def test_the_package_shows_its_public_names():
    assert {*m2jax.__all__, "__version__"} == set(dir(m2jax))
    assert m2jax.TierFailed is TierFailed
    text = pydoc.plain(pydoc.render_doc(m2jax))
    for name in ("load(", "class Engine", "class TierFailed", "with m2jax.load("):
        assert name in text


def test_a_long_argument_is_shown_short(tiny):
    ids = jax.numpy.zeros((40, 40))
    assert len(refusal(tiny.generate, ids)) < 200
