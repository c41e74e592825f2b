"""Decoding without a host: one loop in one program, from records that are on the device
or that it fetches from DRAM by itself.

Made of the functions of `layer` and `output`, fenced by `optimization_barrier`, so that
what a token is does not depend on where its weights lay.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from m2jax import model
from m2jax.cache.fetched import HostRows, Pool, take
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

# The most that one run makes: of one size, so that one program serves all.
RUN_TOKENS = 256

# A whole plane on the device, or where it fetches one.
Source = Array | HostRows


class LoopCarry(NamedTuple):
    """State of the loop without a host.

    tokens, logprobs: [RUN_TOKENS] written from 0. count: int32, how many. token: the
    last one. pools: of each layer by plane, where there are any. loads: plane to int32,
    records that were loaded into them.
    """

    tokens: Array
    logprobs: Array
    count: Array
    token: Array
    position: Array
    kv: list[LayerKV]
    seen: Array
    pools: list[dict[str, Pool]]
    loads: dict[str, Array]


def first_carry(token: int, position: int, kv: list[LayerKV], seen: Array) -> LoopCarry:
    """Of a loop that writes what comes after `token`, which is at `position`."""
    return LoopCarry(
        tokens=jnp.zeros(RUN_TOKENS, jnp.int32),
        logprobs=jnp.zeros(RUN_TOKENS, jnp.float32),
        count=jnp.int32(0),
        token=jnp.int32(token),
        position=jnp.int32(position),
        kv=kv,
        seen=seen,
        pools=[],
        loads={},
    )


def generate_on_device(
    embed: Bank,
    layers: list[LayerParams],
    head: Bank,
    planes: Sequence[Mapping[str, Source]],
    carry: LoopCarry,
    limit: Array,
    eos: Array,
    values: SamplingValues,
    *,
    config: ModelConfig,
    specs: tuple[FfnSpec, ...],
    lookahead: int,
    mode: SamplingMode,
) -> LoopCarry:
    """Decodes up to `limit` tokens, RUN_TOKENS at most, in one program: no host sync a
    token.

    Ends early after a token of `eos` (kept) or NOT_A_TOKEN.
    """

    def more(carry: LoopCarry) -> Array:
        ended = jnp.any(carry.token == eos) | (carry.token < 0)
        return (carry.count < limit) & ~ended

    def step(carry: LoopCarry) -> LoopCarry:
        x, kv, pools, loads = through_layers(
            embed,
            layers,
            planes,
            carry.token,
            carry.position,
            carry.kv,
            carry.pools,
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
        return LoopCarry(
            tokens=carry.tokens.at[carry.count].set(token),
            logprobs=carry.logprobs.at[carry.count].set(logprob),
            count=carry.count + 1,
            token=token,
            position=position,
            kv=kv,
            seen=seen,
            pools=pools,
            loads={p: count + loads[p] for p, count in carry.loads.items()},
        )

    return lax.while_loop(more, step, carry)


def through_layers(
    embed: Bank,
    layers: list[LayerParams],
    planes: Sequence[Mapping[str, Source]],
    token: Array,
    position: Array,
    kv: list[LayerKV],
    pools: list[dict[str, Pool]],
    *,
    config: ModelConfig,
    specs: tuple[FfnSpec, ...],
    lookahead: int,
) -> tuple[Array, list[LayerKV], list[dict[str, Pool]], dict[str, Array | int]]:
    """One token through all layers.

    Returns:
        [1, D], the cache, the pools, and plane to records that were loaded into them.
    """
    x = model.embed(embed, token[None], config=config)
    kv, pools = list(kv), [dict(of_layer) for of_layer in pools]
    loads: dict[str, Array | int] = defaultdict(int)
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
        whole = {p: take(records[p], None, None) for p in spec.wanted if spec.dense(p)}
        q4 = whole["q4"].records if spec.base_whole else None
        attended, kv[layer], ids = attend_and_rank(
            params,
            q4,
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
        rows = {}
        for plane in spec.wanted:
            taken = whole.get(plane) or take(
                records[plane],
                pools[layer].get(plane),
                attended.ids.by_plane(plane),
            )
            rows[plane] = NeuronRows(taken.records, taken.slots)
            if taken.pool is not None:
                pools[layer][plane] = taken.pool
                loads[plane] += taken.loads
        x = add_feed_forward(params, attended, rows, spec=spec)
    return x, kv, pools, loads
