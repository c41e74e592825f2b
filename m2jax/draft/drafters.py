"""What proposes tokens: the base plane, another model, or the text itself.

A drafter proposes and nothing more: it may be wrong, it cannot change the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.draft.ngram import look_up
from m2jax.draft.pace import MOST_ROWS
from m2jax.ffn_spec import with_mix
from m2jax.kv import LayerKV, block_sizes
from m2jax.mix import ALL_4
from m2jax.passage import begin
from m2jax.resident import ResidentCarry
from m2jax.runner import Runner
from m2jax.sampling import SamplingMode, SamplingValues
from m2jax.steps import Steps


@dataclass
class Text:
    """One text while it is made.

    tokens: prompt and what was made; the last one is not in the KV cache yet. kv: the
    target's, entries are replaced. seen: bool [V], tokens in the text. eos: ends.
    """

    tokens: list[int]
    kv: list[LayerKV]
    seen: Array
    values: SamplingValues
    mode: SamplingMode
    eos: np.ndarray

    @property
    def position(self) -> int:
        """Of the last token."""
        return len(self.tokens) - 1


class Drafter(Protocol):
    """Proposes what may follow."""

    @property
    def held_bytes(self) -> int:
        """On the device, beside the target's."""
        ...

    def propose(self, text: Text, count: int) -> list[int]:
        """Up to `count` tokens after the text; fewer or none where it knows none."""
        ...

    def close(self) -> None: ...


class NgramDrafter:
    """What followed the text's last words where they stood before."""

    held_bytes = 0

    def propose(self, text: Text, count: int) -> list[int]:
        return look_up(text.tokens, count)

    def close(self) -> None:
        pass


class BaseDrafter:
    """The target at 4 bits: plane q4 is on the device whole, and is a model itself.

    Works on the target's own KV cache; what it writes there is overwritten when the
    draft is verified.
    """

    held_bytes = 0

    def __init__(self, runner: Runner):
        steps = runner.steps
        specs = tuple(with_mix(spec, ALL_4) for spec in steps.specs)
        self._runner = runner
        self._steps = Steps(steps.config, specs)
        self._planes = [
            {"q4": runner.tiers.resident(layer, "q4")} for layer in range(len(specs))
        ]

    def propose(self, text: Text, count: int) -> list[int]:
        drafted, text.kv = draft_tokens(
            self._runner, self._steps, self._planes, text, text.kv, count
        )
        self._runner.tiers.count_resident_steps(len(drafted), planes=("q4",))
        return drafted

    def close(self) -> None:
        pass


class ModelDrafter:
    """Another model of the same vocabulary, all of it on the device.

    Args:
        runner: of that model; closed with the drafter.
        context: positions it has.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._planes = [
            runner.tiers.whole_planes(n) for n in range(runner.config.num_layers)
        ]
        self._kv: list[LayerKV] = []
        # Tokens whose keys and values are in place.
        self._read: list[int] = []

    @property
    def held_bytes(self) -> int:
        return self._runner.plan.footprint.hbm

    def propose(self, text: Text, count: int) -> list[int]:
        count = min(count, self._runner.plan.context - len(text.tokens))
        if count < 1:
            return []
        self._catch_up(text.tokens[:-1])
        drafted, self._kv = draft_tokens(
            self._runner, self._runner.steps, self._planes, text, self._kv, count
        )
        self._read = [*text.tokens, *drafted[:-1]]
        return drafted

    def _catch_up(self, tokens: list[int]) -> None:
        """Reads what of the text it has not read, or read otherwise."""
        same = 0
        for own, given in zip(self._read, tokens):
            if own != given:
                break
            same += 1
        if not self._kv:
            self._kv = self._runner.new_kv(self._runner.plan.positions)
        del self._read[same:]
        missing = tokens[same:]
        if not missing:
            return
        if same + sum(block_sizes(len(missing))) > self._kv[0].keys.shape[1]:
            # A padded block would leave the buffer: from the start, where it fits.
            same, missing = 0, tokens
        passage = begin(
            missing, self._runner.steps, self._runner.embed, self._kv, start=same
        )
        for layer, params in enumerate(self._runner.layers):
            passage.through(layer, params, self._planes[layer])
        self._read = list(tokens)

    def close(self) -> None:
        self._runner.close()


def draft_tokens(
    runner: Runner,
    steps: Steps,
    planes: Sequence[dict[str, Array]],
    text: Text,
    kv: list[LayerKV],
    count: int,
) -> tuple[list[int], list[LayerKV]]:
    """Up to `count` tokens in one program, from planes on the device.

    Returns:
        The tokens, fewer where the text would end, and the cache, written up to and
        with the last but one of them.
    """
    carry = ResidentCarry(
        tokens=jnp.zeros(MOST_ROWS, jnp.int32),
        logprobs=jnp.zeros(MOST_ROWS, jnp.float32),
        count=jnp.int32(0),
        token=jnp.int32(text.tokens[-1]),
        position=jnp.int32(text.position),
        kv=kv,
        # The carry is donated, and the text's own must stay.
        seen=jnp.array(text.seen, copy=True),
    )
    carry = steps.generate_resident(
        runner.embed,
        runner.layers,
        runner.head,
        list(planes),
        carry,
        np.int32(min(count, MOST_ROWS)),
        text.eos,
        text.values,
        mode=text.mode,
    )
    tokens = np.asarray(jax.device_get(carry.tokens))[: int(carry.count)].tolist()
    # What is no token came from a NaN; the target will meet it, or not.
    return [token for token in tokens if token >= 0], carry.kv
