"""An oracle: a LLaMA-family forward pass in plain NumPy float64, from an HF folder.

Of m2jax it knows the quantiser alone (what a plane's bits mean). It parses the config,
attends and mixes precisions by itself: whole prompts, no cache, no speed.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16, which safetensors uses)
import numpy as np
from safetensors.numpy import load_file

from m2jax.quant import (
    dequantise_base,
    dequantise_int8,
    quantise_rows,
    row_shape,
    split_codes,
)

ERF = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
}
Weights = dict[str, np.ndarray]


def forward(
    folder: str | Path,
    ids: np.ndarray,
    *,
    mix: tuple[float, float, float] = (100, 0, 0),
    group_size: int = 64,
    gaps: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Logits of every position, teacher forced.

    Args:
        folder: config.json and safetensors (one file, or shards).
        ids: [T] token ids.
        mix: percent of each layer's neurons at 16, 8 and 4 bits, by score per token.
        group_size: as the store was converted with.
        gaps: every layer adds how near to a tie its classes are, see `feed_forward`.

    Returns:
        float64 [T, V].
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    embedding = weights["model.embed_tokens.weight"].astype(np.float64)
    cos, sin = rotary(config, length=len(ids))
    x = embedding[ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        part = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        h = norm(x, part["input_layernorm.weight"], config)
        window = window_of(config, layer=layer)
        x = x + attend(h, part, config, cos=cos, sin=sin, window=window)
        h = norm(x, part["post_attention_layernorm.weight"], config)
        y, gap = feed_forward(h, part, config, mix=mix, group_size=group_size)
        x = x + y
        if gaps is not None:
            gaps.append(gap)
    x = norm(x, weights["model.norm.weight"], config)
    tied = config.get("tie_word_embeddings", False)
    head = embedding if tied else weights["lm_head.weight"].astype(np.float64)
    return x @ head.T


def norm(x: np.ndarray, weight: np.ndarray, config: dict) -> np.ndarray:
    """RMSNorm over the last axis."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + config["rms_norm_eps"]) * weight.astype(np.float64)


def head_dim_of(config: dict) -> int:
    return (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )


def rotary(config: dict, *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [T, d / 2] of position * frequency, in either form of config."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    d = head_dim_of(config)
    frequency = theta ** (-np.arange(0, d, 2) / d)
    if kind == "linear":
        frequency = frequency / rope["factor"]
    elif kind == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / rope["factor"])
    elif kind != "default":
        raise NotImplementedError(f"rope_type {kind}")
    angle = np.outer(np.arange(length), frequency)
    return np.cos(angle), np.sin(angle)


def window_of(config: dict, *, layer: int) -> int | None:
    """Positions a query of this layer sees, itself included; None: all."""
    window = config.get("sliding_window")
    if config["model_type"] == "mistral":
        return window
    if not config.get("use_sliding_window", False):
        return None
    return window if layer >= config["max_window_layers"] else None


def attend(
    h: np.ndarray,
    part: Weights,
    config: dict,
    *,
    cos: np.ndarray,
    sin: np.ndarray,
    window: int | None,
) -> np.ndarray:
    """Causal grouped-query attention of one layer: [T, D] to [T, D]."""
    d = head_dim_of(config)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        bias = part.get(f"self_attn.{name}_proj.bias", np.zeros(1))
        weight = part[f"self_attn.{name}_proj.weight"]
        return x @ weight.astype(np.float64).T + bias.astype(np.float64)

    def heads(name: str) -> np.ndarray:
        return linear(h, name).reshape(len(h), -1, d).transpose(1, 0, 2)

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k, v = heads("q"), heads("k"), heads("v")
    if "self_attn.q_norm.weight" in part:
        q = norm(q, part["self_attn.q_norm.weight"], config)
        k = norm(k, part["self_attn.k_norm.weight"], config)
    share = len(q) // len(k)
    k, v = np.repeat(rotate(k), share, axis=0), np.repeat(v, share, axis=0)
    scores = rotate(q) @ k.transpose(0, 2, 1) / math.sqrt(d)
    age = np.arange(len(h))[:, None] - np.arange(len(h))
    seen = (age >= 0) & (age < (window or len(h)))
    scores = np.where(seen, scores, -np.inf)
    share_of = np.exp(scores - scores.max(axis=-1, keepdims=True))
    share_of /= share_of.sum(axis=-1, keepdims=True)
    return linear((share_of @ v).transpose(1, 0, 2).reshape(len(h), -1), "o")


