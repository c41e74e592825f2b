"""Writes a Hugging Face folder of random weights, tensor by tensor, of any shape.

    python scripts/make_checkpoint.py OUT --layers 22 --hidden 2048 --ffn 5632

NumPy only, and independent of m2jax: tests compare the converter with what is here.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
BLOCK_WEIGHTS = 1 << 22


def make_config(
    *,
    model_type: str = "llama",
    hidden: int = 64,
    ffn: int = 96,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 96,
    dtype: str = "float16",
    tied: bool = False,
    attention_bias: bool = False,
) -> dict[str, Any]:
    """A config.json in transformers 4's spelling."""
    config = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = attention_bias
    if model_type == "mistral":
        config["sliding_window"] = None
    return config


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that transformers' class of this model has."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head, vocab = config["head_dim"], config["vocab_size"]
    query = config["num_attention_heads"] * head
    key = config["num_key_value_heads"] * head
    qwen2 = config["model_type"] == "qwen2"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "mlp.down_proj.weight"] = (hidden, ffn)
        shapes[at + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[at + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            shapes[at + f"self_attn.{name}_proj.weight"] = (rows, hidden)
            if qwen2 or config.get("attention_bias"):
                shapes[at + f"self_attn.{name}_proj.bias"] = (rows,)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, query)
        if config.get("attention_bias"):
            shapes[at + "self_attn.o_proj.bias"] = (hidden,)
        if config["model_type"] == "qwen3":
            shapes[at + "self_attn.q_norm.weight"] = (head,)
            shapes[at + "self_attn.k_norm.weight"] = (head,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def random_blocks(
    shape: tuple[int, ...], code: str, random: np.random.Generator
) -> Iterator[bytes]:
    """Normal weights of deviation 0.02, in the bits of a safetensors dtype."""
    left = int(np.prod(shape))
    while left:
        count = min(left, BLOCK_WEIGHTS)
        left -= count
        weights = random.standard_normal(count, dtype=np.float32)
        weights *= np.float32(0.02)
        if code == "F16":
            yield weights.astype(np.float16).tobytes()
        elif code == "BF16":
            bits = weights.view(np.uint32)
            bits += 0x7FFF + (bits >> 16 & 1)
            yield (bits >> 16).astype(np.uint16).tobytes()
        else:
            yield weights.tobytes()


def write_shard(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    codes: dict[str, str],
    random: np.random.Generator,
) -> None:
    """One safetensors file; never more than a block of weights is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * WIDTHS[codes[name]]
        header[name] = {
            "dtype": codes[name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.writelines(random_blocks(shape, codes[name], random))


def make_checkpoint(
    path: Path,
    config: dict[str, Any],
    *,
    shards: int = 1,
    seed: int = 0,
    dtypes: dict[str, str] | None = None,
) -> Path:
    """Writes config.json and weights.

    Args:
        path: new folder.
        config: as `make_config` gives it; torch_dtype is the dtype of all tensors ..
        dtypes: .. but of those whose name ends in one of these keys.
    """
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    shapes = tensor_shapes(config)
    codes = dict.fromkeys(shapes, CODES[config["torch_dtype"]])
    for ending, dtype in (dtypes or {}).items():
        codes.update({n: CODES[dtype] for n in shapes if n.endswith(ending)})
    if shards == 1:
        random = np.random.default_rng(seed)
        write_shard(path / "model.safetensors", shapes, codes, random)
        return path
    names = list(shapes)

    def write(shard: int) -> dict[str, str]:
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        random = np.random.default_rng([seed, shard])
        write_shard(path / file, {n: shapes[n] for n in part}, codes, random)
        return dict.fromkeys(part, file)

    weight_map = {}
    with ThreadPoolExecutor() as pool:
        for files in pool.map(write, range(shards)):
            weight_map.update(files)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes a Hugging Face folder of random weights."
    )
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--model-type", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, help="default: hidden / heads")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=CODES, default="bfloat16")
    parser.add_argument("--tied", action="store_true", help="no lm_head of its own")
    parser.add_argument("--attention-bias", action="store_true")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = vars(parser.parse_args())
    out, shards, seed = asked.pop("out"), asked.pop("shards"), asked.pop("seed")
    make_checkpoint(out, make_config(**asked), shards=shards, seed=seed)


if __name__ == "__main__":
    main()
