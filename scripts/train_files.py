"""Hugging Face folders for training: read, made up, written. Knows no optimiser."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from m2jax.config import ModelConfig
from m2jax.convert.source import open_source
from m2jax.errors import NumericalError
from m2jax.hf_config import config_from_hf
from m2jax.store.files import sync_path, write_synced
from m2jax.store.paths import TOKENIZER_FILES
from m2jax.strict_json import read_json
from m2jax.text import Tokenizer, load_tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")
MAX_VOCAB = 1 << 22


def made_config(
    tokenizer: Tokenizer, *, sizes: Mapping[str, int], act: str, tied: bool
) -> dict[str, Any]:
    """config.json of a new model.

    Args:
        sizes: hidden, ffn, layers, heads, kv_heads, context.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "max_position_embeddings": sizes["context"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": act,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": end_id(tokenizer),
        "torch_dtype": "float16",
    }


def end_id(tokenizer: Tokenizer) -> int:
    """The special token that ends a text; BOS where the tokenizer has no other."""
    for name in ENDS:
        ids = tokenizer.encode(name, add_bos=False, parse_special=True)
        if len(ids) == 1:
            return ids[0]
    if tokenizer.bos_id is None:
        raise ValueError(f"the tokenizer has no token that ends a text ({ENDS})")
    return tokenizer.bos_id


def find_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder; ValueError where there is none."""
    found = load_tokenizer(folder, vocab_size=MAX_VOCAB, bos_token_ids=())
    if found is None:
        raise ValueError(f"{folder}: no tokenizer.json or tokenizer.model there")
    return found


def read_config(raw: dict[str, Any], *, where: str) -> ModelConfig:
    """The facts of a config.json.

    Raises:
        ValueError: a field is wrong. NotImplementedError: no plain LLaMA.
    """
    config = config_from_hf(raw, where=where)
    plain = dataclasses.replace(
        config,
        model_type="llama",
        rope_scaling=None,
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        windows=(0,) * config.num_layers,
    )
    if config != plain or config.hidden_act not in ("silu", "relu"):
        raise NotImplementedError(
            f"{where}: only plain LLaMA is trained: SiLU or ReLU, no biases, windows, "
            "q and k norms or scaled rotary positions"
        )
    return config


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint as float32, by name."""
    tensors = open_source(folder).tensors
    return {name: t.read().astype(np.float32) for name, t in tensors.items()}


def write_folder(
    out: Path,
    raw: dict[str, Any],
    weights: Mapping[str, Any],
    *,
    tokenizer_folder: Path,
    scratch: Path,
) -> None:
    """Writes a checkpoint of float16 weights; config.json, last, makes it one.

    Raises:
        NumericalError: a weight is not finite in float16; nothing is written.
    """
    halves = {name: half(name, array) for name, array in weights.items()}
    scratch.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    save_file(halves, scratch / WEIGHTS, metadata={"format": "pt"})
    sync_path(scratch / WEIGHTS)
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, scratch / name)
            os.replace(scratch / name, out / name)
    os.replace(scratch / WEIGHTS, out / WEIGHTS)
    (scratch / CONFIG).unlink(missing_ok=True)
    text = json.dumps({**raw, "torch_dtype": "float16"}, indent=2) + "\n"
    write_synced(scratch / CONFIG, text.encode())
    os.replace(scratch / CONFIG, out / CONFIG)
    sync_path(out)


def half(name: str, array: Any) -> np.ndarray:
    """float16, in one contiguous piece."""
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(np.asarray(array), np.float16)
    if not np.all(np.isfinite(found)):
        raise NumericalError(f"{name}: weights beyond float16, largest 65504")
    return found


def read_checkpoint(
    folder: Path,
) -> tuple[dict[str, Any], ModelConfig, dict[str, Any]]:
    """config.json as it stands, what it means, and float32 weights."""
    raw = read_json(folder / CONFIG)
    config = read_config(raw, where=str(folder / CONFIG))
    weights = {n: jnp.asarray(array) for n, array in read_weights(folder).items()}
    return raw, config, weights
