"""The jitted steps that the engine's host loop and the resident loop are made of.

Both run the very same pieces, fenced by `optimization_barrier` where the loop is one
program, so that what a token is does not depend on where its weights lay.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from m2jax import model
from m2jax.config import ModelConfig
from m2jax.ffn import (
    BasePass,
    ClassIds,
    FfnSpec,
    NeuronRows,
    base_pass,
    feed_forward,
    feed_forward_block,
    rank,
    split_classes,
)
from m2jax.kv import LayerKV
from m2jax.model import Bank
from m2jax.sampling import SamplingMode, SamplingValues, sample


class LayerParams(NamedTuple):
    """What of a layer is always on the device.

    attention: see `params.layer_shapes`. scales: float16 [N, 3, groups]. down_norm:
    float32 [N]. window: int32 scalar, positions a query sees.
    """

    attention: Bank
    scales: Array
    down_norm: Array
    window: Array


class Attended(NamedTuple):
    """What attention and ranking hand to the feed-forward block of one token."""

    x: Array
    h: Array
    base: BasePass | None
    ids: ClassIds


def attend_and_rank(
    params: LayerParams,
    q4: Array | None,
    x: Array,
    kv: LayerKV,
    position: Array,
    *,
    config: ModelConfig,
    spec: FfnSpec,
) -> tuple[Attended, LayerKV]:
    """Attention of one token, then who of the layer's neurons is wanted."""
    x, h, kv = model.attend(
        params.attention, x, kv, position, params.window, config=config
    )
    base = None
    if spec.uses_base:
        assert q4 is not None
        base = base_pass(h, q4, params.scales, spec=spec)
    if spec.ranked and base is not None:
        ids = rank(base, params.down_norm, spec=spec)[0]
    else:
        ids = jnp.arange(spec.ranked_counts.kept, dtype=jnp.int32)
    return Attended(x, h, base, split_classes(ids, spec=spec)), kv


def add_feed_forward(
    params: LayerParams,
    attended: Attended,
    planes: dict[str, NeuronRows],
    *,
    spec: FfnSpec,
) -> Array:
    """Residual stream [1, D] after the layer."""
    x, h, base, ids = attended
    return x + feed_forward(h, base, ids, planes, params.scales, spec=spec)


def layer_block(
    params: LayerParams,
    planes: dict[str, Array],
    x: Array,
    kv: LayerKV,
    position: Array,
    *,
    config: ModelConfig,
    spec: FfnSpec,
) -> tuple[Array, LayerKV]:
    """A whole layer for T tokens [T, D] at `position`, from whole planes."""
    x, h, kv = model.attend(
        params.attention, x, kv, position, params.window, config=config
    )
    y = feed_forward_block(h, planes, params.scales, params.down_norm, spec=spec)
    return x + y, kv


def next_token(
    head: Bank,
    embedding: Array,
    x: Array,
    seen: Array,
    position: Array,
    values: SamplingValues,
    *,
    config: ModelConfig,
    mode: SamplingMode,
) -> tuple[Array, Array, Array]:
    """Token and logprob chosen after x [1, D], and `seen` with the token noted."""
    logits = model.logits(head, embedding, x, config=config)[0]
    token, logprob = sample(logits, seen, position, values, mode=mode)
    return token, logprob, seen.at[token].set(True, mode="drop")


def target_logprobs(
    head: Bank, embedding: Array, x: Array, targets: Array, *, config: ModelConfig
) -> Array:
    """log p(target) after each row of x: [T, D], [T] -> [T] float32."""
    logits = model.logits(head, embedding, x, config=config)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]


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
    spec: FfnSpec,
    mode: SamplingMode,
) -> ResidentCarry:
    """Decodes up to `limit` tokens in one program: no host sync a token.

    Ends early after a token of `eos` (kept) or NOT_A_TOKEN.
    """

    def more(carry: ResidentCarry) -> Array:
        ended = jnp.any(carry.token == eos) | (carry.token < 0)
        return (carry.count < limit) & ~ended

    def step(carry: ResidentCarry) -> ResidentCarry:
        x = model.embed(embed, carry.token[None], config=config)
        kv = list(carry.kv)
        for layer in range(len(layers)):
            # Weights too: what does not hang on the loop's state is moved out of the
            # loop, and a float32 copy of every plane would outlive it there.
            x, kv[layer], params, records = lax.optimization_barrier(
                (x, kv[layer], layers[layer], planes[layer])
            )
            attended, kv[layer] = attend_and_rank(
                params,
                records.get("q4"),
                x,
                kv[layer],
                carry.position,
                config=config,
                spec=spec,
            )
            attended = lax.optimization_barrier(attended)
            rows = {
                plane: NeuronRows(
                    whole, None if spec.dense(plane) else attended.ids.by_plane(plane)
                )
                for plane, whole in records.items()
            }
            x = add_feed_forward(params, attended, rows, spec=spec)
        x, end, embedding = lax.optimization_barrier((x, head, embed["embedding"]))
        position = carry.position + 1
        token, logprob, seen = next_token(
            end,
            embedding,
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


@dataclass(frozen=True)
class Steps:
    """The steps of one model under one mix, each compiled once a shape."""

    config: ModelConfig
    spec: FfnSpec

    @cached_property
    def embed(self):
        return jax.jit(partial(model.embed, config=self.config))

    @cached_property
    def attend_and_rank(self):
        step = partial(attend_and_rank, config=self.config, spec=self.spec)
        return jax.jit(step, donate_argnums=3)

    @cached_property
    def add_feed_forward(self):
        return jax.jit(partial(add_feed_forward, spec=self.spec))

    @cached_property
    def layer_block(self):
        step = partial(layer_block, config=self.config, spec=self.spec)
        return jax.jit(step, donate_argnums=3)

    @cached_property
    def next_token(self):
        step = partial(next_token, config=self.config)
        return jax.jit(step, static_argnames="mode", donate_argnums=3)

    @cached_property
    def logits(self):
        return jax.jit(partial(model.logits, config=self.config))

    @cached_property
    def target_logprobs(self):
        return jax.jit(partial(target_logprobs, config=self.config))

    @cached_property
    def generate_resident(self):
        step = partial(generate_resident, config=self.config, spec=self.spec)
        return jax.jit(
            step,
            static_argnames="mode",
            donate_argnames="carry",
            compiler_options=_RESIDENT_OPTIONS.get(jax.default_backend()),
        )


# XLA:CPU otherwise widens the weights of many layers ahead of their use: 2.9 MB of
# workspace for the bundled model instead of 0.65.
_RESIDENT_OPTIONS = {"cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False}}
