"""Small configs of every supported family, for the tests of what they mean."""

from m2jax.config import RopeScaling
from m2jax.hf_config import config_from_hf

WHERE = "some/config.json"
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}
HALF = ["full_attention", "sliding_attention"] * 3
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny(model_type, *, without=(), generation=None, **changes):
    raw = SIZES | {"model_type": model_type} | changes
    raw = {name: value for name, value in raw.items() if name not in without}
    return config_from_hf(raw, where=WHERE, generation=generation)
