"""The config.json of published models, those keys that matter, and what they mean."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import m2jax.hf_config
from m2jax.config import ModelConfig, RopeScaling
from m2jax.hf_config import config_from_hf, read_json

LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA3_SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
OLD_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA3_8B = OLD_LLAMA | {
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA31_8B = LLAMA3_8B | {
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": LLAMA3_ROPE,
}
SIZES_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}
OURS_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_heads": 64,
    "num_layers": 80,
    "num_kv_heads": 8,
    "windows": (0,) * 80,
}
MISTRAL = OLD_LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3 = QWEN25 | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "vocab_size": 151936,
}
LLAMA_2_7B = ModelConfig(
    model_type="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    context=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    hidden_act="silu",
    tie_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    qk_norm=False,
    windows=(0,) * 32,
    bos_token_ids=(1,),
    eos_token_ids=(2,),
)
LLAMA_3_8B = replace(
    LLAMA_2_7B,
    vocab_size=128256,
    intermediate_size=14336,
    num_kv_heads=8,
    context=8192,
    rope_theta=500000.0,
    bos_token_ids=(128000,),
    eos_token_ids=(128001,),
)
LLAMA_31_8B = replace(LLAMA_3_8B, context=131072, rope_scaling=LLAMA3_SCALING)
QWEN_25_7B = replace(
    LLAMA_2_7B,
    model_type="qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    context=131072,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    qkv_bias=True,
    windows=(0,) * 28,
    bos_token_ids=(151643,),
    eos_token_ids=(151643,),
)
PUBLISHED = {
    "llama-2-7b": (OLD_LLAMA, LLAMA_2_7B),
    "llama-2-13b, 16k": (
        OLD_LLAMA
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "max_position_embeddings": 16384,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
            "vocab_size": 32016,
        },
        replace(
            LLAMA_2_7B,
            hidden_size=5120,
            intermediate_size=13824,
            context=16384,
            num_heads=40,
            num_kv_heads=40,
            num_layers=40,
            windows=(0,) * 40,
            vocab_size=32016,
        ),
    ),
    "llama-2-70b": (
        OLD_LLAMA | SIZES_70B | {"max_position_embeddings": 4096},
        replace(LLAMA_2_7B, **OURS_70B, context=4096),
    ),
    "llama-3-8b": (LLAMA3_8B, LLAMA_3_8B),
    "llama-3-8b-instruct": (
        LLAMA3_8B | {"eos_token_id": 128009},
        replace(LLAMA_3_8B, eos_token_ids=(128009,)),
    ),
    "llama-3.1-8b": (LLAMA31_8B, LLAMA_31_8B),
    "llama-3.1-70b": (
        LLAMA31_8B | SIZES_70B,
        replace(LLAMA_31_8B, **OURS_70B),
    ),
    "mistral-7b-v0.1": (
        MISTRAL,
        replace(
            LLAMA_2_7B,
            model_type="mistral",
            intermediate_size=14336,
            num_kv_heads=8,
            context=32768,
            windows=(4096,) * 32,
        ),
    ),
    "qwen2.5-7b": (QWEN25, QWEN_25_7B),
    "qwen3": (
        QWEN3,
        replace(
            QWEN_25_7B,
            model_type="qwen3",
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_layers=36,
            num_heads=32,
            num_kv_heads=8,
            context=40960,
            qkv_bias=False,
            qk_norm=True,
            windows=(0,) * 36,
            eos_token_ids=(151645,),
        ),
    ),
    "tinyllama-1.1b-chat": (
        OLD_LLAMA
        | {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
        },
        replace(
            LLAMA_2_7B,
            hidden_size=2048,
            head_dim=64,
            intermediate_size=5632,
            num_layers=22,
            num_kv_heads=4,
            windows=(0,) * 22,
        ),
    ),
}


INT8_LLAMA31 = LLAMA31_8B | {
    "quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "model_type": "gemma2",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_the_model_it_is(name):
    raw, wanted = PUBLISHED[name]
    assert config_from_hf(raw, where=name) == wanted


def test_llama_31_stops_at_the_three_ids_of_its_generation_config():
    generation = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    config = config_from_hf(LLAMA31_8B, where="", generation=generation)
    assert config.eos_token_ids == (128001, 128008, 128009)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (INT8_LLAMA31, "quantization_config .* 16-bit"),
        (GEMMA2, "'gemma2': not supported; supported: llama, mistral, qwen2, qwen3"),
        (LLAMA31_8B | {"model_type": "smollm3"}, "model_type 'smollm3'"),
    ],
)
def test_a_published_model_that_we_do_not_compute_is_refused(raw, named):
    with pytest.raises(NotImplementedError, match=named):
        config_from_hf(raw, where="config.json")


def test_the_bundled_model_has_a_config_that_is_read():
    folder = Path(m2jax.hf_config.__file__).parent / "data" / "pystories8M"
    config = config_from_hf(
        read_json(folder / "config.json"),
        where="config.json",
        generation=read_json(folder / "generation_config.json"),
    )
    assert (config.num_layers, config.intermediate_size) == (8, 704)
    assert config.tie_embeddings
