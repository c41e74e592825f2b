"""What the target says of drafted tokens: how many of them are its own choice.

A token is the largest of `sampling.preferences`, whose noise hangs on seed and position
alone. So a draft stands as long as it is what the target chooses itself: the text is
the target's own, greedy or drawn, whatever was drafted and however much at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from m2jax import model
from m2jax.config import ModelConfig
from m2jax.model import Bank
from m2jax.sampling import NOT_A_TOKEN, SamplingMode, SamplingValues, preferences

# A block of tokens and one token alone are rounded differently. Logits of both ways
# differ by less than 1e-4 on the models measured (docs/speculation.md); a choice that
# leads by less than this is left to one token alone.
LEAST_LEAD = 2e-3
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
    embedding: Array,
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
    logits = model.logits(head, embedding, x, config=config)

    def choose(carry: tuple[Array, Array, Array], row) -> tuple:
        seen, alive, unsure = carry
        of_row, wanted, place = row
        liked = preferences(of_row, seen, position + place, values, mode=mode)
        best, ids = lax.top_k(liked, 2)
        lead = best[0] - best[1]
        if not mode.greedy:
            lead = lead * values.temperature
        finite = jnp.all(jnp.isfinite(of_row))
        sure = (lead >= LEAST_LEAD) | ~finite
        token = jnp.where(finite, ids[0].astype(jnp.int32), NOT_A_TOKEN)
        taken = alive & sure
        noted = seen.at[token].set(True, mode="drop")
        seen = jnp.where(taken, noted, seen)
        logprob = jax.nn.log_softmax(of_row)[ids[0]]
        after = taken & (token == wanted)
        return (seen, after, unsure | (alive & ~sure)), (token, logprob, taken)

    start = (seen, jnp.bool_(True), jnp.bool_(False))
    rows = (logits, drafted, jnp.arange(len(drafted), dtype=jnp.int32))
    (seen, _, unsure), (tokens, logprobs, taken) = lax.scan(choose, start, rows)
    count = jnp.sum(taken.astype(jnp.int32))
    return Verified(tokens, logprobs, count, unsure, seen)
