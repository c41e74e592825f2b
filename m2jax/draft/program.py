"""Drafting in one program: tokens after a text as long as they are likely to count.

The loop of `device_loop`, with an end that hangs on how sure the draft is.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from m2jax import model
from m2jax.config import ModelConfig
from m2jax.device_loop import through_layers
from m2jax.draft.pace import LEADS, MOST_ROWS
from m2jax.ffn_spec import FfnSpec
from m2jax.kv import LayerKV
from m2jax.layer import LayerParams
from m2jax.model import Bank
from m2jax.sampling import SamplingMode, SamplingValues, preferences
from m2jax.verify import best_and_lead


class Drafted(NamedTuple):
    """State of the loop, and what it ends with.

    tokens, leads: int32 [MOST_ROWS], written from 0: tokens, and the place of each
    one's lead among LEADS. count: int32, how many. token: the last one. chance: that
    all of them are right. kv: of the text up to the last but one. seen: bool [V].
    """

    tokens: Array
    leads: Array
    count: Array
    token: Array
    position: Array
    chance: Array
    kv: list[LayerKV]
    seen: Array


def draft(
    embed: Bank,
    layers: list[LayerParams],
    head: Bank,
    planes: list[dict[str, Array]],
    kv: list[LayerKV],
    token: Array,
    position: Array,
    seen: Array,
    limit: Array,
    chances: Array,
    least_chance: Array,
    eos: Array,
    values: SamplingValues,
    *,
    config: ModelConfig,
    specs: tuple[FfnSpec, ...],
    lookahead: int,
    mode: SamplingMode,
) -> Drafted:
    """Up to `limit` tokens after `token`, which is at `position`.

    Ends after a token of `eos`, or once all are right with less than least_chance.

    Args:
        kv: written from `position` on.
        chances: float32 [len(LEADS) + 1] that a token is right, by its lead.
    """
    start = Drafted(
        tokens=jnp.zeros(MOST_ROWS, jnp.int32),
        leads=jnp.zeros(MOST_ROWS, jnp.int32),
        count=jnp.int32(0),
        token=token,
        position=position,
        chance=jnp.float32(1),
        kv=kv,
        seen=seen,
    )

    def more(state: Drafted) -> Array:
        ended = (state.count > 0) & jnp.any(state.token == eos)
        return (state.count < limit) & ~ended & (state.chance >= least_chance)

    def step(state: Drafted) -> Drafted:
        x, kv, _, _ = through_layers(
            embed,
            layers,
            planes,
            state.token,
            state.position,
            state.kv,
            [{}] * len(layers),
            config=config,
            specs=specs,
            lookahead=lookahead,
        )
        x, end, rows = lax.optimization_barrier((x, head, embed))
        logits = model.logits(end, rows, x, config=config)[0]
        position = state.position + 1
        liked = preferences(logits, state.seen, position, values, mode=mode)
        best, lead = best_and_lead(liked[None], values, mode=mode)
        place = jnp.searchsorted(jnp.array(LEADS), lead[0]).astype(jnp.int32)
        return Drafted(
            tokens=state.tokens.at[state.count].set(best[0]),
            leads=state.leads.at[state.count].set(place),
            count=state.count + 1,
            token=best[0],
            position=position,
            chance=state.chance * chances[place],
            kv=kv,
            seen=state.seen.at[best[0]].set(True),
        )

    return lax.while_loop(more, step, start)
