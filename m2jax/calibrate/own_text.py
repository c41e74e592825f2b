"""How sure a model is of the text that it writes itself, under any mix.

One program for all mixes: class sizes are values. The measure of the paper's search.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from m2jax import model
from m2jax.calibrate.windows import check_classes, mixed_feed_forward
from m2jax.config import ModelConfig
from m2jax.engine import Engine
from m2jax.errors import DoesNotFit, NumericalError
from m2jax.ffn_spec import FfnSpec
from m2jax.kv import init_kv
from m2jax.layer import LayerParams
from m2jax.mix import PrecisionMix
from m2jax.model import Bank

Planes = dict[str, Array]


def greedy_entropy(
    embed: Bank,
    layers: list[LayerParams],
    head: Bank,
    planes: list[Planes],
    prompt: Array,
    edges: Array,
    *,
    config: ModelConfig,
    spec: FfnSpec,
    ranker: str,
    new_tokens: int,
) -> Array:
    """Mean entropy, in nats, of the distributions that new greedy tokens came from.

    Args:
        prompt: int32 [P]. edges: int32 [L, 3], see `mixed_feed_forward`.
    """
    steps = prompt.shape[0] + new_tokens - 1
    padded = jnp.zeros(steps, jnp.int32).at[: prompt.shape[0]].set(prompt)

    def step(carry, position: Array):
        token, kv = carry
        token = jnp.where(position < prompt.shape[0], padded[position], token)
        x = model.embed(embed, token[None], config=config)
        kv = list(kv)
        for layer, params in enumerate(layers):
            x, kv[layer], params, records = lax.optimization_barrier(
                (x, kv[layer], params, planes[layer])
            )
            x, h, kv[layer] = model.attend(
                params.attention, x, kv[layer], position, params.window, config=config
            )
            x = x + mixed_feed_forward(
                params, records, None, h, None, edges[layer], spec=spec, ranker=ranker
            )
        logits = model.logits(head, embed, x, config=config)[0]
        logprobs = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs)
        return (jnp.argmax(logits).astype(jnp.int32), kv), entropy

    kv = init_kv(config, steps)
    places = jnp.arange(steps, dtype=jnp.int32)
    _, entropies = lax.scan(step, (jnp.int32(0), kv), places)
    return jnp.mean(entropies[prompt.shape[0] - 1 :])


class OwnText:
    """Entropy of a resident model's own text after given prompts.

    Raises:
        DoesNotFit: the engine has not all its planes on the device.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        *,
        ranker: str,
        new_tokens: int,
    ):
        runner = engine.runner
        if not runner.plan.placement.resident:
            raise DoesNotFit(
                "the entropy objective generates text with every plane on the device, "
                "and they do not fit: give a larger --hbm, or use --objective kl"
            )
        spec = engine.specs[0]
        layers = range(len(runner.layers))
        planes = [runner.tiers.whole_planes(layer) for layer in layers]
        self._prompts = [np.array(prompt, np.int32) for prompt in prompts]
        self._neurons, self._layers = spec.neurons, len(layers)
        self._planes = planes[0].keys()
        bound = partial(
            greedy_entropy,
            config=engine.config,
            spec=spec,
            ranker=ranker,
            new_tokens=new_tokens,
        )
        self._run = partial(
            jax.jit(bound), runner.embed, runner.layers, runner.head, planes
        )

    def entropy(self, mix: PrecisionMix) -> float:
        """Mean over prompts and new tokens, in nats; the mix in every layer.

        Raises:
            ValueError: the engine lacks a plane of the mix. NumericalError: NaN.
        """
        counts = mix.counts(self._neurons)
        check_classes(counts, self._planes)
        edges = np.cumsum(counts).astype(np.int32)
        edges = np.tile(edges, (self._layers, 1))
        found = [float(self._run(prompt, edges)) for prompt in self._prompts]
        if not np.all(np.isfinite(found)):
            raise NumericalError(f"entropy at mix {mix} holds NaN or infinity")
        return float(np.mean(found))
