"""Decoding without a host: everything on the device, one loop in one program.

Made of the functions of `layer` and `output`, fenced by `optimization_barrier`, so that
what a token is does not depend on where its weights lay.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from m2jax import model
from m2jax.config import ModelConfig
from m2jax.ffn import NeuronRows
from m2jax.ffn_spec import FfnSpec
from m2jax.kv import LayerKV
from m2jax.layer import LayerParams, add_feed_forward, attend_and_rank, ranked_ahead
from m2jax.model import Bank
from m2jax.output import next_token
from m2jax.sampling import SamplingMode, SamplingValues

# XLA:CPU otherwise widens the weights of many layers ahead of their use: 2.9 MB of
# workspace for the bundled model instead of 0.65.
COMPILER_OPTIONS = {"cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False}}


class ResidentCarry(NamedTuple):
    """State of the loop without a host.

    tokens, logprobs: [n] written from 0. count: int32, how many. token: the last one.
    """

    tokens: Array
    logprobs: Array
    count: Array
    token: Array
    position: Array
    kv: list[LayerKV]
    seen: Array


def generate_resident(
    embed: Bank,
    layers: list[LayerParams],
    head: Bank,
    planes: list[dict[str, Array]],
    carry: ResidentCarry,
    limit: Array,
    eos: Array,
    values: SamplingValues,
    *,
    config: ModelConfig,
    specs: tuple[FfnSpec, ...],
    lookahead: int,
    mode: SamplingMode,
) -> ResidentCarry:
    """Decodes up to `limit` tokens in one program: no host sync a token.

    Ends early after a token of `eos` (kept) or NOT_A_TOKEN.
    """

    def more(carry: ResidentCarry) -> Array:
        ended = jnp.any(carry.token == eos) | (carry.token < 0)
        return (carry.count < limit) & ~ended

    def step(carry: ResidentCarry) -> ResidentCarry:
        x, kv = through_layers(
            embed,
            layers,
            planes,
            carry.token,
            carry.position,
            carry.kv,
            config=config,
            specs=specs,
            lookahead=lookahead,
        )
        x, end, rows = lax.optimization_barrier((x, head, embed))
        position = carry.position + 1
        token, logprob, seen = next_token(
            end,
            rows,
            x,
            carry.seen,
            position,
            values,
            config=config,
            mode=mode,
        )
        return ResidentCarry(
            tokens=carry.tokens.at[carry.count].set(token),
            logprobs=carry.logprobs.at[carry.count].set(logprob),
            count=carry.count + 1,
            token=token,
            position=position,
            kv=kv,
            seen=seen,
        )

    return lax.while_loop(more, step, carry)


def through_layers(
    embed: Bank,
    layers: list[LayerParams],
    planes: list[dict[str, Array]],
    token: Array,
    position: Array,
    kv: list[LayerKV],
    *,
    config: ModelConfig,
    specs: tuple[FfnSpec, ...],
    lookahead: int,
) -> tuple[Array, list[LayerKV]]:
    """One token through all layers, from whole planes: [1, D] and the cache."""
    x = model.embed(embed, token[None], config=config)
    kv = list(kv)
    ids = None
    for layer, spec in enumerate(specs):
        # Weights too: what does not hang on the loop's state is moved out of the
        # loop, and a float32 copy of every plane would outlive it there.
        x, kv[layer], params, records = lax.optimization_barrier(
            (x, kv[layer], layers[layer], planes[layer])
        )
        following, following_spec = ranked_ahead(
            layers, specs, layer, lookahead=lookahead
        )
        attended, kv[layer], ids = attend_and_rank(
            params,
            records.get("q4"),
            x,
            kv[layer],
            position,
            ids,
            following,
            config=config,
            spec=spec,
            following_spec=following_spec,
        )
        attended, ids = lax.optimization_barrier((attended, ids))
        rows = {
            plane: NeuronRows(
                records[plane],
                None if spec.dense(plane) else attended.ids.by_plane(plane),
            )
            for plane in spec.wanted
        }
        x = add_feed_forward(params, attended, rows, spec=spec)
    return x, kv
