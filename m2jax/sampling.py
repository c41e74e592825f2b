"""From logits to a token. Pure functions; the random bits depend on seed and position.

Order of the chain (llama.cpp's): repetition penalty, top-k, top-p, min-p, temperature.
"""

import math
import secrets
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

MAX_SEED = 2**64
NOT_A_TOKEN = -1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: 0 = greedy. top_k: 0 = off. top_p: in (0, 1], 1 = off. min_p: in
    [0, 1], relative to the best token, 0 = off. repetition_penalty: > 0, 1 = off;
    divides positive and multiplies negative logits of tokens already in the text.
    seed: in [0, 2^64), None = drawn and reported.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 1e6, "[0, 1e6]")
        _check("top_p", self.top_p, 0, 1, "(0, 1]", above=True)
        _check("min_p", self.min_p, 0, 1, "[0, 1]")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            0,
            1e6,
            "(0, 1e6]",
            above=True,
        )
        if not isinstance(self.top_k, int) or not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k {self.top_k}: want an integer from 0 (off)")
        seed = self.seed
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < MAX_SEED):
            raise ValueError(f"seed {self.seed}: want an integer from 0 to 2^64 - 1")

    def with_seed(self) -> "Sampling":
        """The same with a seed drawn, if none was given."""
        if self.seed is not None:
            return self
        return Sampling(**{**self.__dict__, "seed": secrets.randbelow(2**32)})

    @property
    def mode(self) -> "SamplingMode":
        greedy = self.temperature == 0
        truncates = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return SamplingMode(
            greedy=greedy,
            truncates=truncates and not greedy,
            penalises=self.repetition_penalty != 1,
        )

    def values(self) -> "SamplingValues":
        seed = self.seed or 0
        return SamplingValues(
            temperature=np.float32(self.temperature),
            top_k=np.int32(self.top_k),
            top_p=np.float32(self.top_p),
            min_p=np.float32(self.min_p),
            repetition_penalty=np.float32(self.repetition_penalty),
            key=np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        )


def _check(
    name: str, value: float, low: float, high: float, want: str, *, above: bool = False
) -> None:
    inside = low < value <= high if above else low <= value <= high
    if not inside or not math.isfinite(value):
        raise ValueError(f"{name} {value}: want a number in {want}")


class SamplingMode(NamedTuple):
    """What is switched on: static, so that greedy decoding never sorts."""

    greedy: bool
    truncates: bool
    penalises: bool


class SamplingValues(NamedTuple):
    """The numbers, as arguments of a jit: changing them compiles nothing.

    Scalars but for key: uint32 [2].
    """

    temperature: ArrayLike
    top_k: ArrayLike
    top_p: ArrayLike
    min_p: ArrayLike
    repetition_penalty: ArrayLike
    key: ArrayLike


def sample(
    logits: Array,
    seen: Array,
    position: Array,
    values: SamplingValues,
    *,
    mode: SamplingMode,
) -> tuple[Array, Array]:
    """The next token and its log-probability under the unmodified logits.

    Args: see `preferences`.

    Returns:
        int32 token (NOT_A_TOKEN where a logit is NaN or infinite) and float32 logprob.
    """
    finite = jnp.all(jnp.isfinite(logits))
    logprobs = jax.nn.log_softmax(logits)
    liked = preferences(logits, seen, position, values, mode=mode)
    token = jnp.argmax(liked).astype(jnp.int32)
    return jnp.where(finite, token, NOT_A_TOKEN), logprobs[token]


def preferences(
    logits: Array,
    seen: Array,
    position: Array,
    values: SamplingValues,
    *,
    mode: SamplingMode,
) -> Array:
    """[V] float32, whose largest entry is the next token.

    Logits after penalties; where tokens are drawn, truncated, cooled, and with Gumbel
    noise that hangs on seed and position alone: two models of like logits draw the
    same token.

    Args:
        logits: [V] float32.
        seen: bool [V], tokens already in prompt or text.
        position: int32 scalar, of the token being chosen; counts the random stream.
    """
    if mode.penalises:
        penalty = values.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    if mode.greedy:
        return logits
    if mode.truncates:
        logits = _truncate(logits, values)
    key = jax.random.fold_in(
        jax.random.wrap_key_data(jnp.asarray(values.key)), position
    )
    # Shifted first, so that a tiny temperature cannot overflow the best token.
    cooled = (logits - jnp.max(logits)) / values.temperature
    return jax.random.gumbel(key, cooled.shape, cooled.dtype) + cooled


def _truncate(logits: Array, values: SamplingValues) -> Array:
    """-inf for what top-k, top-p and min-p drop, each on what the former left."""
    vocab = logits.shape[0]
    ordered, ids = lax.top_k(logits, vocab)
    ranks = jnp.arange(vocab)
    top_k = jnp.asarray(values.top_k)
    keep = ranks < jnp.where(top_k > 0, top_k, vocab)
    probs = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf))
    before = jnp.cumsum(probs) - probs
    keep &= before < values.top_p
    keep &= probs >= values.min_p * probs[0]
    # The best token always stays, whatever rounding did.
    keep = keep.at[0].set(True)
    return (
        jnp.full_like(logits, -jnp.inf).at[ids].set(jnp.where(keep, ordered, -jnp.inf))
    )
