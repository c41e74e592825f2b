"""What Hugging Face calls the tensors, their shapes, and which bank they go to.

Knows no files.
"""

import re

from m2jax.config import ModelConfig
from m2jax.layout import MATRICES
from m2jax.params import Shapes, layer_name

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# Buffers that old checkpoints carry; both follow from the config.
_DERIVED = re.compile(r".*\brotary_emb\.inv_freq")


def neuron_tensors(layer: int) -> dict[str, str]:
    """Tensor of each of a layer's three feed-forward matrices."""
    return {
        matrix: f"model.layers.{layer}.mlp.{matrix}_proj.weight" for matrix in MATRICES
    }


def dense_tensors(config: ModelConfig) -> dict[str, dict[str, tuple[str, ...]]]:
    """Per bank and array, the tensors that are stacked along the first axis."""
    head: dict[str, tuple[str, ...]] = {"norm": ("model.norm.weight",)}
    if not config.tie_embeddings:
        head["lm_head"] = (LM_HEAD,)
    banks: dict[str, dict[str, tuple[str, ...]]] = {
        "embed": {"embedding": (EMBEDDING,)}
    }
    for layer in range(config.num_layers):
        banks[f"layers/{layer_name(layer, config)}"] = _layer_tensors(layer, config)
    banks["head"] = head
    return banks


def _layer_tensors(layer: int, config: ModelConfig) -> dict[str, tuple[str, ...]]:
    prefix = f"model.layers.{layer}"
    attention = f"{prefix}.self_attn"
    arrays: dict[str, tuple[str, ...]] = {
        "input_norm": (f"{prefix}.input_layernorm.weight",),
        "qkv": tuple(f"{attention}.{name}_proj.weight" for name in "qkv"),
        "o": (f"{attention}.o_proj.weight",),
        "ffn_norm": (f"{prefix}.post_attention_layernorm.weight",),
    }
    if config.qkv_bias:
        arrays["qkv_bias"] = tuple(f"{attention}.{name}_proj.bias" for name in "qkv")
    if config.o_bias:
        arrays["o_bias"] = (f"{attention}.o_proj.bias",)
    if config.qk_norm:
        arrays["q_norm"] = (f"{attention}.q_norm.weight",)
        arrays["k_norm"] = (f"{attention}.k_norm.weight",)
    return arrays


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Every tensor that the model needs, [out, in]."""
    hidden, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_heads * head, config.num_kv_heads * head
    shapes: Shapes = {
        EMBEDDING: (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            shapes[f"{attention}.{name}_proj.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{attention}.{name}_proj.bias"] = (rows,)
            if config.qk_norm and name != "v":
                shapes[f"{attention}.{name}_norm.weight"] = (head,)
        shapes[f"{attention}.o_proj.weight"] = (hidden, query)
        if config.o_bias:
            shapes[f"{attention}.o_proj.bias"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, ffn)
    return shapes


def is_ignorable(name: str, config: ModelConfig) -> bool:
    """A tensor that the model does without, by design of the format."""
    if name == LM_HEAD:
        return config.tie_embeddings
    return _DERIVED.fullmatch(name) is not None
