"""Drafts change no token, wherever the weights lay when they were made and checked."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.engine import Engine
from tests.budgets import (
    GREEDY,
    PLACES,
    PROMPT,
    SAMPLED,
    Model,
    assert_within_budgets,
    few_examples,
    pools_first,
    smallest,
)

NEW_TOKENS = 12


class Drafting(Model):
    """smallest_drafting: HBM bytes with which `--draft base` works, copying rows."""

    def __init__(self, store: Path, mix: str):
        super().__init__(store, mix, "base")
        self.smallest_drafting = smallest(lambda: self._load(hbm=1, draft="base"))


@pytest.fixture(scope="module")
def model(tiny_store: Path) -> Drafting:
    return Drafting(tiny_store, "25/25/50")


def tokens_of(engine: Engine, options: dict) -> list[int]:
    done = engine.generate(
        PROMPT, max_new_tokens=NEW_TOKENS, ignore_eos=True, **options
    )
    assert_within_budgets(engine, done)
    return done.token_ids


@few_examples(max_examples=8, derandomize=True)
@given(
    **PLACES,
    count=st.sampled_from([None, 3, 7]),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_drafts_are_invisible(
    model, pools, in_place, hbm, dram, policy, distance, count, seed
):
    room = model.whole_hbm - 1 - model.smallest_drafting
    with pools_first() if pools else nullcontext():
        engine = model.load(
            hbm=model.smallest_drafting + int(hbm * room),
            dram=model.smallest_dram * 5 + int(dram * 1e6),
            policy=policy,
            distance=distance,
            in_place=in_place,
            draft="base",
            draft_tokens=count,
        )
    options = GREEDY if seed is None else {**SAMPLED, "seed": seed}
    wanted = tokens_of(model.resident, options)
    with engine:
        assert tokens_of(engine, options) == wanted
        # Again, from the state that the first run left.
        assert tokens_of(engine, options) == wanted
        assert not count or engine.runner.drafts.sweeps > 0
