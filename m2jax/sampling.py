"""From logits to a token. Pure functions; the random bits depend on seed and position.

Order of the chain (llama.cpp's): repetition penalty, top-k, top-p, min-p, temperature.
"""

import secrets
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from m2jax.arguments import as_integer, as_number, shown

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
        self._take_number("temperature", 1e6, "[0, 1e6]")
        self._take_number("top_p", 1, "(0, 1]", above=True)
        self._take_number("min_p", 1, "[0, 1]")
        self._take_number("repetition_penalty", 1e6, "(0, 1e6]", above=True)
        self._take_integer("top_k", 2**31 - 1, "an integer from 0 (off)")
        if self.seed is not None:
            self._take_integer("seed", MAX_SEED - 1, "an integer from 0 to 2^64 - 1")

    # Python's own numbers: a JAX scalar has no hash.
    def _take_integer(self, name: str, high: int, want: str) -> None:
        value = as_integer(getattr(self, name), name=name, high=high, want=want)
        object.__setattr__(self, name, value)

    def _take_number(
        self, name: str, high: float, interval: str, *, above: bool = False
    ) -> None:
        given, want = getattr(self, name), f"a number in {interval}"
        value = as_number(given, name=name, want=want)
        if not 0 <= value <= high or (above and value == 0):
            raise ValueError(f"{name} {shown(given)}: want {want}")
        object.__setattr__(self, name, value)

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
    return possible_preferences(logits, seen, position, values, mode=mode)[0]


def possible_preferences(
    logits: Array,
    seen: Array,
    position: Array,
    values: SamplingValues,
    *,
    mode: SamplingMode,
    off: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """`preferences` where each logit may be off by so many nats: [V] float32 of all
    that truncation may keep, and bool [V], which of these it keeps in any case."""
    kept = jnp.ones(logits.shape, bool)
    if mode.penalises:
        penalty = values.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    if mode.greedy:
        return logits, kept
    if mode.truncates:
        ordered, ids = lax.top_k(logits, logits.shape[0])
        may, must = (
            _kept(ordered, values, off, side=0 if off is None else side)
            for side in (1, -1)
        )
        kept = kept.at[ids].set(must)
        logits = logits.at[ids].set(jnp.where(may, ordered, -jnp.inf))
    key = jax.random.fold_in(
        jax.random.wrap_key_data(jnp.asarray(values.key)), position
    )
    # Shifted first, so that a tiny temperature cannot overflow the best token.
    cooled = (logits - jnp.max(logits)) / values.temperature
    return jax.random.gumbel(key, cooled.shape, cooled.dtype) + cooled, kept


def _kept(
    ordered: Array, values: SamplingValues, off: ArrayLike | None, *, side: int
) -> Array:
    """Which of the logits [V], largest first, top-k, top-p and min-p leave, each on
    what the former left.

    Args:
        off: nats by which a logit may be wrong.
        side: 1: what is left at most; -1: in any case; 0: nothing is wrong.
    """
    off = 0 if off is None else side * jnp.asarray(off)
    vocab = ordered.shape[0]
    ranks = jnp.arange(vocab)
    top_k = jnp.asarray(values.top_k)
    most = jnp.where(top_k > 0, top_k, vocab)
    probs = jax.nn.softmax(jnp.where(ranks < most, ordered, -jnp.inf))
    sums = jnp.cumsum(probs)
    above, before = ranks, sums - probs
    if side:
        # Those that are larger however wrong both are; for -1: may be.
        larger = jnp.searchsorted(-ordered, -(ordered + 2 * off))
        before = jnp.where(larger > 0, sums[larger - 1], 0)
        # For -1 a token counts itself.
        above = larger - int(side < 0)
        before -= probs if side < 0 else 0
    keep = above < most
    keep &= before * (1 - 2 * off) < values.top_p
    keep &= jnp.exp(ordered - ordered[0] + 2 * off) >= values.min_p
    # The best token always stays, whatever rounding did.
    return keep | (above == 0)
