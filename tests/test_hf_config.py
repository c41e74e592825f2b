"""Hugging Face configs: what their fields mean to us."""

import pytest

from m2jax.config import RopeScaling
from tests.small_configs import (
    FAMILIES,
    HALF,
    LLAMA3_ROPE,
    LLAMA3_SCALING,
    SLIDING,
    tiny,
)


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "head_dim", "context", "window", "bos", "eos"),
    [
        ("llama", 32, 4, 2048, 0, (1,), (2,)),
        ("mistral", 8, 4, 131072, 4096, (1,), (2,)),
        ("qwen2", 32, 4, 32768, 0, (), ()),
        ("qwen3", 32, 128, 32768, 0, (), ()),
    ],
)
def test_absent_keys_have_the_defaults_of_transformers_classes(
    model_type, kv_heads, head_dim, context, window, bos, eos
):
    config = tiny(model_type)
    assert config.num_kv_heads == kv_heads
    assert config.head_dim == head_dim
    assert config.context == context
    assert config.windows == (window,) * 6
    assert (config.bos_token_ids, config.eos_token_ids) == (bos, eos)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10000.0)
    assert (config.hidden_act, config.tie_embeddings) == ("silu", False)
    assert config.rope_scaling is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_null_heads_follow_from_the_attention_heads(model_type):
    config = tiny(model_type, num_key_value_heads=None, head_dim=None)
    assert (config.num_kv_heads, config.head_dim) == (32, 4)


def test_head_dim_need_not_be_the_hidden_size_over_the_heads():
    assert tiny("llama", head_dim=24).head_dim == 24


@pytest.mark.parametrize(
    ("old", "scaling"),
    [
        ({"rope_scaling": LLAMA3_ROPE}, LLAMA3_SCALING),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            RopeScaling("linear", 4.0),
        ),
        ({"rope_scaling": {"type": "default", "rope_type": "default"}}, None),
        ({"rope_scaling": {}}, None),
    ],
)
def test_both_generations_of_rope_fields_mean_the_same(old, scaling):
    config = tiny("llama", rope_theta=500000, torch_dtype="bfloat16", **old)
    new = old["rope_scaling"] | {"rope_theta": 500000.0}
    assert config == tiny("llama", rope_parameters=new, dtype="bfloat16")
    assert (config.rope_theta, config.rope_scaling) == (500000.0, scaling)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (SLIDING, (0, 0, 0, 0, 16, 16)),
        (SLIDING | {"max_window_layers": 9}, (0,) * 6),
        (SLIDING | {"sliding_window": None}, (0,) * 6),
        (SLIDING | {"use_sliding_window": False}, (0,) * 6),
        (SLIDING | {"layer_types": HALF}, (0, 16) * 3),
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096,) * 6),
        (
            {"use_sliding_window": True, "num_hidden_layers": 30},
            (0,) * 28 + (4096,) * 2,
        ),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_slides_in_the_layers_that_its_config_names(model_type, changes, windows):
    assert tiny(model_type, **changes).windows == windows


@pytest.mark.parametrize(("window", "windows"), [(None, (0,) * 6), (16, (16,) * 6)])
def test_mistral_slides_in_every_layer_or_none(window, windows):
    config = tiny("mistral", sliding_window=window)
    assert config.windows == windows
    name = HALF[1] if window else HALF[0]
    assert tiny("mistral", sliding_window=window, layer_types=[name] * 6) == config


@pytest.mark.parametrize(
    ("model_type", "asked", "qkv_bias", "o_bias", "qk_norm"),
    [
        ("llama", False, False, False, False),
        ("llama", True, True, True, False),
        ("mistral", False, False, False, False),
        ("qwen2", False, True, False, False),
        ("qwen2", True, True, False, False),
        ("qwen3", False, False, False, True),
        ("qwen3", True, True, True, True),
    ],
)
def test_biases_and_norms_are_those_of_the_family(
    model_type, asked, qkv_bias, o_bias, qk_norm
):
    config = tiny(model_type, attention_bias=asked)
    found = (config.qkv_bias, config.o_bias, config.qk_norm)
    assert found == (qkv_bias, o_bias, qk_norm)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("silu", "silu"), ("swish", "silu"), ("relu", "relu"), ("gelu", "gelu")],
)
def test_an_activation_is_known_by_all_its_names(name, ours):
    assert tiny("llama", hidden_act=name).hidden_act == ours


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        (7, None, (7,)),
        ([7, 8, 7], None, (7, 8)),
        (7, {"eos_token_id": [9, 7]}, (9, 7)),
        (7, {"eos_token_id": None}, (7,)),
        (7, {"temperature": 0.6}, (7,)),
        (None, {"eos_token_id": 9}, (9,)),
        (None, None, ()),
        (1000, {"eos_token_id": 9}, (9,)),
    ],
)
def test_the_generation_configs_stop_ids_go_first(config, generation, ids):
    found = tiny("llama", eos_token_id=config, generation=generation)
    assert found.eos_token_ids == ids
