"""Engines of one model under many budgets, and all that a run of one shows.

Holds budgets against what is held in every run.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import m2jax
from m2jax import plan
from m2jax.cache.trace import Trace
from m2jax.engine import Engine
from m2jax.errors import DoesNotFit
from m2jax.store import open_store
from m2jax.stream import Generation

PROMPT = [1, 17, 5, 80, 33, 2, 64]
NEW_TOKENS = 12
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {
    "temperature": 1.5,
    "top_k": 30,
    "top_p": 0.95,
    "min_p": 0.001,
    "repetition_penalty": 1.2,
    "seed": 2**63 + 5,
}


class Seen(NamedTuple):
    """All that a run shows of the model."""

    token_ids: list[int]
    logprobs: list[float]
    logits: np.ndarray


class Model:
    """A store under a mix: engines of any budget, and what they all must say.

    seen("greedy" or "sampled"): of the host loop with everything resident.
    in_place: whether engines use rows where they lie in DRAM, as a CPU does, or copy
    them as for an accelerator.
    """

    def __init__(
        self,
        store: Path,
        mix: str,
        scorer: str,
        *,
        lookahead: int = 0,
        in_place: bool = False,
    ):
        self.store = open_store(store)
        self._load = lambda **options: m2jax.load(
            store,
            mix=mix,
            scorer=scorer,
            lookahead=lookahead,
            **{"draft": "none", "in_place": in_place, **options},
        )
        self.resident = self._load()
        assert self.resident.plan.placement.resident
        self.whole_hbm = self.resident.plan.footprint.hbm
        self.smallest_hbm = smallest(lambda: self._load(hbm=1))
        self.smallest_dram = smallest(
            lambda: self._load(hbm=self.whole_hbm - 1, dram=1)
        )
        # Pools that take all there is leave more to stream.
        with pools_first():
            self.smallest_pooled_dram = smallest(
                lambda: self._load(hbm=self.whole_hbm - 1, dram=1)
            )
        self.seen = cache(self._look)

    def _look(self, kind: str) -> "Seen":
        # While a trace is recorded, the host decodes.
        self.resident.record(Trace())
        seen = look(self.resident, kind)
        self.resident.record(None)
        return seen

    def load(self, **options) -> Engine:
        engine = self._load(**options)
        assert not engine.plan.placement.resident
        return engine

    def with_pools(self, **options) -> Engine:
        """Fewer slots than neurons for every sparse plane of every layer."""
        with pools_first():
            engine = self.load(hbm=self.whole_hbm - 1, **options)
        place = engine.plan.placement
        for plane in engine.plan.placement.slots:
            if not engine.specs[0].dense(plane):
                assert all(0 < slots < place.whole for slots in place.slots[plane])
        return engine


# Where weights lie, for `hypothesis.given`; shares of the room there is.
PLACES = {
    "pools": st.booleans(),
    "in_place": st.booleans(),
    "hbm": st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    "dram": st.floats(0, 1),
    "policy": st.sampled_from(["lru", "lfu"]),
    "distance": st.integers(0, 3),
}
# An example makes an engine.
few_examples = partial(
    settings,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@contextmanager
def pools_first() -> Iterator[None]:
    """Plans have pools where they can, over a ring too: as if DRAM held all. Else a
    plan takes whole planes first, and small models have both at no budgets."""
    fill = plan.fill_slots

    def filled(*args, dram: int, **options):
        return fill(*args, dram=1 << 60, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "fill_slots", filled)
        yield


def smallest(load: Callable[[], Engine]) -> int:
    """The bytes that a refusal names."""
    with pytest.raises(DoesNotFit) as caught:
        load()
    found = re.search(r"\((\d+) bytes", str(caught.value))
    assert found is not None
    return int(found[1])


def generate(engine: Engine, kind: str = "greedy", **options) -> Generation:
    """Some tokens, with no more bytes held than was asked."""
    chosen = {"greedy": GREEDY, "sampled": SAMPLED}[kind]
    options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, **chosen, **options}
    done = engine.generate(options.pop("prompt", PROMPT), **options)
    assert_within_budgets(engine, done)
    return done


def look(engine: Engine, kind: str = "greedy") -> Seen:
    done = generate(engine, kind)
    return Seen(done.token_ids, done.logprobs, engine.logits(PROMPT))


def assert_within_budgets(engine: Engine, done: Generation) -> None:
    held, needed = done.stats.held, engine.plan.footprint
    assert held.hbm_bytes <= needed.hbm <= held.hbm_budget_bytes
    assert held.dram_bytes <= needed.dram <= held.dram_budget_bytes


def assert_same(given: Seen, wanted: Seen) -> None:
    """Bit by bit."""
    assert given.token_ids == wanted.token_ids
    assert given.logprobs == wanted.logprobs
    assert given.logits.dtype == np.float32
    assert np.array_equal(given.logits, wanted.logits)
