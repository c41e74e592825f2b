"""The layers of a pass, one after the other: when each may be begun."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
from jax import Array

from m2jax.cache.manager import TierManager
from m2jax.timeline import span


def in_turn(
    tiers: TierManager, layers: int, newest: Sequence[Array], *, ahead: bool = True
) -> Iterator[int]:
    """Layers 0, 1, .. of one pass, each as soon as its compute may be dispatched: while
    the layer before it computes; where its rows are not here, once that has ended, for
    its buffer is then read into at once. In the end all is computed.

    If the consumer fails, the tiers forget what is half done.

    Args:
        newest: what the consumer dispatched last, kept up to date by it.
        ahead: False: always once the layer before has ended.
    """
    with whole_pass(tiers):
        before: list[Array] = []
        computed = 0
        for layer in range(layers):
            with span(tiers.timeline, "compute", layer=layer):
                jax.block_until_ready(before)
                here = ahead and tiers.is_here(layer)
                if not here:
                    jax.block_until_ready(list(newest))
            # Held no longer than it is waited for: of a long prompt it is large.
            before = list(newest) if ahead else []
            for done in range(computed, layer - here):
                tiers.computed(done)
            computed = max(computed, layer - here)
            yield layer
        with span(tiers.timeline, "compute"):
            jax.block_until_ready(list(newest))
        for done in range(computed, layers):
            tiers.computed(done)


@contextmanager
def whole_pass(tiers: TierManager) -> Iterator[None]:
    """A pass over the layers; if it fails, the tiers forget what is half done.

    Raises:
        RuntimeError: another thread is in the middle of one.
    """
    if not tiers.at_work.acquire(blocking=False):
        raise RuntimeError(
            "another thread is at work on this engine, which takes one request at a "
            "time: give each thread an engine, or hold a lock"
        )
    try:
        yield
    except BaseException:
        tiers.abandon()
        raise
    finally:
        tiers.at_work.release()


def give_up(tiers: TierManager) -> None:
    """What is half done is forgotten, unless it is another thread's."""
    if tiers.at_work.acquire(blocking=False):
        try:
            tiers.abandon()
        finally:
            tiers.at_work.release()
