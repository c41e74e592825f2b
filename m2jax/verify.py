"""What the target says of drafted tokens: how many of them are its own choice.

A token is the largest of `sampling.preferences`, whose noise hangs on seed and position
alone. So a draft stands as long as it is what the target chooses itself: the text is
the target's own, greedy or drawn, whatever was drafted and however much at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from m2jax import model
from m2jax.config import ModelConfig
from m2jax.model import Bank
from m2jax.sampling import (
    NOT_A_TOKEN,
    SamplingMode,
    SamplingValues,
    possible_preferences,
)

# A block of tokens and one token alone are rounded differently. Logits of both ways
# differ by less than MOST_OFF on the models measured (docs/speculation.md); a choice
# that leads by less than LEAST_LEAD, or that truncation might turn if logits were that
# far off, is left to one token alone.
LEAST_LEAD, MOST_OFF = 2e-3, 1e-4
NOT_DRAFTED = -2


class Verified(NamedTuple):
    """The target's choices after T tokens in a row.

    tokens, logprobs: [T]; those of the first `taken` are the text's next ones.
    taken: int32, up to and with the first choice that was not drafted.
    unsure: bool, whether it ends before a choice that rounding might turn; nothing
    after it is taken.
    seen: bool [V] with the tokens taken noted.
    """

    tokens: Array
    logprobs: Array
    taken: Array
    unsure: Array
    seen: Array


def verify(
    head: Bank,
    embed: Bank,
    x: Array,
    drafted: Array,
    seen: Array,
    position: Array,
    values: SamplingValues,
    *,
    config: ModelConfig,
    mode: SamplingMode,
) -> Verified:
    """Chooses after each of T tokens, as far as the draft is right.

    Args:
        x: [T, D] residual stream after the last layer: of the text's last token, then
            of the drafted ones.
        drafted: int32 [T], what was drafted after each; NOT_DRAFTED where nothing was.
        seen: bool [V], tokens already in prompt or text.
        position: int32 scalar, of the first token chosen.
    """
    logits = model.logits(head, embed, x, config=config)
    positions = position + jnp.arange(len(drafted), dtype=jnp.int32)
    # A penalty multiplies logits, and what they are off with them.
    penalty = values.repetition_penalty if mode.penalises else jnp.float32(1)
    times = jnp.maximum(penalty, 1 / jnp.asarray(penalty))
    of_row = partial(
        possible_preferences, values=values, mode=mode, off=times * MOST_OFF
    )
    if mode.penalises:
        liked, kept = _one_by_one(of_row, logits, drafted, seen, positions)
    else:
        liked, kept = jax.vmap(lambda row, at: of_row(row, seen, at))(logits, positions)
    best, lead = best_and_lead(liked, values, mode=mode)
    finite = jnp.all(jnp.isfinite(logits), axis=1)
    tokens = jnp.where(finite, best, NOT_A_TOKEN)
    stays = jnp.take_along_axis(kept, best[:, None], axis=1)[:, 0]
    sure = ((lead >= times * LEAST_LEAD) & stays) | ~finite
    # Reached: all before was right and sure.
    right = jnp.cumprod((sure & (tokens == drafted)).astype(jnp.int32))
    reached = jnp.concatenate([jnp.ones(1, jnp.int32), right[:-1]]) > 0
    taken = reached & sure
    return Verified(
        tokens=tokens,
        logprobs=jnp.take_along_axis(
            jax.nn.log_softmax(logits, axis=1), best[:, None], axis=1
        )[:, 0],
        taken=jnp.sum(taken.astype(jnp.int32)),
        unsure=jnp.any(reached & ~sure),
        seen=seen.at[jnp.where(taken, tokens, seen.size)].set(True, mode="drop"),
    )


def best_and_lead(
    liked: Array, values: SamplingValues, *, mode: SamplingMode
) -> tuple[Array, Array]:
    """The token that each row of preferences [T, V] prefers, int32 [T], and by how
    much, in nats of the logits, float32 [T]."""
    best = jnp.argmax(liked, axis=1).astype(jnp.int32)
    others = liked.at[jnp.arange(len(best)), best].set(-jnp.inf)
    lead = jnp.max(liked, axis=1) - jnp.max(others, axis=1)
    return best, lead if mode.greedy else lead * values.temperature


def _one_by_one(
    of_row: Callable[[Array, Array, Array], tuple[Array, Array]],
    logits: Array,
    drafted: Array,
    seen: Array,
    positions: Array,
) -> tuple[Array, Array]:
    """`of_row` of each row, where the tokens of the rows before it are seen: [T, V]."""

    def row(
        seen: Array, of: tuple[Array, Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        logits, after, place = of
        found = of_row(logits, seen, place)
        noted = jnp.where(after < 0, seen.size, after)
        return seen.at[noted].set(True, mode="drop"), found

    return lax.scan(row, seen, (logits, drafted, positions))[1]
