"""A LLaMA for training: Flax NNX, whole sequences in batches, Hugging Face's names.

Knows no text, optimiser or checkpoint. Weights are [out, in] and sit under the names of
a safetensors checkpoint, so that the model's flat state is that checkpoint.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu}
INIT_DEVIATION = 0.02


class Linear(nnx.Module):
    """x W^T."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        noise = jax.random.normal(rngs.params(), (outputs, inputs), jnp.float32)
        self.weight = nnx.Param(INIT_DEVIATION * noise)

    def __call__(self, x: Array) -> Array:
        return x @ self.weight[...].astype(x.dtype).T


class Norm(nnx.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size, jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = jnp.broadcast_to(self.weight[...], wide.shape)
        return (wide * jax.lax.rsqrt(mean + self.eps) * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        self.heads, self.kv_heads = heads, config["num_key_value_heads"]
        self.size = hidden // heads
        self.theta = float(config["rope_theta"])
        self.q_proj = Linear(hidden, hidden, rngs)
        self.k_proj = Linear(hidden, self.kv_heads * self.size, rngs)
        self.v_proj = Linear(hidden, self.kv_heads * self.size, rngs)
        self.o_proj = Linear(hidden, hidden, rngs)

    def __call__(self, x: Array) -> Array:
        batch, length, _ = x.shape

        def heads(y: Array) -> Array:
            return y.reshape(batch, length, -1, self.size)

        q, k = (rotate(heads(p(x)), self.theta) for p in (self.q_proj, self.k_proj))
        mixed = jax.nn.dot_product_attention(
            q, k, heads(self.v_proj(x)), is_causal=True
        )
        return self.o_proj(mixed.reshape(batch, length, -1))


def rotate(x: Array, theta: float) -> Array:
    """Rotary positions 0 .. T-1 on [B, T, heads, d], halves paired."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), theta ** (-np.arange(half) / half))
    cos, sin = (
        jnp.asarray(f(angles), jnp.float32)[None, :, None, :] for f in (np.cos, np.sin)
    )
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.broadcast_to(cos, a.shape), jnp.broadcast_to(sin, a.shape)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class FeedForward(nnx.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
        hidden, neurons = config["hidden_size"], config["intermediate_size"]
        self.act = ACTIVATIONS[config["hidden_act"]]
        self.gate_proj = Linear(hidden, neurons, rngs)
        self.up_proj = Linear(hidden, neurons, rngs)
        self.down_proj = Linear(neurons, hidden, rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = Norm(hidden, eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = Norm(hidden, eps)
        self.mlp = FeedForward(config, rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """Token ids [B, T] to logits [B, T, V]; the output matrix is the embedding.

    dtype: of products and activations; weights are float32.
    """

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs, dtype: Any):
        hidden = config["hidden_size"]
        self.dtype = dtype
        self.embed_tokens = Linear(hidden, config["vocab_size"], rngs)
        self.layers = nnx.List(
            [Layer(config, rngs) for _ in range(config["num_hidden_layers"])]
        )
        self.norm = Norm(hidden, config["rms_norm_eps"])

    def __call__(self, ids: Array) -> Array:
        x = self.embed_tokens.weight[...][ids].astype(self.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.embed_tokens(self.norm(x)).astype(jnp.float32)


def weight_name(path: tuple[Any, ...]) -> str:
    """The checkpoint's name of a parameter's path."""
    return ".".join(["model", *map(str, path)])


def mean_loss(logits: Array, targets: Array) -> Array:
    """Mean cross-entropy in nats a token."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.mean(jnp.take_along_axis(logprobs, targets[..., None], axis=-1))
