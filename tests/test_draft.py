"""Drafts change how fast a text comes, never what it says."""

import json
import shutil

import jax
import numpy as np
import pytest

import m2jax
from m2jax import verify as verifying
from m2jax.draft.drafters import Proposal, Text
from m2jax.draft.loop import Speculation
from m2jax.draft.pace import Pace
from m2jax.engine import Engine
from tests.conftest import TINY
from tests.drafting import GREEDY, PROMPT, SAMPLED, budgets, load

# Logits of a block and of one token alone differ by rounding in float32.
ROUNDING = 1e-4


class Oracle:
    """Proposes a given text, with every n-th token wrong."""

    def __init__(self, tokens: list[int], *, wrong_every: int, vocab: int):
        self._tokens, self._every, self._vocab = tokens, wrong_every, vocab
        self.asked: list[int] = []

    def propose(self, text: Text, count: int, pace: Pace, meanwhile) -> Proposal:
        meanwhile()
        self.asked.append(count)
        start = len(text.tokens)
        tokens = [
            (token + (place % self._every == 0)) % self._vocab
            for place, token in enumerate(
                self._tokens[start : start + count], start=start
            )
        ]
        return Proposal(tokens, [])

    def close(self) -> None:
        pass


def with_drafter(engine: Engine, drafter, *, count: int) -> Engine:
    engine._speculation = Speculation(
        engine.runner, drafter, Pace(fixed=count), kind="test"
    )
    return engine


def prompt_of(engine: Engine) -> list[int]:
    return engine.encode("Once upon a time there was a little dog named Max. Max")


@pytest.mark.parametrize(
    ("mix", "options"),
    [
        ("100/0/0", GREEDY),
        ("0/100/0", SAMPLED),
        ("25/25/50", GREEDY),
        ("50/0/0", SAMPLED),
    ],
)
def test_the_text_is_the_targets_own_on_trained_weights(bundled_store, mix, options):
    tight = budgets(bundled_store, mix)
    with (
        load(bundled_store, mix=mix, draft="none", **tight) as plain,
        load(bundled_store, mix=mix, draft="base", **tight) as drafting,
    ):
        prompt = prompt_of(plain)
        wanted, given = (
            engine.generate(prompt, max_new_tokens=60, ignore_eos=True, **options)
            for engine in (plain, drafting)
        )
    assert given.token_ids == wanted.token_ids
    assert given.text == wanted.text
    assert np.allclose(given.logprobs, wanted.logprobs, rtol=0, atol=ROUNDING)
    decode = given.stats.decode
    assert decode.sweeps > 0
    # A tenth of all tokens is what a draft of noise would get right at most.
    assert decode.accepted > 0.5 * decode.drafted


def test_drafting_is_on_by_itself_where_the_base_plane_fits_and_the_rest_does_not(
    bundled_store,
):
    tight = budgets(bundled_store, "100/0/0")
    with load(bundled_store, mix="100/0/0", **tight) as engine:
        assert engine.draft == "base"
        held = engine.generate(prompt_of(engine), max_new_tokens=20).stats.held
        assert held.hbm_bytes <= tight["hbm"]
        assert held.dram_bytes <= tight["dram"]
    with load(bundled_store, mix="100/0/0") as engine:
        assert engine.draft == "none"
    with load(bundled_store, mix="0/0/100", **tight) as engine:
        assert engine.draft == "none"
    # Without plane q4 all of the mix fits.
    with load(bundled_store, mix="100/0/0", draft="none") as engine:
        need = engine.plan.footprint.hbm
    with load(bundled_store, mix="100/0/0", hbm=need) as engine:
        assert engine.draft == "none"
        assert engine.plan.placement.resident


