"""Sampling: limits of every option, and distributions against plain NumPy."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.sampling import MAX_SEED, NOT_A_TOKEN, Sampling, SamplingMode, sample

LOGITS = np.array([1.2, -0.7, 2.0, 0.4, 2.6, -3.0, 1.9, 0.0], np.float32)
VOCAB = len(LOGITS)
NOTHING_SEEN = np.zeros(VOCAB, np.bool_)
DRAWS = 20_000
# Chi-squared of seven degrees of freedom exceeds this once in 10^7 right samplers.
CHI_SQUARED_BOUND = 46.0
FLOAT32_MAX = float(np.finfo(np.float32).max)


def draw(
    sampling: Sampling,
    logits: np.ndarray = LOGITS,
    *,
    seen: np.ndarray = NOTHING_SEEN,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and logprobs at DRAWS positions."""
    positions = np.arange(DRAWS, dtype=np.int32)
    run = compiled(sampling.mode)
    tokens, logprobs = run(logits, seen, positions, sampling.values())
    return np.asarray(tokens), np.asarray(logprobs)


@cache
def compiled(mode: SamplingMode):
    one = partial(sample, mode=mode)
    return jax.jit(jax.vmap(one, in_axes=(None, None, 0, None)))


def expected(sampling: Sampling, *, seen: np.ndarray = NOTHING_SEEN) -> np.ndarray:
    """Probabilities [V], by the definitions one after the other."""
    logits = LOGITS.astype(float)
    penalty = sampling.repetition_penalty
    penalised = np.where(logits > 0, logits / penalty, logits * penalty)
    logits = np.where(seen, penalised, logits)
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    shares = np.exp(logits[order] - logits.max())
    shares /= shares.sum()
    before = np.cumsum(shares) - shares
    kept = (before < sampling.top_p) & (shares >= sampling.min_p * shares[0])
    order = order[kept]
    weights = np.zeros(VOCAB)
    weights[order] = np.exp((logits[order] - logits.max()) / sampling.temperature)
    return weights / weights.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(0.5, seed=2),
        Sampling(3.0, seed=3),
        Sampling(1.0, top_k=3, seed=4),
        Sampling(1.0, top_p=0.8, seed=5),
        Sampling(1.0, min_p=0.2, seed=6),
        Sampling(2.0, top_k=6, top_p=0.9, min_p=0.05, seed=7),
        Sampling(1.5, repetition_penalty=1.7, seed=8),
        Sampling(0.7, top_k=5, top_p=0.95, repetition_penalty=0.5, seed=9),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_the_chain(sampling: Sampling):
    seen = np.arange(VOCAB) % 3 == 0
    tokens, _ = draw(sampling, seen=seen)
    wanted = DRAWS * expected(sampling, seen=seen)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[wanted == 0].any()
    possible = wanted > 0
    apart = (counts - wanted)[possible] ** 2 / wanted[possible]
    assert apart.sum() < CHI_SQUARED_BOUND


def test_the_chi_squared_bound_tells_a_temperature_of_1_from_one_of_0_9():
    tokens, _ = draw(Sampling(1.0, seed=1))
    wanted = DRAWS * expected(Sampling(0.9))
    apart = (np.bincount(tokens, minlength=VOCAB) - wanted) ** 2 / wanted
    assert apart.sum() > CHI_SQUARED_BOUND


def test_logprobs_are_those_of_the_unmodified_logits():
    shares = np.exp(LOGITS.astype(float))
    wanted = np.log(shares / shares.sum())
    options = Sampling(2.0, top_k=4, repetition_penalty=1.5, seed=1)
    tokens, logprobs = draw(options, seen=~NOTHING_SEEN)
    assert np.abs(logprobs - wanted[tokens]).max() < 1e-6


@pytest.mark.parametrize("temperature", [0, 1e-9, 1e-30, 1e-45, 1e-300])
def test_at_no_temperature_or_a_tiny_one_the_best_token_is_taken(temperature: float):
    tokens, _ = draw(Sampling(temperature, seed=1))
    assert set(tokens.tolist()) == {4}


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1}], ids=str
)
def test_the_tightest_truncation_leaves_the_best_token(options: dict):
    tokens, _ = draw(Sampling(1e6, seed=1, **options))
    assert set(tokens.tolist()) == {4}


@pytest.mark.parametrize(
    "options", [{"top_k": VOCAB}, {"top_k": 2**31 - 1}, {"top_p": 1.0}, {"min_p": 0}]
)
def test_the_loosest_truncation_is_none(options: dict):
    free, _ = draw(Sampling(3.0, seed=1))
    tokens, _ = draw(Sampling(3.0, seed=1, **options))
    assert np.array_equal(tokens, free)


def test_ties_at_the_edge_of_top_k_go_to_the_lower_ids():
    tokens, _ = draw(Sampling(1.0, top_k=3, seed=1), np.zeros(VOCAB, np.float32))
    assert set(tokens.tolist()) == {0, 1, 2}


