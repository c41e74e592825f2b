"""Drafts change how fast a text comes, never what it says."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import stats

import m2jax
from m2jax import verify as verifying
from m2jax.draft.drafters import Proposal, Text
from m2jax.draft.loop import Speculation
from m2jax.draft.pace import Pace
from m2jax.engine import Engine
from m2jax.errors import DoesNotFit
from m2jax.sampling import Sampling
from tests.budgets import smallest
from tests.conftest import TINY

CONTEXT = 128
PROMPT = [1, 17, 5, 80]
# Logits of a block and of one token alone differ by rounding in float32.
ROUNDING = 1e-4
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "seed": 7,
}


class Oracle:
    """Proposes a given text, with every n-th token wrong."""

    held_bytes = 0

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


def load(store: Path, **options) -> Engine:
    return m2jax.load(store, **{"mix": "25/25/50", "context": CONTEXT, **options})


def with_drafter(engine: Engine, drafter, *, count: int) -> Engine:
    engine._speculation = Speculation(
        engine.runner, drafter, Pace(fixed=count), kind="test"
    )
    return engine


def least_hbm(store: Path, mix: str) -> int:
    """The least that `--draft base` works with."""
    passes = smallest(lambda: load(store, mix=mix, draft="base", hbm=1))
    return smallest(lambda: load(store, mix=mix, draft="base", hbm=passes))


def budgets(store: Path, mix: str) -> dict[str, int]:
    hbm = least_hbm(store, mix)
    dram = smallest(lambda: load(store, mix=mix, draft="base", hbm=hbm, dram=1))
    return {"hbm": hbm, "dram": dram}


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
    with load(tiny_store, draft="none") as engine:
        prompt = PROMPT
        wanted = engine.generate(prompt, max_new_tokens=40, ignore_eos=True, **SAMPLED)
        oracle = Oracle(
            [*prompt, *wanted.token_ids],
            wrong_every=wrong_every,
            vocab=engine.config.vocab_size,
        )
        with_drafter(engine, oracle, count=count)
        given = engine.generate(prompt, max_new_tokens=40, ignore_eos=True, **SAMPLED)
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


def verified(logits: np.ndarray, *, drafted: list[int], seed=0, **sampling):
    rows, vocab = logits.shape
    options = Sampling(**sampling, seed=seed)
    wanted = np.full(rows, verifying.NOT_DRAFTED, np.int32)
    wanted[: len(drafted)] = drafted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            verifying.model, "logits", lambda head, embedding, x, *, config: x
        )
        return verifying.verify(
            {},
            jnp.zeros(1),
            jnp.asarray(logits),
            jnp.asarray(wanted),
            jnp.zeros(vocab, bool),
            jnp.int32(9),
            options.values(),
            config=None,  # type: ignore[arg-type]
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
        proposed = verifying.preferences(
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
        patch.setattr(
            verifying.model, "logits", lambda head, embedding, x, *, config: x
        )
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
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
