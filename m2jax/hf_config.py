"""A ModelConfig from a Hugging Face config.json. Knows no weights and runs no code.

Defaults are those of transformers' own config classes (4.57 and 5.23 agree on them); a
form that we do not compute is refused by name, never approximated.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m2jax.config import Activation, ModelConfig, validate
from m2jax.hf_fields import Reader, only
from m2jax.hf_positions import Windows, rope_from_hf, windows_from_hf
from m2jax.strict_json import check_integer, read_json

__all__ = ["config_from_hf", "read_json"]

# "gelu" is the exact erf form in transformers; the tanh forms have names of their own.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
}
HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "context": "max_position_embeddings",
    "windows": "sliding_window",
    "bos_token_ids": "bos_token_id",
    "eos_token_ids": "eos_token_id",
}
NO_CODE = "code that comes with a checkpoint is never run"
NO_EXPERTS = "mixture-of-experts layers are not supported, only dense ones"
NO_NOPE = "layers without rotary positions are not supported"
NO_QUANTISED = "quantised weights are not supported; take the 16-bit checkpoint"
NO_SOFTCAP = "capped logits are not supported"
REFUSED_FIELDS = {
    "auto_map": NO_CODE,
    "model_file": NO_CODE,
    "quantization_config": NO_QUANTISED,
    "compression_config": NO_QUANTISED,
    "num_experts": NO_EXPERTS,
    "num_local_experts": NO_EXPERTS,
    "n_routed_experts": NO_EXPERTS,
    "n_shared_experts": NO_EXPERTS,
    "num_experts_per_tok": NO_EXPERTS,
    "moe_intermediate_size": NO_EXPERTS,
    "no_rope_layers": NO_NOPE,
    "no_rope_layer_interval": NO_NOPE,
    "attn_logit_softcapping": NO_SOFTCAP,
    "final_logit_softcapping": NO_SOFTCAP,
}


@dataclass(frozen=True)
class Family:
    """What transformers' classes of one model_type fix or assume.

    kv_heads, head_dim: where the key is absent; None = num_attention_heads, and
    hidden_size / num_attention_heads.
    bias: `attention_bias` decides for q, k, v and o, or "qkv" always, or "none".
    """

    architecture: str
    context: int
    kv_heads: int | None
    head_dim: int | None
    windows: Windows
    bias: Literal["asked", "qkv", "none"]
    qk_norm: bool
    bos: int | None
    eos: int | None


FAMILIES = {
    "llama": Family("LlamaForCausalLM", 2048, None, None, "none", "asked", False, 1, 2),
    "mistral": Family(
        "MistralForCausalLM", 131072, 8, None, "all", "none", False, 1, 2
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", 32768, 32, None, "by_layer", "qkv", False, None, None
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", 32768, 32, 128, "by_layer", "asked", True, None, None
    ),
}


def config_from_hf(
    raw: dict[str, Any], *, where: str, generation: dict[str, Any] | None = None
) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        raw: the parsed config.json; either generation of its fields.
        where: its name, for messages.
        generation: the parsed generation_config.json; its bos_token_id and eos_token_id
            go before those of `raw`.

    Raises:
        ValueError: a field is missing, of a wrong type or out of its range.
        NotImplementedError: a model or feature that we do not compute, with what we do.
    """
    source = Reader(raw, where)
    model_type = source.text("model_type")
    if model_type not in FAMILIES:
        raise source.unsupported("model_type", why=only(FAMILIES))
    family = FAMILIES[model_type]
    _refuse_unsupported(source, family)
    vocab_size = source.number("vocab_size", "vocab_size")
    num_layers = source.number("num_hidden_layers", "num_layers")
    num_heads = source.number("num_attention_heads", "num_heads")
    rope_theta, rope_scaling = rope_from_hf(source)
    attention_bias = source.flag("attention_bias")
    config = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=source.number("hidden_size", "hidden_size"),
        intermediate_size=source.number("intermediate_size", "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(source, family, num_heads),
        head_dim=_head_dim(source, family, num_heads),
        context=source.number("max_position_embeddings", "context", family.context),
        rms_norm_eps=source.number("rms_norm_eps", "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        hidden_act=_activation(source),
        tie_embeddings=source.flag("tie_word_embeddings"),
        qkv_bias=family.bias == "qkv" or (family.bias == "asked" and attention_bias),
        o_bias=family.bias == "asked" and attention_bias,
        qk_norm=family.qk_norm,
        windows=windows_from_hf(source, kind=family.windows, num_layers=num_layers),
        bos_token_ids=_token_ids(
            "bos_token_id", source, generation, family.bos, vocab_size
        ),
        eos_token_ids=_token_ids(
            "eos_token_id", source, generation, family.eos, vocab_size
        ),
    )
    validate(config, where=where, names=HF_NAMES)
    return config


def _refuse_unsupported(source: Reader, family: Family) -> None:
    architectures = source.raw.get("architectures")
    if architectures is not None and architectures != [family.architecture]:
        raise source.unsupported("architectures", why=only([family.architecture]))
    for name, why in REFUSED_FIELDS.items():
        if source.raw.get(name) is not None:
            raise source.unsupported(name, why=why)
    if source.flag("mlp_bias"):
        raise source.unsupported("mlp_bias", why="feed-forward biases not supported")
    if family.bias == "none" and source.flag("attention_bias"):
        raise source.unsupported(
            "attention_bias", why=f"{family.architecture} has no attention biases"
        )


def _activation(source: Reader) -> Activation:
    name = source.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise source.unsupported("hidden_act", why=f"{only(ACTIVATIONS)} (erf form)")
    return ACTIVATIONS[name]


def _num_kv_heads(source: Reader, family: Family, num_heads: int) -> int:
    default = family.kv_heads or num_heads
    if source.raw.get("num_key_value_heads", default) is None:
        return num_heads
    return source.number("num_key_value_heads", "num_kv_heads", default)


def _head_dim(source: Reader, family: Family, num_heads: int) -> int:
    if source.raw.get("head_dim", family.head_dim) is not None:
        return source.number("head_dim", "head_dim", family.head_dim)
    hidden_size = source.number("hidden_size", "hidden_size")
    if hidden_size % num_heads:
        wanted = f"a multiple of num_attention_heads ({num_heads}), or a head_dim"
        raise source.wrong("hidden_size", wanted=wanted)
    return hidden_size // num_heads


def _token_ids(
    name: str,
    source: Reader,
    generation: dict[str, Any] | None,
    default: int | None,
    vocab_size: int,
) -> tuple[int, ...]:
    """The ids of the first file that has any, each once.

    HF's generate would take an absent key of generation_config.json as "none" and run
    on to the length limit; here config.json then decides.
    """
    beside = str(Path(source.where).parent / "generation_config.json")
    for reader in (Reader(generation or {}, beside), source):
        value = reader.raw.get(name)
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            for token in ids:
                check_integer(
                    token, low=0, high=vocab_size - 1, field=name, where=reader.where
                )
            return tuple(dict.fromkeys(ids))
    return () if default is None or name in source.raw else (default,)