def test_greedy_ties_go_to_the_lower_id():
    tokens, _ = draw(Sampling(), np.zeros(VOCAB, np.float32))
    assert set(tokens.tolist()) == {0}


def test_a_penalty_turns_greedy_decoding_away_from_what_was_seen():
    seen = np.arange(VOCAB) == 4
    assert set(draw(Sampling(repetition_penalty=2), seen=seen)[0].tolist()) == {2}
    lowered = -np.abs(LOGITS)
    lowered[4] = -0.01
    seen[7] = True
    tokens, _ = draw(Sampling(repetition_penalty=100), lowered, seen=seen)
    # Negative logits are multiplied; zero stays zero.
    assert set(tokens.tolist()) == {7}


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    first, _ = draw(Sampling(3.0, seed=5))
    again, _ = draw(Sampling(3.0, seed=5))
    other, _ = draw(Sampling(3.0, seed=6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_seeds_that_differ_in_their_upper_half_alone_draw_different_tokens():
    low, _ = draw(Sampling(3.0, seed=5))
    high, _ = draw(Sampling(3.0, seed=5 + (1 << 63)))
    assert not np.array_equal(low, high)


def test_every_position_draws_anew():
    tokens, _ = draw(Sampling(1e6, seed=1))
    assert set(tokens.tolist()) == set(range(VOCAB))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, VOCAB // 2, VOCAB - 1, slice(None)])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 2}], ids=str)
def test_a_logit_that_is_no_number_gives_no_token(options, place, bad):
    logits = LOGITS.copy()
    logits[place] = bad
    tokens, _ = draw(Sampling(seed=1, **options), logits)
    assert set(tokens.tolist()) == {NOT_A_TOKEN}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.01, "top_p": 0.9}], ids=str)
def test_logits_as_large_as_float32_holds_are_sampled(options: dict):
    logits = np.full(VOCAB, -FLOAT32_MAX, np.float32)
    logits[3] = FLOAT32_MAX
    assert set(draw(Sampling(seed=1, **options), logits)[0].tolist()) == {3}


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("temperature", -1, r"\[0, 1e6\]"),
        ("temperature", math.nan, r"\[0, 1e6\]"),
        ("temperature", math.inf, r"\[0, 1e6\]"),
        ("temperature", 1e39, r"\[0, 1e6\]"),
        ("top_p", 0, r"\(0, 1\]"),
        ("top_p", 1.1, r"\(0, 1\]"),
        ("top_p", math.nan, r"\(0, 1\]"),
        ("min_p", -0.1, r"\[0, 1\]"),
        ("min_p", 1.01, r"\[0, 1\]"),
        ("min_p", math.nan, r"\[0, 1\]"),
        ("top_k", -1, "from 0"),
        ("top_k", 2**31, "from 0"),
        ("top_k", 2.0, "integer"),
        ("repetition_penalty", 0, r"\(0, 1e6\]"),
        ("repetition_penalty", -1, r"\(0, 1e6\]"),
        ("repetition_penalty", math.inf, r"\(0, 1e6\]"),
        ("seed", -1, "2.64 - 1"),
        ("seed", 2**64, "2.64 - 1"),
        ("seed", 1.5, "integer"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_name_and_range(
    option, value, wanted
):
    with pytest.raises(ValueError, match=f"^{option} .*{wanted}"):
        Sampling(**{option: value})


@pytest.mark.parametrize("seed", [0, MAX_SEED - 1])
def test_the_whole_range_of_seeds_is_taken(seed: int):
    tokens, _ = draw(Sampling(1.0, seed=seed))
    assert tokens.min() >= 0


def test_a_seed_is_drawn_where_none_is_given_and_kept_where_one_is():
    drawn = {Sampling(1.0).with_seed().seed for _ in range(8)}
    assert None not in drawn
    assert len(drawn) == 8
    assert Sampling(1.0, seed=7).with_seed().seed == 7


@settings(deadline=None)
@given(
    st.floats(0, 1e6),
    st.integers(0, 20),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1),
    st.floats(1e-6, 1e6),
)
def test_some_token_comes_from_any_options_in_range(
    temperature, top_k, top_p, min_p, penalty
):
    seen = np.arange(VOCAB) % 2 == 0
    options = Sampling(temperature, top_k, top_p, min_p, penalty, seed=1)
    tokens, logprobs = draw(options, seen=seen)
    assert tokens.min() >= 0
    assert tokens.max() < VOCAB
    assert np.isfinite(logprobs).all()


def test_greedy_decoding_never_sorts():
    logits = jnp.array(LOGITS)
    values = Sampling(top_k=3, top_p=0.5).values()
    mode = Sampling(top_k=3, top_p=0.5).mode
    jaxpr = jax.make_jaxpr(partial(sample, mode=mode))(
        logits, NOTHING_SEEN, jnp.int32(0), values
    )
    assert "sort" not in str(jaxpr)
    assert "top_k" not in str(jaxpr)
