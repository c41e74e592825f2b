"""The jitted steps that the host's loops are made of."""

from dataclasses import dataclass
from functools import cached_property, partial

import jax

from m2jax import device_loop, layer, model, output, verify
from m2jax.config import ModelConfig
from m2jax.ffn_spec import FfnSpec


@dataclass(frozen=True)
class Steps:
    """The steps of one model under its layers' mixes, each compiled once a shape.

    specs: one a layer. lookahead: layers between what a predictor sees and what it
    ranks, 0 or 1; layer 0 is always ranked from its own input.
    """

    config: ModelConfig
    specs: tuple[FfnSpec, ...]
    lookahead: int = 0

    @cached_property
    def embed(self):
        return jax.jit(partial(model.embed, config=self.config))

    @cached_property
    def attend_and_rank(self):
        step = partial(layer.attend_and_rank, config=self.config)
        return jax.jit(
            step, static_argnames=("spec", "following_spec"), donate_argnums=3
        )

    @cached_property
    def add_feed_forward(self):
        return jax.jit(partial(layer.add_feed_forward), static_argnames="spec")

    @cached_property
    def layer_block(self):
        step = partial(layer.layer_block, config=self.config)
        return jax.jit(step, static_argnames="spec", donate_argnums=3)

    @cached_property
    def compare(self):
        return jax.jit(partial(output.compare, config=self.config))

    @cached_property
    def next_token(self):
        step = partial(output.next_token, config=self.config)
        return jax.jit(step, static_argnames="mode", donate_argnums=3)

    @cached_property
    def verify(self):
        step = partial(verify.verify, config=self.config)
        return jax.jit(step, static_argnames="mode")

    @cached_property
    def logits(self):
        return jax.jit(partial(model.logits, config=self.config))

    @cached_property
    def target_logprobs(self):
        return jax.jit(partial(output.target_logprobs, config=self.config))

    @cached_property
    def generate_on_device(self):
        step = partial(
            device_loop.generate_on_device,
            config=self.config,
            specs=self.specs,
            lookahead=self.lookahead,
        )
        return jax.jit(
            step,
            static_argnames="mode",
            donate_argnames="carry",
            compiler_options=device_loop.COMPILER_OPTIONS.get(jax.default_backend()),
        )
