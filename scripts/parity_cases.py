"""Which parity fixtures there are: configs alone. Knows neither torch nor m2jax."""

from dataclasses import dataclass, field

FULL_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SHARED = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": FULL_ROPE,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """One fixture.

    config: fields on top of SHARED, as transformers 5 takes them.
    old: None, or fields that the version-4 config.json of such checkpoints has besides;
        the value None removes one instead.
    blind: changes of the config, each of which must change the logits visibly.
    shard_size: as save_pretrained takes it.
    """

    name: str
    model_type: str
    dtype: str
    config: dict = field(default_factory=dict)
    old: dict | None = None
    blind: tuple[dict, ...] = ()
    shard_size: str = "1GB"


def llama3_rope(*, theta: float, factor: float, original: int) -> dict:
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


CASES = (
    Case(
        "llama2",
        "llama",
        "float16",
        # The first Llama 2 files have neither field: both defaults must be known.
        old={"rope_theta": None, "head_dim": None, "pretraining_tp": 1},
        blind=({"rope_parameters": {**FULL_ROPE, "rope_theta": 500000.0}},),
    ),
    Case(
        "llama_gqa_fp32",
        "llama",
        "float32",
        {"num_key_value_heads": 2, "intermediate_size": 56, "rms_norm_eps": 1e-2},
        blind=({"rms_norm_eps": 1e-5},),
    ),
    Case(
        "llama31",
        "llama",
        "bfloat16",
        {
            "hidden_size": 64,
            "intermediate_size": 56,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "eos_token_id": [2, 3, 4],
            "rope_parameters": llama3_rope(theta=500000.0, factor=8.0, original=64),
        },
        old={"head_dim": None, "mlp_bias": False, "pretraining_tp": 1},
        blind=(
            {"rope_parameters": {**FULL_ROPE, "rope_theta": 500000.0}},
            {"rope_parameters": llama3_rope(theta=5e5, factor=8.0, original=128)},
        ),
    ),
    Case(
        "llama32_tied",
        "llama",
        "bfloat16",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": llama3_rope(theta=10000.0, factor=32.0, original=32),
        },
        blind=({"rope_parameters": FULL_ROPE},),
    ),
    Case(
        "llama_linear_rope",
        "llama",
        "float16",
        {"rope_parameters": {**FULL_ROPE, "rope_type": "linear", "factor": 4.0}},
        old={"rope_scaling": {"type": "linear", "factor": 4.0}},
        blind=({"rope_parameters": FULL_ROPE},),
    ),
    Case(
        "llama_attention_bias",
        "llama",
        "float16",
        {"attention_bias": True, "num_key_value_heads": 2},
        blind=({"attention_bias": False},),
    ),
    Case(
        "llama_relu",
        "llama",
        "bfloat16",
        {"hidden_act": "relu", "intermediate_size": 80},
        blind=({"hidden_act": "silu"},),
    ),
    Case(
        "llama_gelu",
        "llama",
        "float16",
        {"hidden_act": "gelu"},
        blind=({"hidden_act": "silu"},),
    ),
    Case(
        "llama_head_dim",
        "llama",
        "bfloat16",
        {"head_dim": 24, "num_key_value_heads": 2},
    ),
    Case(
        "llama_width_40",
        "llama",
        "float16",
        {
            "hidden_size": 40,
            "intermediate_size": 60,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
        },
    ),
    Case(
        "mistral_window",
        "mistral",
        "bfloat16",
        {"num_key_value_heads": 2, "sliding_window": 8},
        old={"head_dim": None},
        blind=({"sliding_window": None}, {"sliding_window": 9}),
    ),
    Case(
        "mistral_full",
        "mistral",
        "float16",
        {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": None},
        blind=({"sliding_window": 8},),
    ),
    Case(
        "qwen2",
        "qwen2",
        "bfloat16",
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-6},
        # A window that is not in use, as Qwen2 files have it.
        old={
            "use_sliding_window": False,
            "sliding_window": 8,
            "max_window_layers": 1,
            "layer_types": None,
            "head_dim": None,
        },
        blind=(
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        ),
    ),
    Case(
        "qwen2_window",
        "qwen2",
        "float16",
        {
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        blind=(
            {"max_window_layers": 0},
            {"max_window_layers": 2},
            {"sliding_window": 9},
        ),
    ),
    Case(
        "qwen3",
        "qwen3",
        "bfloat16",
        {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {**FULL_ROPE, "rope_theta": 1000000.0},
        },
        old={
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 2,
            "layer_types": None,
        },
    ),
    Case(
        "qwen3_bias",
        "qwen3",
        "float16",
        {"head_dim": 16, "attention_bias": True},
        blind=({"attention_bias": False},),
    ),
    Case(
        "smollm2",
        "llama",
        "bfloat16",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 48,
            "intermediate_size": 88,
            "tie_word_embeddings": True,
            "rope_parameters": {**FULL_ROPE, "rope_theta": 100000.0},
        },
        old={
            "head_dim": None,
            "is_llama_config": True,
            "rope_interleaved": False,
            "pretraining_tp": 1,
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        },
        blind=({"rope_parameters": FULL_ROPE},),
    ),
    Case(
        "tinyllama",
        "llama",
        "bfloat16",
        {
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 56,
        },
        old={"head_dim": None, "pretraining_tp": 1},
    ),
    Case(
        "sharded",
        "llama",
        "float16",
        {"num_key_value_heads": 2, "num_hidden_layers": 3},
        shard_size="34KB",
    ),
)
