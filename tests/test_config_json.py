"""The manifest's form of a ModelConfig: given back whole, or refused by field."""

import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import (
    FLAGS,
    LIMITS,
    LISTS,
    ModelConfig,
    RopeScaling,
    config_from_json,
    config_to_json,
    validate,
)

CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=176,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    context=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 512),
    hidden_act="relu",
    tie_embeddings=True,
    qkv_bias=True,
    o_bias=False,
    qk_norm=True,
    windows=(0, 16, 32),
    bos_token_ids=(1,),
    eos_token_ids=(2, 999),
)
GOOD = config_to_json(CONFIG)
NAMES = [field.name for field in fields(ModelConfig)]
ROPE_NAMES = [field.name for field in fields(RopeScaling)]


def number(name):
    low, high = LIMITS[name]
    return (st.integers if isinstance(low, int) else st.floats)(low, high)


@st.composite
def rope_scalings(draw):
    numbers = {name: draw(number(f"rope_scaling.{name}")) for name in ROPE_NAMES[1:]}
    low, high = sorted([numbers["low_freq_factor"], numbers["high_freq_factor"]])
    ramp = {"low_freq_factor": low, "high_freq_factor": high + 0.5 * (low == high)}
    if ramp["high_freq_factor"] > LIMITS["rope_scaling.high_freq_factor"][1]:
        ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    kind = draw(st.sampled_from(["linear", "llama3"]))
    return RopeScaling(kind=kind, **numbers | ramp)


@st.composite
def configs(draw):
    numbers = {name: draw(number(name)) for name in LIMITS if "." not in name}
    layers = draw(st.integers(1, 12))
    heads = draw(st.integers(1, 12))
    window = st.integers(0, 1 << 24)
    ids = st.lists(st.integers(0, numbers["vocab_size"] - 1), max_size=3).map(tuple)
    flags = {name: draw(st.booleans()) for name in FLAGS}
    changes = {
        "num_layers": layers,
        "num_heads": heads * draw(st.integers(1, 8)),
        "num_kv_heads": heads,
        "head_dim": numbers["head_dim"] // 2 * 2,
        "windows": tuple(draw(st.lists(window, min_size=layers, max_size=layers))),
    }
    return ModelConfig(
        **numbers
        | flags
        | changes
        | {
            "model_type": draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"])),
            "hidden_act": draw(st.sampled_from(["silu", "relu", "gelu"])),
            "rope_scaling": draw(st.none() | rope_scalings()),
            "bos_token_ids": draw(ids),
            "eos_token_ids": draw(ids),
        }
    )


@settings(deadline=None)
@given(configs())
def test_a_config_is_given_back_by_its_json(config):
    text = json.dumps(config_to_json(config))
    assert config_from_json(json.loads(text), where="manifest") == config


def test_whole_numbers_become_floats_where_floats_belong():
    scaling = GOOD["rope_scaling"] | {"factor": 8}
    raw = GOOD | {"rope_theta": 10000, "rope_scaling": scaling}
    config = config_from_json(raw, where="manifest")
    assert type(config.rope_theta) is float
    assert config.rope_scaling is not None
    assert type(config.rope_scaling.factor) is float


def refusal(raw):
    with pytest.raises(ValueError) as raised:
        config_from_json(raw, where="manifest.json")
    assert type(raised.value) is ValueError
    message = str(raised.value)
    assert message.startswith("manifest.json: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_field_is_refused_by_name(name):
    raw = {key: value for key, value in GOOD.items() if key != name}
    assert refusal(raw) == f"manifest.json: {name} is missing"


@pytest.mark.parametrize("name", ROPE_NAMES)
def test_a_missing_rope_field_is_refused_by_name(name):
    rope = {k: v for k, v in GOOD["rope_scaling"].items() if k != name}
    message = refusal(GOOD | {"rope_scaling": rope})
    assert message == f"manifest.json: rope_scaling.{name} is missing"


def test_an_extra_field_is_refused_by_name():
    assert "'experts' is not a known field" in refusal(GOOD | {"experts": 8})
    rope = GOOD["rope_scaling"] | {"beta": 1}
    assert "rope_scaling.'beta' is not" in refusal(GOOD | {"rope_scaling": rope})


WRONG_COUNT = [0, -1, 2**63, 1.0, True, None, "1", math.nan, []]
WRONG_NUMBER = [0, -1.0, 1e300, math.nan, math.inf, 10**400, True, None, "1"]
WRONG_LIST = [None, 3, "abc", {}, (0, 0, 0), [0, 0, -1], [0, 0, 2**63], [0, 0, True]]
WRONG = {
    **{
        name: WRONG_COUNT if isinstance(low, int) else WRONG_NUMBER
        for name, (low, _) in LIMITS.items()
    },
    **{name: [0, 1, None, ""] for name in FLAGS},
    **{name: [*WRONG_LIST, [1000], [1.0]] for name in LISTS if name != "windows"},
    "windows": [*WRONG_LIST, [0, 0], [0, 0, 0, 0]],
    "model_type": ["gemma2", None, 1, ["llama"]],
    "hidden_act": ["swish", None, 1],
    "num_kv_heads": [*WRONG_COUNT, 3, 16],
    "head_dim": [*WRONG_COUNT, 15],
    "rope_scaling": ["linear", 1, [], True],
    "rope_scaling.kind": ["default", "yarn", None],
    "rope_scaling.low_freq_factor": [*WRONG_NUMBER, 4.0],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_with_the_fields_name(name):
    for value in WRONG[name]:
        raw = GOOD | {name: value}
        if name.startswith("rope_scaling."):
            key = name.removeprefix("rope_scaling.")
            raw = GOOD | {"rope_scaling": GOOD["rope_scaling"] | {key: value}}
        assert refusal(raw).startswith(f"manifest.json: {name}: wanted ")


@pytest.mark.parametrize("raw", [None, [], "x", 1, [GOOD]])
def test_what_is_no_object_is_no_config(raw):
    assert "wanted an object" in refusal(raw)


def test_a_config_made_in_python_is_held_to_the_same_limits():
    validate(CONFIG, where="here")
    with pytest.raises(ValueError, match=r"^here: heads: wanted an integer from"):
        validate(
            replace(CONFIG, num_heads=2**63), where="here", names={"num_heads": "heads"}
        )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda values: (
        st.lists(values, max_size=4)
        | st.dictionaries(st.sampled_from(ROPE_NAMES), values)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(NAMES), json_values, min_size=1, max_size=3))
def test_no_json_raises_anything_but_a_refusal(wrong):
    raw = GOOD | wrong
    before = json.dumps(raw)
    refused = None
    try:
        assert config_to_json(config_from_json(raw, where="manifest.json")) == raw
    except ValueError as error:
        refused = error
    if refused is not None:
        assert type(refused) is ValueError
        assert str(refused).startswith("manifest.json: ")
    assert json.dumps(raw) == before
