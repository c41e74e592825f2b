"""Names and shapes of the dense part: what stays resident, bank by bank.

A bank is one Orbax checkpoint in the store and one pytree on the device: `embed`,
`layers/<layer>`, `head`. Weight matrices are [out, in], as Hugging Face stores them.
"""

from m2jax.config import ModelConfig
from m2jax.layout import Layout

Shapes = dict[str, tuple[int, ...]]
NEURON_DTYPES = {"scales": "float16", "down_norm": "float32", "noise": "float32"}


def layer_name(layer: int, config: ModelConfig) -> str:
    """Folder name of a layer: zero-padded so that names sort."""
    return str(layer).zfill(max(2, len(str(config.num_layers - 1))))


def embed_shapes(config: ModelConfig) -> Shapes:
    return {"embedding": (config.vocab_size, config.hidden_size)}


def layer_shapes(config: ModelConfig) -> Shapes:
    """Attention and norms of one layer; q, k and v rows are stacked in `qkv`."""
    hidden, head = config.hidden_size, config.head_dim
    qkv = (config.num_heads + 2 * config.num_kv_heads) * head
    shapes: Shapes = {
        "input_norm": (hidden,),
        "qkv": (qkv, hidden),
        "o": (hidden, config.num_heads * head),
        "ffn_norm": (hidden,),
    }
    if config.qkv_bias:
        shapes["qkv_bias"] = (qkv,)
    if config.o_bias:
        shapes["o_bias"] = (hidden,)
    if config.qk_norm:
        shapes["q_norm"] = (head,)
        shapes["k_norm"] = (head,)
    return shapes


def head_shapes(config: ModelConfig) -> Shapes:
    """Final norm, and the output matrix where it is not the embedding."""
    shapes: Shapes = {"norm": (config.hidden_size,)}
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, config.hidden_size)
    return shapes


def neuron_shapes(layout: Layout) -> Shapes:
    """What every precision of a layer's neurons shares, kept in the layer's bank.

    scales: per group of gate, up and down (padded neurons: 0). down_norm: L2 norm of
    the down column as plane `q4` alone gives it (`quant.dequantise_base`), by
    which the base scorer weighs |h4|. noise: what q4's rounding does to the output, by
    which it weighs precision: |down4|^2 |gate - gate4|^2 / D, the same of up, and
    |down - down4|^2. Dtypes: NEURON_DTYPES.
    """
    return {
        "scales": (layout.padded_neurons, 3, layout.groups),
        "down_norm": (layout.padded_neurons,),
        "noise": (layout.padded_neurons, 3),
    }


def dense_banks(config: ModelConfig, layout: Layout) -> dict[str, Shapes]:
    """Every bank of the store: its path under `dense/`, and its arrays' shapes."""
    banks = {"embed": embed_shapes(config), "head": head_shapes(config)}
    for layer in range(config.num_layers):
        banks[f"layers/{layer_name(layer, config)}"] = {
            **layer_shapes(config),
            **neuron_shapes(layout),
        }
    return banks
