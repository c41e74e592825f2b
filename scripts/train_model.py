"""A LLaMA for training: Flax NNX, whole sequences in batches, Hugging Face's names.

Knows no text, optimiser or checkpoint. Weights are float32 [out, in] and sit where a
safetensors checkpoint has them, so that the model's flat state is that checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from m2jax import rope
from m2jax.config import ModelConfig

ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu}
INIT_DEVIATION = 0.02
EMBEDDING = "model.embed_tokens.weight"

Weights = dict[str, Array]


class Linear(nnx.Module):
    """x W^T, in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        noise = jax.random.normal(rngs.params(), (outputs, inputs), jnp.float32)
        self.weight = nnx.Param(jnp.float32(INIT_DEVIATION) * noise)

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

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        hidden = config.hidden_size
        query = config.num_heads * config.head_dim
        key = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden, query, rngs)
        self.k_proj = Linear(hidden, key, rngs)
        self.v_proj = Linear(hidden, key, rngs)
        self.o_proj = Linear(query, hidden, rngs)

    def __call__(self, x: Array) -> Array:
        batch, length, _ = x.shape
        inverse = rope.inverse_frequencies(self.config)

        def heads(y: Array) -> Array:
            return y.reshape(batch, length, -1, self.config.head_dim)

        def rotated(y: Array) -> Array:
            wide = heads(y).astype(jnp.float32)
            turn = jax.vmap(lambda row: rope.rotate(row, jnp.arange(length), inverse))
            return turn(wide).astype(y.dtype)

        q, k = rotated(self.q_proj(x)), rotated(self.k_proj(x))
        v = heads(self.v_proj(x))
        return self.o_proj(attend(q, k, v).reshape(batch, length, -1))


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k / sqrt(d)) v over the past; [B, T, H, d] and [B, T, G, d] twice.

    Written out because jax.nn.dot_product_attention refuses bfloat16 under strict
    dtype promotion (jax 0.10.2).
    """
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, size)
    wide = jnp.float32
    scores = jnp.einsum("btgrd,bcgd->bgrtc", q, k, preferred_element_type=wide)
    past = np.tri(length, dtype=bool)[None, None, None]
    scores = jnp.where(past, scores * wide(size**-0.5), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrtc,bcgd->btgrd", weights, v)


class FeedForward(nnx.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden, neurons = config.hidden_size, config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear(hidden, neurons, rngs)
        self.up_proj = Linear(hidden, neurons, rngs)
        self.down_proj = Linear(neurons, hidden, rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(hidden, eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = Norm(hidden, eps)
        self.mlp = FeedForward(config, rngs)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """The residual stream after the layer, and the share of activations that are
        exactly zero."""
        x = x + self.self_attn(self.input_layernorm(x))
        h = self.post_attention_layernorm(x)
        zeros = jnp.mean(self.mlp.act(self.mlp.gate_proj(h)) == 0, dtype=jnp.float32)
        return x + self.mlp(h), zeros


class Body(nnx.Module):
    """What the checkpoint keeps under `model.`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.embed_tokens = Linear(hidden, config.vocab_size, rngs)
        layers = [Layer(config, rngs) for _ in range(config.num_layers)]
        self.layers = nnx.List(layers)
        self.norm = Norm(hidden, config.rms_norm_eps)


class Decoder(nnx.Module):
    """Token ids [B, T] to logits [B, T, V] float32 and zero shares [L].

    dtype: of products and activations.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, dtype: DTypeLike):
        self.dtype = dtype
        self.model = Body(config, rngs)
        self.lm_head = (
            nnx.data(None)
            if config.tie_embeddings
            else Linear(config.hidden_size, config.vocab_size, rngs)
        )

    def __call__(self, ids: Array) -> tuple[Array, Array]:
        embed, shares = self.model.embed_tokens, []
        x = embed.weight[...][ids].astype(self.dtype)
        for layer in self.model.layers:
            x, zeros = layer(x)
            shares.append(zeros)
        head = embed if self.lm_head is None else self.lm_head
        return head(self.model.norm(x)).astype(jnp.float32), jnp.stack(shares)


def init_weights(config: ModelConfig, *, seed: int) -> Weights:
    """Random weights by their names in a checkpoint."""
    model = Decoder(config, nnx.Rngs(seed), dtype=jnp.float32)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): param[...] for path, param in flat}


def apply(
    config: ModelConfig,
    weights: Mapping[str, Any],
    ids: Array,
    *,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Array, Array]:
    """Logits [B, T, V] and zero shares [L] of the model with these weights."""
    abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(abstract)
    named = [
        (path, param.replace(weights[".".join(map(str, path))]))
        for path, param in nnx.to_flat_state(state)
        if isinstance(param, nnx.Param)
    ]
    return nnx.merge(graph, nnx.from_flat_state(named))(ids)


def mean_loss(logits: Array, targets: Array) -> Array:
    """Mean cross-entropy in nats a token."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.mean(jnp.take_along_axis(logprobs, targets[..., None], axis=-1))
