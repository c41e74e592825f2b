"""Rotary position embedding in the rotate-half form of Hugging Face."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position, float32 [d / 2].

    Source: Llama 3.1's scaling as in transformers' `_compute_llama3_parameters`.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    plain = (1.0 / config.rope_theta**exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32)
    return _llama3(plain, scaling)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / plain
    context = scaling.original_context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    ramp = (context / wavelength - low) / (high - low)
    mixed = (1 - ramp) * plain / scaling.factor + ramp * plain
    result = np.where(wavelength > context / low, plain / scaling.factor, mixed)
    return np.where(wavelength < context / high, plain, result).astype(np.float32)


def rotate(x: Array, positions: Array, inverse: np.ndarray) -> Array:
    """Rotates pairs (i, i + d/2) of x [T, heads, d] by position * frequency i."""
    angles = positions[:, None].astype(jnp.float32) * inverse[None, :]
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
