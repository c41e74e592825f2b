"""KL, top tokens and worst tokens beside a reference, from logits to figures."""

import math

import numpy as np
import pytest

import m2jax
from m2jax.divergence import Divergence, TokenFigures, compare_logits
from m2jax.perplexity import perplexity
from tests.budgets import PROMPT

# float32 against float64: the worst relative error of a KL of 1e-5 here is 2e-3, while
# the plain sum of p (log p - log q) in float32 is wrong by a tenth.
RELATIVE = 1e-2
ROUNDING = 2e-5


def figures(seed: int, tokens: int = 50) -> TokenFigures:
    generator = np.random.default_rng(seed)
    return TokenFigures(
        kl=generator.exponential(size=tokens) / 1000,
        logprob=-generator.exponential(size=tokens),
        reference_logprob=-generator.exponential(size=tokens),
        same_top=generator.random(tokens) < 0.9,
    )


def test_figures_of_logits_are_what_their_definitions_say():
    generator = np.random.default_rng(0)
    logits, reference = generator.normal(size=(2, 5, 7)) * 3
    targets = generator.integers(0, 7, 5)
    found = compare_logits(logits, reference, targets)
    for t in range(5):
        q = np.exp(logits[t]) / np.exp(logits[t]).sum()
        p = np.exp(reference[t]) / np.exp(reference[t]).sum()
        assert found.kl[t] == pytest.approx(float((p * np.log(p / q)).sum()))
        assert found.logprob[t] == pytest.approx(math.log(q[targets[t]]))
        assert found.reference_logprob[t] == pytest.approx(math.log(p[targets[t]]))
        assert found.same_top[t] == (p.argmax() == q.argmax())


def test_windows_add_up_to_the_whole():
    parts, whole = Divergence(), Divergence()
    pieces = [figures(seed, tokens) for seed, tokens in ((1, 3), (2, 40), (3, 1))]
    for piece in pieces:
        parts.add(piece)
    whole.add(TokenFigures(*map(np.concatenate, zip(*pieces))))
    assert parts.summary() == whole.summary()
    kl = np.concatenate([piece.kl for piece in pieces])
    found = parts.summary()
    assert found["tokens"] == 44
    assert found["kl_mean"] == pytest.approx(kl.mean())
    assert found["kl_error"] == pytest.approx(kl.std(ddof=1) / math.sqrt(44))
    assert found["kl_max"] == kl.max()
    assert found["kl_quantiles"]["50"] == pytest.approx(np.median(kl))
    shift = np.concatenate(
        [np.exp(p.logprob) - np.exp(p.reference_logprob) for p in pieces]
    )
    assert found["probability_shift_mean"] == pytest.approx(shift.mean())
    assert found["probability_shift_rms"] == pytest.approx(math.sqrt((shift**2).mean()))


def test_the_worst_tokens_are_those_of_the_largest_kl():
    beside = Divergence()
    beside.add(figures(5))
    beside.add(figures(6))
    worst = beside.worst(3)
    kl = beside.all().kl
    assert [entry["kl"] for entry in worst] == sorted(kl, reverse=True)[:3]
    assert all(kl[entry["token"]] == entry["kl"] for entry in worst)


def test_nothing_compared_is_no_figure():
    with pytest.raises(ValueError, match="no tokens were compared"):
        Divergence().summary()


@pytest.mark.parametrize("mix", ["0/100/0", "0/25/75", "20/20/20"])
def test_an_engine_compares_in_one_pass_what_two_engines_say(mix, tiny_store):
    beside = m2jax.load(tiny_store, mix=mix, planes=("w16",))
    exact = m2jax.load(tiny_store, mix="100/0/0", scorer="none")
    wanted = compare_logits(
        beside.logits(PROMPT)[:-1], exact.logits(PROMPT)[:-1], np.array(PROMPT[1:])
    )
    found = beside.compare(PROMPT)
    np.testing.assert_allclose(found.kl, wanted.kl, rtol=RELATIVE)
    np.testing.assert_allclose(found.logprob, wanted.logprob, atol=ROUNDING)
    np.testing.assert_allclose(
        found.reference_logprob, wanted.reference_logprob, atol=ROUNDING
    )
    assert np.array_equal(found.same_top, wanted.same_top)
    assert np.array_equal(found.logprob, beside.logprobs(PROMPT))


def test_the_16_bit_model_does_not_diverge_from_itself(tiny_store):
    engine = m2jax.load(tiny_store, mix="100/0/0", planes=("w16",))
    found = engine.compare(PROMPT)
    assert not np.any(found.kl)
    assert np.all(found.same_top)


@pytest.mark.parametrize("mix", ["0/25/75", "25/25/50"])
def test_the_comparison_is_the_same_within_the_smallest_budget(mix, tiny_store):
    options = {"mix": mix, "planes": ("w16",), "context": 64}
    resident = m2jax.load(tiny_store, **options)
    whole = resident.plan.footprint.hbm
    small = m2jax.load(tiny_store, hbm=whole - 1, dram="1MiB", **options)
    assert not small.plan.placement.resident
    for field, wanted in zip(small.compare(PROMPT), resident.compare(PROMPT)):
        assert np.array_equal(field, wanted)
    held = small.runner.held()
    assert held.hbm_bytes <= held.hbm_budget_bytes


def test_an_engine_without_the_16_bit_plane_says_how_to_load_it(tiny_store):
    # Of 25/25/50 the plane is there, but no room for a second KV cache.
    for mix in ("0/25/75", "25/25/50"):
        engine = m2jax.load(tiny_store, mix=mix)
        assert not engine.has_reference
        with pytest.raises(ValueError, match=r"load the engine with planes=\('w16',\)"):
            engine.compare(PROMPT)


def test_perplexity_names_the_worst_tokens_and_what_stood_before(bundled_store):
    engine = m2jax.load(bundled_store, mix="0/0/100", context=64, planes=("w16",))
    text = "Once upon a time there was a little dog. " * 12
    found = perplexity(engine, text, context=32, worst=3)
    beside = found["divergence"]
    assert beside["tokens"] == found["tokens"]
    assert 0 < beside["kl_mean"] < beside["kl_max"]
    assert beside["nll_ratio"] == pytest.approx(
        found["nll_per_token"] - beside["reference_nll_per_token"], abs=1e-6
    )
    assert [entry["kl"] for entry in beside["worst"]] == sorted(
        (entry["kl"] for entry in beside["worst"]), reverse=True
    )
    for entry in beside["worst"]:
        assert entry["text"].strip() in text
        assert entry["before"].removeprefix("<s>").strip()[:10] in text
    plain = perplexity(engine, text, context=32, reference=False)
    assert plain["divergence"] is None
    assert plain["nll_per_token"] == pytest.approx(found["nll_per_token"])
