"""Writes a LLaMA checkpoint as GGUF, for llama.cpp to run beside m2jax.

    .venv/bin/python scripts/make_gguf.py HF_FOLDER OUT.gguf --type Q8_0

The same tensors; a vocabulary of numbered tokens, since only speed is compared.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16, which safetensors uses)
import numpy as np
from safetensors import safe_open

TYPES = ("F16", "Q8_0", "Q4_0")
# Rows worked on at once.
BLOCK_ROWS = 4096
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs side by side, as llama.cpp wants the rows of q and k."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def write(folder: Path, out: Path, *, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    words = [b"<unk>", b"<s>", b"</s>"]
    words += [b"\xe2\x96\x81%d" % n for n in range(3, config["vocab_size"])]
    writer.add_token_list(words)
    writer.add_token_scores([float(-n) for n in range(len(words))])
    special = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2]
    rest = [gguf.TokenType.NORMAL] * (len(words) - len(special))
    writer.add_token_types([*special, *rest])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    quant = gguf.GGMLQuantizationType[kind]
    for name, array in tensors(folder):
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array.astype(np.float32))
            continue
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                array = permuted(array, count)
        blocks = [
            gguf.quants.quantize(
                array[row : row + BLOCK_ROWS].astype(np.float32), quant
            )
            for row in range(0, array.shape[0], BLOCK_ROWS)
        ]
        writer.add_tensor(gguf_name(name), np.concatenate(blocks), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default="Q8_0")
    args = parser.parse_args()
    write(args.folder, args.out, kind=args.type)


if __name__ == "__main__":
    main()