@pytest.mark.parametrize("wrong_every", [1, 2, 5, 1000])
@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_whatever_is_drafted_the_text_is_the_same(tiny_store, wrong_every, count):
    # Of seed 7 one token lies at the edge of top-p, and is left to a step of its own.
    options = {**SAMPLED, "seed": 8}
    with load(tiny_store, draft="none") as engine:
        prompt = PROMPT
        wanted = engine.generate(prompt, max_new_tokens=40, ignore_eos=True, **options)
        oracle = Oracle(
            [*prompt, *wanted.token_ids],
            wrong_every=wrong_every,
            vocab=engine.config.vocab_size,
        )
        with_drafter(engine, oracle, count=count)
        given = engine.generate(prompt, max_new_tokens=40, ignore_eos=True, **options)
    assert given.token_ids == wanted.token_ids
    decode = given.stats.decode
    if wrong_every == 1:
        assert decode.accepted == 0
    if wrong_every == 1000:
        assert decode.accepted == decode.drafted
        rounds, rest = divmod(39, count + 1)
        # One token that is left is decoded by itself.
        assert decode.sweeps == rounds + (rest > 1)


def test_an_end_of_text_within_a_draft_ends_the_text(tiny_store):
    with load(tiny_store, draft="none") as engine:
        prompt = PROMPT
        long = engine.generate(prompt, max_new_tokens=30, ignore_eos=True, **SAMPLED)
    end = long.token_ids[9]
    first = long.token_ids.index(end)
    folder = tiny_store.parent / "ends"
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            facts = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**facts, "eos_token_id": end}))
    store = m2jax.convert(folder, tiny_store.parent / "ends-store")
    for draft in ("base", "ngram", "none"):
        with load(store, draft=draft) as engine:
            done = engine.generate(prompt, max_new_tokens=30, **SAMPLED)
        assert done.finish_reason == "stop"
        assert done.token_ids == long.token_ids[: first + 1]


def test_a_drafted_token_past_a_stop_string_is_never_shown(bundled_store):
    with (
        load(bundled_store, draft="none") as plain,
        load(bundled_store, draft="base", draft_tokens=31) as drafting,
    ):
        prompt = prompt_of(plain)
        whole = plain.generate(prompt, max_new_tokens=60).text
        assert whole is not None
        stop = whole[len(whole) // 2 :][:5]
        wanted, given = (
            engine.generate(prompt, max_new_tokens=60, stop=[stop])
            for engine in (plain, drafting)
        )
        pieces = list(drafting.stream(prompt, max_new_tokens=60, stop=[stop]))
    assert given.text == wanted.text == "".join(pieces) == whole[: whole.index(stop)]
    assert given.token_ids == wanted.token_ids
    assert given.finish_reason == "stop"


@pytest.mark.parametrize("left", [1, 2, 3, 5, 17])
def test_drafts_keep_within_the_context_and_the_tokens_asked_for(bundled_store, left):
    context = 64
    with (
        load(bundled_store, draft="none", context=context) as plain,
        load(bundled_store, draft="base", draft_tokens=31, context=context) as drafting,
    ):
        ids = (prompt_of(plain) * 8)[: context - left]
        wanted, given = (
            engine.generate(ids, max_new_tokens=99, ignore_eos=True)
            for engine in (plain, drafting)
        )
        assert given.token_ids == wanted.token_ids
        assert len(given.token_ids) == left
        assert drafting.generate(ids[:9], max_new_tokens=0).token_ids == []


def test_a_close_choice_is_left_to_one_token_alone(bundled_store, monkeypatch):
    """With a margin that no lead reaches, every token is."""
    monkeypatch.setattr(verifying, "LEAST_LEAD", 1e9)
    jax.clear_caches()
    with load(bundled_store, draft="base", draft_tokens=4) as engine:
        engine.runner.steps.__dict__.pop("verify", None)
        done = engine.generate(prompt_of(engine), max_new_tokens=12, ignore_eos=True)
        engine.runner.steps.__dict__.pop("verify", None)
    with load(bundled_store, draft="none") as plain:
        wanted = plain.generate(prompt_of(plain), max_new_tokens=12, ignore_eos=True)
    assert done.token_ids == wanted.token_ids
    assert done.stats.decode.accepted == 0
    # Chosen alone they are the very numbers of an engine without drafts.
    assert done.logprobs == wanted.logprobs


def test_a_number_of_drafted_tokens_is_told_where_nothing_is_drafted(
    tiny_store, caplog
):
    m2jax.load(tiny_store, draft_tokens=3).close()
    assert "--draft-tokens 3: --draft auto makes no drafts" in caplog.text
