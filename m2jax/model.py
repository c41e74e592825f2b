"""The dense part of a decoder: embedding, attention, norms, output head.

Flax NNX modules are definitions only: each is split once, and the steps merge its
graph with a plain dict of arrays (a bank, see `params`) inside `jax.jit`. Knows
nothing of neurons, tiers or files.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from m2jax import rope
from m2jax.config import ModelConfig
from m2jax.kernels import attention
from m2jax.kernels.linear import Packed, linear, unpack, widen
from m2jax.kv import LayerKV, write
from m2jax.params import Shapes, embed_shapes, head_shapes, layer_shapes

Bank = dict[str, Array]
# What a packed matrix adds to its name, see `packed_names`.
RESIDUAL, SCALES = "_r4", "_scales"


def packed_names(name: str, bits: int) -> tuple[str, ...]:
    """Arrays of a matrix in a bank: the numbers themselves, or at 8 or 4 bits plane q4
    under its own name, plane r4, and scales."""
    if bits == 16:
        return (name,)
    return (name, *([name + RESIDUAL] if bits == 8 else []), name + SCALES)


def matrix(bank: Bank, name: str) -> Array | Packed:
    """A matrix of a bank, as `linear` takes it."""
    if name + SCALES not in bank:
        return bank[name]
    return Packed(bank[name], bank.get(name + RESIDUAL), bank[name + SCALES])


def _bits(bank: Bank) -> int:
    """Of a bank's matrices; 16 where it has none."""
    if any(name.endswith(RESIDUAL) for name in bank):
        return 8
    return 4 if any(name.endswith(SCALES) for name in bank) else 16


def rms_norm(x: Array, weight: Array, *, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + eps) * _over_last(weight, x)


def _over_last(row: Array, x: Array) -> Array:
    """A stored vector, widened, with the rank of x."""
    return widen(row).reshape((1,) * (x.ndim - 1) + row.shape)


class _Banked(nnx.Module):
    """A module whose parameters are a bank's arrays, by the same names."""

    def __init__(self, config: ModelConfig, shapes: Shapes, bits: int):
        self.config = config
        self.names = tuple(
            part
            for name, shape in shapes.items()
            for part in (packed_names(name, bits) if len(shape) == 2 else (name,))
        )
        for name in self.names:
            setattr(self, name, nnx.Param(jnp.zeros(())))

    def matrix(self, name: str) -> Array | Packed:
        return matrix({part: getattr(self, part)[...] for part in self.names}, name)


class Embedding(_Banked):
    """Rows of the embedding matrix."""

    def __init__(self, config: ModelConfig, bits: int):
        super().__init__(config, embed_shapes(config), bits)

    def __call__(self, ids: Array) -> Array:
        """ids [T] int32 -> [T, D] float32."""
        rows = jax.tree.map(lambda array: array[ids], self.matrix("embedding"))
        if isinstance(rows, Packed):
            return unpack(rows)[:, : self.config.hidden_size]
        return widen(rows)


class Attention(_Banked):
    """Grouped-query attention with its two norms: x -> x + o(attend(norm(x)))."""

    input_norm: nnx.Param
    qkv_bias: nnx.Param
    q_norm: nnx.Param
    k_norm: nnx.Param
    o_bias: nnx.Param
    ffn_norm: nnx.Param

    def __init__(self, config: ModelConfig, bits: int):
        super().__init__(config, layer_shapes(config), bits)

    def __call__(
        self, x: Array, kv: LayerKV, position: Array, window: Array
    ) -> tuple[Array, Array, LayerKV]:
        """One block of T tokens at `position` and after it.

        Args:
            x: [T, D] float32 residual stream.
            kv: this layer's cache, [G, C, d].
            position: int32 scalar, of the first token.
            window: int32 scalar, positions a query sees, itself included.

        Returns:
            The residual stream after attention, the feed-forward block's input
            (normalised), both [T, D], and the cache with the block written.
        """
        config = self.config
        tokens = x.shape[0]
        groups, head_dim = config.num_kv_heads, config.head_dim
        eps = config.rms_norm_eps
        h = rms_norm(x, self.input_norm[...], eps=eps)
        qkv = linear(h, self.matrix("qkv"))
        if config.qkv_bias:
            qkv = qkv + _over_last(self.qkv_bias[...], qkv)
        qkv = qkv.reshape(tokens, -1, head_dim)
        q, k, v = jnp.split(qkv, [config.num_heads, config.num_heads + groups], axis=1)
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], eps=eps)
            k = rms_norm(k, self.k_norm[...], eps=eps)
        positions = position + jnp.arange(tokens)
        inverse = rope.inverse_frequencies(config)
        q = rope.rotate(q, positions, inverse)
        k = rope.rotate(k, positions, inverse)
        kv = write(kv, k.swapaxes(0, 1), v.swapaxes(0, 1), position)
        mixed = attention.attend(q, kv.keys, kv.values, positions, window)
        out = linear(mixed.reshape(tokens, -1), self.matrix("o"))
        if config.o_bias:
            out = out + _over_last(self.o_bias[...], out)
        x = x + out
        return x, rms_norm(x, self.ffn_norm[...], eps=eps), kv


class Head(_Banked):
    """Final norm and output matrix."""

    norm: nnx.Param

    def __init__(self, config: ModelConfig, bits: int):
        super().__init__(config, head_shapes(config), bits)

    def __call__(self, x: Array, embed: Bank) -> Array:
        """x [T, D] -> logits [T, V] float32; the embedding serves where it is tied."""
        tied = self.config.tie_embeddings
        out = matrix(embed, "embedding") if tied else self.matrix("lm_head")
        return linear(rms_norm(x, self.norm[...], eps=self.config.rms_norm_eps), out)


@lru_cache(maxsize=64)
def _graph(
    module: Callable[[ModelConfig, int], nnx.Module], config: ModelConfig, bits: int
):
    return nnx.split(nnx.eval_shape(lambda: module(config, bits)))[0]


def _merged(
    module: Callable[[ModelConfig, int], nnx.Module], bank: Bank, config: ModelConfig
) -> Any:
    return nnx.merge(_graph(module, config, _bits(bank)), bank)


def embed(bank: Bank, ids: Array, *, config: ModelConfig) -> Array:
    """ids [T] -> residual stream [T, D]."""
    return _merged(Embedding, bank, config)(ids)


def attend(
    bank: Bank,
    x: Array,
    kv: LayerKV,
    position: Array,
    window: Array,
    *,
    config: ModelConfig,
) -> tuple[Array, Array, LayerKV]:
    """One layer's attention; see `Attention.__call__`."""
    return _merged(Attention, bank, config)(x, kv, position, window)


def logits(bank: Bank, embed: Bank, x: Array, *, config: ModelConfig) -> Array:
    """Residual stream [T, D] -> logits [T, V]."""
    return _merged(Head, bank, config)(x, embed)
