"""Hugging Face configs that are refused, by name and in one line."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.hf_config import config_from_hf
from m2jax.strict_json import show
from tests.small_configs import FAMILIES, HALF, LLAMA3_ROPE, SIZES, SLIDING, WHERE, tiny

BESIDE = WHERE.replace("config.json", "generation_config.json")

# Every field that is read, with a value that is right for Qwen.
FIELDS = {
    **SIZES,
    **SLIDING,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": LLAMA3_ROPE,
    "partial_rotary_factor": 1.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": False,
    "layer_types": HALF,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
FAMILY_FIELDS = {
    "llama": {"layer_types": None, "sliding_window": None},
    "mistral": {"layer_types": None, "attention_bias": False},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {},
}
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [2**63, 10**400, *FAMILIES, "silu", "linear", "default", *HALF[:2]]
    ),
    lambda values: (
        st.lists(values, max_size=7)
        | st.dictionaries(st.sampled_from([*LLAMA3_ROPE, "type"]), values)
        | st.dictionaries(st.text(max_size=5), values, max_size=3)
    ),
    max_leaves=8,
)


def refusal(error, model_type, **changes):
    """The one line that refuses a config."""
    with pytest.raises(error) as raised:
        tiny(model_type, **changes)
    message = str(raised.value)
    assert message.startswith(f"{WHERE}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", [*SIZES, "model_type"])
def test_a_size_that_is_absent_is_asked_for_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is missing"):
        tiny("llama", without=(name,))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10000, "rope_parameters": {"rope_theta": 20000}},
        {"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2}},
        {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 4096},
    ],
)
def test_rope_fields_that_disagree_are_refused(changes):
    assert "rope_" in refusal(ValueError, "llama", **changes)


@pytest.mark.parametrize(
    ("changes", "named", "supported"),
    [
        ({"architectures": ["LlamaModel"]}, "architectures", "LlamaForCausalLM"),
        ({"hidden_act": "gelu_new"}, "hidden_act", "silu, swish, relu, gelu"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act", "erf"),
        ({"mlp_bias": True}, "mlp_bias", "not supported"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map", "never run"),
        ({"model_file": "m.py"}, "model_file", "never run"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "16-bit"),
        ({"num_local_experts": 8}, "num_local_experts", "experts"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok", "experts"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers", "rotary"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "1"),
        ({"sliding_window": 16}, "sliding_window", "null"),
        ({"layer_types": HALF}, "layer_types", "alike"),
        ({"layer_types": ["chunked_attention"] * 6}, "chunked", "full_attention"),
        (
            {"rope_parameters": {"full_attention": LLAMA3_ROPE}},
            "rope_parameters.full_attention",
            "one rope",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
            "1",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1]}},
            "rope_scaling.mrope_section",
            "factor",
        ),
        (
            {"rope_parameters": {"one\nline": 1}},
            r"rope_parameters.'one\nline'",
            "factor",
        ),
    ],
)
def test_a_form_that_we_do_not_compute_is_refused_by_name(changes, named, supported):
    message = refusal(NotImplementedError, "llama", **changes)
    assert named in message
    assert supported in message


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "su", "ntk", "mrope"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_every_other_rope_is_refused_by_name(kind, name, key):
    rope = {key: kind, "factor": 2.0, "beta_fast": 32, "long_factor": [1.0]}
    message = refusal(NotImplementedError, "llama", **{name: rope})
    assert f"{name}.{key} '{kind}'" in message
    assert "supported: default, linear, llama3" in message


def test_mistral_with_attention_biases_is_refused():
    message = refusal(NotImplementedError, "mistral", attention_bias=True)
    assert "attention_bias" in message


COUNTS = [0, -1, 2**63, 10**5000, True, 8.0, math.nan, "8", [], {}]
NUMBERS = [0, -1e-6, 1e300, 10**5000, True, math.nan, math.inf, "8", None, []]
FLAGS = [None, 0, 1, "true", math.nan, []]
ABSURD = {
    **{name: [*COUNTS, None] for name in SIZES},
    "num_key_value_heads": [*COUNTS, 3],
    "head_dim": [*COUNTS, 15],
    "max_position_embeddings": [*COUNTS, None],
    "sliding_window": COUNTS,
    "max_window_layers": [-1, 2**63, True, 8.0, math.nan, "8", None],
    "rms_norm_eps": [*NUMBERS, 2.0],
    "rope_theta": NUMBERS,
    "rope_scaling": [True, 1, "linear", [], math.nan],
    "partial_rotary_factor": ["1", True, math.nan, -1, []],
    "hidden_act": [None, 1, ["silu"]],
    "tie_word_embeddings": FLAGS,
    "attention_bias": FLAGS,
    "mlp_bias": FLAGS,
    "use_sliding_window": FLAGS,
    "layer_types": [HALF[:5], "full_attention", 6],
    "bos_token_id": [-1, 1000, True, 1.0, "1", [1, None]],
    "eos_token_id": [-1, 1000, 2**63, True, 1.0, "1", [2, 1000], [[2]]],
    "model_type": [None, 1, ["llama"]],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in ABSURD.items() for value in values],
    ids=show,
)
def test_an_absurd_value_is_refused_with_the_fields_name(name, value):
    raw = {"model_type": "qwen3"} | SLIDING | {name: value}
    assert name in refusal(ValueError, **raw)


@pytest.mark.parametrize("name", [n for n in LLAMA3_ROPE if n != "rope_type"])
@pytest.mark.parametrize("value", NUMBERS, ids=show)
def test_an_absurd_rope_field_is_refused_with_its_name(name, value):
    rope = LLAMA3_ROPE | {name: value}
    message = refusal(ValueError, "llama", rope_parameters=rope)
    assert f"rope_parameters.{name}" in message


@pytest.mark.parametrize("name", LLAMA3_ROPE)
def test_a_llama3_rope_needs_all_its_fields(name):
    rope = {key: value for key, value in LLAMA3_ROPE.items() if key != name}
    assert f"rope_scaling.{name}" in refusal(ValueError, "llama", rope_scaling=rope)


def test_a_llama3_ramp_of_no_width_is_refused():
    rope = LLAMA3_ROPE | {"low_freq_factor": 4.0}
    message = refusal(ValueError, "llama", rope_scaling=rope)
    assert "rope_scaling.low_freq_factor" in message


def test_a_hidden_size_that_the_heads_do_not_divide_needs_a_head_dim():
    assert "hidden_size" in refusal(ValueError, "llama", hidden_size=130)
    assert tiny("llama", hidden_size=130, head_dim=4).hidden_size == 130


def test_sliding_layers_without_a_window_are_refused():
    changes = {"layer_types": HALF, "use_sliding_window": False}
    assert "layer_types" in refusal(ValueError, "qwen2", **changes)


def test_a_wrong_id_in_the_generation_config_is_refused_with_that_files_name():
    with pytest.raises(ValueError, match=rf"^{BESIDE}: bos_token_id.*999"):
        tiny("llama", generation={"bos_token_id": 1000})


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(FAMILIES),
    st.dictionaries(
        st.sampled_from([*FIELDS, "rope_parameters", "auto_map"]),
        json_values,
        max_size=2,
    ),
    st.sets(st.sampled_from(list(FIELDS)), max_size=3),
    st.none() | st.dictionaries(st.just("eos_token_id"), json_values),
)
def test_no_config_raises_anything_but_a_refusal(family, wrong, absent, generation):
    raw = {name: value for name, value in FIELDS.items() if name not in absent}
    raw |= {"model_type": family, **FAMILY_FIELDS[family]} | wrong
    refused = None
    try:
        config = config_from_hf(raw, where=WHERE, generation=generation)
        assert len(config.windows) == config.num_layers
    except (ValueError, NotImplementedError) as error:
        refused = error
    if refused is not None:
        # A subclass would be an accident, such as a failed conversion.
        assert type(refused) in (ValueError, NotImplementedError)
        message = str(refused)
        assert message.startswith((f"{WHERE}: ", f"{BESIDE}: "))
        assert "\n" not in message
        assert len(message) < 600
