"""What proposes tokens: the base plane, another model, or the text itself.

A drafter proposes and nothing more: it may be wrong, it cannot change the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax import Array

from m2jax.config import ModelConfig
from m2jax.device_loop import COMPILER_OPTIONS
from m2jax.draft.ngram import look_up
from m2jax.draft.pace import MOST_ROWS, Pace
from m2jax.draft.program import draft
from m2jax.ffn_spec import FfnSpec, with_mix
from m2jax.kv import LayerKV, block_sizes
from m2jax.mix import ALL_4
from m2jax.passage import begin
from m2jax.runner import Runner
from m2jax.sampling import SamplingMode, SamplingValues
from m2jax.step_bytes import step_bytes

# More seldom follow.
NGRAM_COUNT = 15


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


class Proposal(NamedTuple):
    """Tokens that may follow, and the place of each one's lead among `pace.LEADS`;
    no leads where the drafter knows none."""

    tokens: list[int]
    leads: list[int]


NOTHING = Proposal([], [])


class Drafter(Protocol):
    """Proposes what may follow."""

    def step_bytes(self, positions: float) -> float:
        """Bytes that a drafted token reads of the device's memory.

        Args:
            positions: that it sees.
        """
        ...

    def propose(
        self, text: Text, count: int, pace: Pace, meanwhile: Callable[[], None]
    ) -> Proposal:
        """Up to `count` tokens after the text; fewer where the pace says that more
        would not pay, or where it knows none.

        Args:
            meanwhile: called once the device is at work, if that takes a while.
        """
        ...

    def close(self) -> None: ...


class NgramDrafter:
    """What followed the text's last words where they stood before."""

    def step_bytes(self, positions: float) -> float:
        return 0.0

    def propose(
        self, text: Text, count: int, pace: Pace, meanwhile: Callable[[], None]
    ) -> Proposal:
        return Proposal(look_up(text.tokens, min(count, NGRAM_COUNT)), [])

    def close(self) -> None:
        pass


class BaseDrafter:
    """The target at 4 bits: plane q4 is on the device whole, and is a model itself.

    Works on the target's own KV cache; what it writes there is overwritten when the
    draft is verified.
    """

    def __init__(self, runner: Runner):
        specs = tuple(with_mix(spec, ALL_4) for spec in runner.steps.specs)
        self._runner, self._specs = runner, specs
        self._program = _compiled(runner.config, specs, 0)
        self._planes = [
            {"q4": runner.tiers.resident(layer, "q4")} for layer in range(len(specs))
        ]

    def step_bytes(self, positions: float) -> float:
        return step_bytes(self._runner, self._specs, positions)

    def propose(
        self, text: Text, count: int, pace: Pace, meanwhile: Callable[[], None]
    ) -> Proposal:
        proposal, text.kv = _draft(
            self._program,
            self._runner,
            self._planes,
            text,
            text.kv,
            count,
            pace,
            meanwhile,
        )
        self._runner.tiers.count_resident_steps(len(proposal.tokens), "q4")
        return proposal

    def close(self) -> None:
        pass


class ModelDrafter:
    """Another model of the same vocabulary, all of it on the device.

    Args:
        runner: of that model; closed with the drafter.
    """

    def __init__(self, runner: Runner):
        steps = runner.steps
        self._runner = runner
        self._program = _compiled(runner.config, steps.specs, steps.lookahead)
        self._planes = [
            runner.tiers.whole_planes(layer) for layer in range(len(steps.specs))
        ]
        self._kv: list[LayerKV] = []
        # Tokens whose keys and values are in place.
        self._read: list[int] = []

    def step_bytes(self, positions: float) -> float:
        return step_bytes(self._runner, self._runner.steps.specs, positions)

    def propose(
        self, text: Text, count: int, pace: Pace, meanwhile: Callable[[], None]
    ) -> Proposal:
        count = min(count, self._runner.plan.context - len(text.tokens))
        if count < 1:
            return NOTHING
        try:
            self._catch_up(text.tokens[:-1])
            proposal, self._kv = _draft(
                self._program,
                self._runner,
                self._planes,
                text,
                self._kv,
                count,
                pace,
                meanwhile,
            )
        except BaseException:
            # Buffers that were donated may be gone.
            self._kv, self._read = [], []
            raise
        self._read = [*text.tokens, *proposal.tokens[:-1]]
        return proposal

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


@lru_cache(maxsize=16)
def _compiled(config: ModelConfig, specs: tuple[FfnSpec, ...], lookahead: int):
    program = partial(draft, config=config, specs=specs, lookahead=lookahead)
    return jax.jit(
        program,
        static_argnames="mode",
        donate_argnames="kv",
        compiler_options=COMPILER_OPTIONS.get(jax.default_backend()),
    )


def _draft(
    program,
    runner: Runner,
    planes: Sequence[dict[str, Array]],
    text: Text,
    kv: list[LayerKV],
    count: int,
    pace: Pace,
    meanwhile: Callable[[], None],
) -> tuple[Proposal, list[LayerKV]]:
    """Up to `count` tokens in one program, from planes on the device.

    Returns:
        The tokens, and the cache, written up to and with the last but one of them.
    """
    found = program(
        runner.embed,
        runner.layers,
        runner.head,
        list(planes),
        kv,
        np.int32(text.tokens[-1]),
        np.int32(text.position),
        text.seen,
        np.int32(min(count, MOST_ROWS - 1)),
        pace.chances,
        np.float32(pace.least_chance),
        text.eos,
        text.values,
        mode=text.mode,
    )
    # After the dispatch: threads of Python would hold it up.
    meanwhile()
    made = int(found.count)
    tokens, leads = (
        np.asarray(row)[:made].tolist() for row in (found.tokens, found.leads)
    )
    return Proposal(tokens, leads), found.kv