def feed_forward(
    h: np.ndarray,
    part: Weights,
    config: dict,
    *,
    mix: tuple[float, float, float],
    group_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Gated feed-forward of one layer with a precision class for each token's neuron.

    Kept are the k16 + k8 + k4 neurons of largest |h4[t, i]| * norm of the base down
    column. Of them, the k16 of largest expected error of the base values use the
    original rows, the next k8 INT8, the next k4 base values; others nothing.

    Returns:
        The output, and by how much, relative to it, the last of a class that came
        nearest to the first of the next is ahead: [T].
    """
    original = [
        part["mlp.gate_proj.weight"].astype(np.float64),
        part["mlp.up_proj.weight"].astype(np.float64),
        part["mlp.down_proj.weight"].astype(np.float64).T,
    ]
    planes = [quantised(rows, group_size=group_size) for rows in original]
    int8, base = [pair[0] for pair in planes], [pair[1] for pair in planes]
    act = ACTIVATIONS[config["hidden_act"]]

    def hidden(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return act(h @ gate.T) * (h @ up.T)

    edges = class_edges(len(base[0]), mix=mix)
    score = np.abs(hidden(base[0], base[1])) * np.linalg.norm(base[2], axis=-1)
    error = np.where(
        places(score) < edges[-1], expected_error(h, original, base, act), -1
    )
    rank = places(error)
    gap = np.minimum(
        gap_at(score, edges[-1:]),
        # Whom nobody keeps has no error, so the last edge is not one of this order.
        gap_at(error, [edge for edge in edges[:-1] if edge < edges[-1]]),
    )
    out = np.zeros_like(h)
    first = 0
    for last, (gate, up, down) in zip(edges, (original, int8, base)):
        chosen = (rank >= first) & (rank < last)
        out += np.where(chosen, hidden(gate, up), 0) @ down
        first = last
    return out, gap


def gap_at(score: np.ndarray, edges: list[int]) -> np.ndarray:
    """How far the last before an edge is ahead of the first after it, relatively: [T].

    Infinite where there is no edge, or where both are zero: then ids decide.
    """
    ordered = -np.sort(-score, axis=-1)
    least = np.full(len(score), np.inf)
    for edge in edges:
        if 0 < edge < score.shape[-1]:
            last, after = ordered[:, edge - 1], ordered[:, edge]
            gap = np.divide(
                last - after, last, where=last > 0, out=np.full_like(last, np.inf)
            )
            least = np.minimum(least, gap)
    return least


def places(score: np.ndarray) -> np.ndarray:
    """Place of each in its row, the largest first; ties to the lower id."""
    return np.argsort(np.argsort(-score, axis=-1, kind="stable"), axis=-1)


def expected_error(
    h: np.ndarray,
    original: list[np.ndarray],
    base: list[np.ndarray],
    act: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Squared error that base values of a neuron give, if rounding were noise: [T, F].

    The slope of the activation is a difference quotient.
    """
    gate_error, up_error, down_error = (
        np.square(exact - rounded).sum(axis=1) for exact, rounded in zip(original, base)
    )
    column = np.square(base[2]).sum(axis=1) / h.shape[1]
    gate, up = h @ base[0].T, h @ base[1].T
    slope = (act(gate + 1e-6) - act(gate - 1e-6)) / 2e-6
    through = np.square(slope * up) * gate_error + np.square(act(gate)) * up_error
    power = np.square(h).sum(axis=1, keepdims=True)
    return power * column * through + np.square(act(gate) * up) * down_error


def class_edges(neurons: int, *, mix: tuple[float, float, float]) -> list[int]:
    """How many neurons have 16 bits, at least 8, at least 4."""
    return [math.floor(neurons * sum(mix[:n]) / 100 + 0.5) for n in (1, 2, 3)]


def quantised(rows: np.ndarray, *, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """INT8 and base values, float64 [F, D], of rows padded to whole groups."""
    size = rows.shape[-1]
    group, width = row_shape(size, group_size=group_size)
    padded = np.zeros((len(rows), width), np.float32)
    padded[:, :size] = rows
    codes, scales, _ = quantise_rows(padded, group=group)
    q4, r4 = split_codes(codes)
    int8 = dequantise_int8(q4, r4, scales, group=group)
    base = dequantise_base(q4, scales, group=group)
    return int8[:, :size].astype(np.float64), base[:, :size].astype(np.float64)
