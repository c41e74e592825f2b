"""One request at a time."""

import pytest

import m2jax
from m2jax.turns import in_turn

IDS = [3, 17, 5, 80, 33, 2, 64]


def test_a_request_in_the_middle_of_another_is_refused_and_harms_neither(tiny_store):
    with m2jax.load(tiny_store, mix="25/25/50", draft="none", hbm="1GiB") as engine:
        wanted = engine.logits(IDS)
        turns = in_turn(engine.runner.tiers, 3, [])
        assert next(turns) == 0
        # As from another thread, between two layers of this one.
        with pytest.raises(RuntimeError, match="one request at a time"):
            engine.logits(IDS)
        assert list(turns) == [1, 2]
        assert (engine.logits(IDS) == wanted).all()
