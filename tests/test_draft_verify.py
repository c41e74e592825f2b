"""What one sweep takes of a draft: the target's choices, and its distribution."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from m2jax import verify as verifying
from m2jax.sampling import Sampling, preferences


def test_verifying_takes_exactly_the_targets_choices():
    """Planted logits: rows choose 3, 1, 4, 1, 5; the draft is right twice."""
    chosen = [3, 1, 4, 1, 5]
    logits = np.full((5, 8), -9, np.float32)
    logits[range(5), chosen] = 1.0
    found = verified(logits, drafted=[3, 1, 0, 1])
    assert int(found.taken) == 3
    assert np.asarray(found.tokens)[:3].tolist() == [3, 1, 4]
    assert np.flatnonzero(np.asarray(found.seen)).tolist() == [1, 3, 4]
    assert not bool(found.unsure)
    found = verified(logits, drafted=[3, 1, 4, 1])
    assert int(found.taken) == 5
    # A tie ends it before the row.
    logits[1, 2] = 1.0
    found = verified(logits, drafted=[3, 1, 4, 1])
    assert int(found.taken) == 1
    assert bool(found.unsure)


@pytest.mark.parametrize("penalty", [50.0, 0.02])
@pytest.mark.parametrize("truncated", [{}, {"temperature": 1.0, "top_k": 1}])
def test_a_penalty_multiplies_what_rounding_may_turn(penalty, truncated):
    """Two tokens of the text, 1e-4 apart before the penalty and 5e-3 after it."""
    sign = -1 if penalty > 1 else 1
    logits = np.array([[sign * 0.1, sign * 0.1001, -9, -9]], np.float32)
    seen = np.array([True, True, False, False])
    options = {"repetition_penalty": penalty, **truncated}
    assert bool(verified(logits, drafted=[], seen=seen, **options).unsure)
    logits[0, 1] = sign * 0.1 - 0.01
    assert not bool(verified(logits, drafted=[], seen=seen, **options).unsure)


# Of shares 0.4, 0.25, 0.15, 0.15 and 0.05: whether the third and fourth stay hangs on
# the last digits of their logits, or nothing does.
@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.65}, {"min_p": 0.375}])
@pytest.mark.parametrize("clear", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_what_truncation_may_keep_or_drop_is_left_to_one_token_alone(cut, clear):
    logits = np.log(np.array([[0.4, 0.25, 0.15, 0.15, 0.05]], np.float32))
    choices = Counter()
    for seed in range(60):
        draw = partial(verified, logits, drafted=[], seed=seed, temperature=1.0)
        # Whoever the noise prefers of those that may stay.
        wanted = int(draw(top_k=4).tokens[0])
        found = draw(**cut)
        at_the_edge = wanted in (2, 3)
        assert bool(found.unsure) == at_the_edge
        assert int(found.taken) == (not at_the_edge)
        if not at_the_edge:
            assert int(found.tokens[0]) == wanted
        assert not bool(draw(**clear).unsure)
        choices[wanted] += 1
    assert min(choices[token] for token in range(4)) > 0


@pytest.fixture(scope="module", autouse=True)
def planted_logits():
    """x is the logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            verifying.model, "logits", lambda head, embedding, x, *, config: x
        )
        yield


@partial(jax.jit, static_argnames="mode")
def verify(*arrays, mode):
    return verifying.verify({}, jnp.zeros(1), *arrays, config=None, mode=mode)  # type: ignore[arg-type]


def verified(logits: np.ndarray, *, drafted: list[int], seen=None, seed=0, **sampling):
    rows, vocab = logits.shape
    options = Sampling(**sampling, seed=seed)
    wanted = np.full(rows, verifying.NOT_DRAFTED, np.int32)
    wanted[: len(drafted)] = drafted
    return verify(
        jnp.asarray(logits),
        jnp.asarray(wanted),
        jnp.zeros(vocab, bool) if seen is None else jnp.asarray(seen),
        jnp.int32(9),
        options.values(),
        mode=options.mode,
    )


@pytest.mark.parametrize("mode", ["right", "wrong"])
def test_tokens_drawn_with_drafts_follow_the_targets_distribution(mode):
    """Chi-squared over seeds: a tiny vocabulary, planted target and draft.

    The draft draws from another distribution, or always says the same.
    """
    target = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))
    draft = np.log(np.array([0.05, 0.1, 0.15, 0.3, 0.4], np.float32))
    logits = np.stack([target, target[::-1]])
    count = 2000

    def one(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = (
            Sampling(temperature=1.0, seed=0)
            .values()
            ._replace(key=jnp.stack([jnp.uint32(0), seed.astype(jnp.uint32)]))
        )
        options = Sampling(temperature=1.0, seed=0)
        nothing = jnp.zeros(5, bool)
        proposed = preferences(
            jnp.asarray(draft), nothing, jnp.int32(9), values, mode=options.mode
        )
        guess = jnp.argmax(proposed) if mode == "right" else jnp.int32(0)
        wanted = jnp.stack([guess.astype(jnp.int32), jnp.int32(-2)])
        found = verifying.verify(
            {},
            jnp.zeros(1),
            jnp.asarray(logits),
            wanted,
            nothing,
            jnp.int32(9),
            values,
            config=None,  # type: ignore[arg-type]
            mode=options.mode,
        )
        return found.tokens, found.taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifying, "LEAST_LEAD", 0.0)
        tokens, taken = jax.jit(jax.vmap(one))(jnp.arange(count))
    tokens, taken = np.asarray(tokens), np.asarray(taken)
    for row, chances in enumerate(np.exp(logits)):
        drawn = tokens[taken > row, row]
        assert len(drawn) > 100
        if row == 1 and mode == "right":
            # Which seeds reach the second row hangs on the first token alone.
            assert set(tokens[taken > 1, 0]) == set(range(5))
        counts = Counter(drawn.tolist())
        seen = np.array([counts[token] for token in range(5)])
        chances = chances.astype(np.float64) / chances.sum(dtype=np.float64)
        assert stats.chisquare(seen, chances * len(drawn)).pvalue > 1e-3
