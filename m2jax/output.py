"""What follows the last layer: the next token, or how likely the given ones were."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax import model
from m2jax.config import ModelConfig
from m2jax.errors import NumericalError
from m2jax.model import Bank
from m2jax.sampling import SamplingMode, SamplingValues, sample


def next_token(
    head: Bank,
    embed: Bank,
    x: Array,
    seen: Array,
    position: Array,
    values: SamplingValues,
    *,
    config: ModelConfig,
    mode: SamplingMode,
) -> tuple[Array, Array, Array]:
    """Token and logprob chosen after x [1, D], and `seen` with the token noted."""
    logits = model.logits(head, embed, x, config=config)[0]
    token, logprob = sample(logits, seen, position, values, mode=mode)
    return token, logprob, seen.at[token].set(True, mode="drop")


def target_logprobs(
    head: Bank, embed: Bank, x: Array, targets: Array, *, config: ModelConfig
) -> Array:
    """log p(target) after each row of x: [T, D], [T] -> [T] float32."""
    logits = model.logits(head, embed, x, config=config)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]


class Compared(NamedTuple):
    """Each token's distribution beside that of a reference model, float32 [T].

    kl: nats, of the reference to the model. logprob, reference_logprob: of the target.
    same_top: bool, whether both find the same token likeliest.
    """

    kl: Array | np.ndarray
    logprob: Array | np.ndarray
    reference_logprob: Array | np.ndarray
    same_top: Array | np.ndarray


def compare(
    head: Bank,
    embed: Bank,
    x: Array,
    reference: Array,
    targets: Array,
    *,
    config: ModelConfig,
) -> Compared:
    """Two residual streams [T, D] after the last layer, and the tokens that came.

        KL = sum_v p (e^d - 1 - d),  d = log q - log p

    This form has no term of first order in d, whose rounding would exceed a small sum.
    """
    q, p = (
        jax.nn.log_softmax(model.logits(head, embed, stream, config=config), axis=-1)
        for stream in (x, reference)
    )
    d = q - p

    def of_targets(logprobs: Array) -> Array:
        return jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]

    return Compared(
        kl=jnp.sum(jnp.exp(p) * (jnp.expm1(d) - d), axis=-1),
        logprob=of_targets(q),
        reference_logprob=of_targets(p),
        same_top=jnp.argmax(q, axis=-1) == jnp.argmax(p, axis=-1),
    )


def checked(token: int) -> int:
    """The token; NumericalError where there is none."""
    if token < 0:
        raise NumericalError(
            "the model's logits hold NaN or infinity: no token can be chosen; "
            'check the store with "m2jax verify"'
        )
    return token
