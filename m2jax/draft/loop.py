"""The loop over tokens with a draft: propose, verify in one sweep, take what is right.

Owns the pace. The text is the target's own, token by token; see `verify`.
"""

import time
from collections.abc import Iterator

import numpy as np

from m2jax.compiling import compile_seconds
from m2jax.device_loop import first_carry
from m2jax.draft.drafters import Drafter, Text
from m2jax.draft.pace import Pace, most_drafted, rows_for
from m2jax.output import checked
from m2jax.passage import begin
from m2jax.runner import Runner
from m2jax.timeline import span
from m2jax.turns import give_up
from m2jax.verify import NOT_DRAFTED


class Speculation:
    """Drafting and verifying for one engine.

    Args:
        kind: "base", "ngram" or the other model's folder, for reports.
    """

    def __init__(self, runner: Runner, drafter: Drafter, pace: Pace, *, kind: str):
        self._runner, self._drafter, self.pace = runner, drafter, pace
        self.kind = kind

    def step_bytes(self, positions: float) -> float:
        """See `Drafter`."""
        return self._drafter.step_bytes(positions)

    def runs(self, text: Text, more: int) -> Iterator[tuple[list[int], list[float]]]:
        """`more` tokens after the text and their logprobs, some at a time.

        text.tokens grows by what is yielded.
        """
        self.pace.begin()
        alone = False
        while more > 0:
            count = 0 if alone else self.pace.next(self._most(text, more))
            if count:
                tokens, logprobs, alone = self._round(text, count)
            else:
                tokens, logprobs = self._one(text)
                alone = False
            if tokens:
                text.tokens += tokens
                more -= len(tokens)
                yield tokens, logprobs

    def _round(self, text: Text, count: int) -> tuple[list[int], list[float], bool]:
        """Tokens, logprobs, and whether the next one must be chosen alone."""
        drafts, tiers = self._runner.drafts, self._runner.tiers
        try:
            with _Clock() as drafting, span(tiers.timeline, "draft"):
                proposal = self._drafter.propose(
                    text, count, self.pace, tiers.stage_ahead
                )
            if not proposal.tokens:
                tiers.forget_ahead()
                return [], [], True
            with _Clock() as sweeping:
                tokens, logprobs, unsure = self._verify(text, proposal.tokens)
        except BaseException:
            # Also where the sweep had not begun: what was staged waits for it.
            give_up(tiers)
            raise
        drafted = len(proposal.tokens)
        accepted = len(tokens) if unsure else len(tokens) - 1
        drafts.drafted += drafted
        drafts.accepted += accepted
        drafts.sweeps += 1
        drafts.draft_s += drafting.seconds
        drafts.sweep_s += sweeping.seconds
        if not unsure:
            self.pace.note_leads(proposal.leads, accepted)
        self.pace.note_round(
            len(tokens),
            drafted=drafted,
            draft_s=drafting.seconds,
            sweep_s=sweeping.seconds,
            compiled=drafting.compiled or sweeping.compiled,
        )
        return tokens, logprobs, unsure

    def _most(self, text: Text, more: int) -> int:
        """Tokens that may be drafted: the sweep adds one, and pads its rows."""
        room = text.kv[0].keys.shape[1] - text.position
        return min(more - 1, most_drafted(room))

    def _verify(
        self, text: Text, drafted: list[int]
    ) -> tuple[list[int], list[float], bool]:
        """One sweep over the layers for all drafted tokens; see `_round`."""
        runner, rows = self._runner, rows_for(len(drafted))
        wanted = np.full(rows, NOT_DRAFTED, np.int32)
        wanted[: len(drafted)] = drafted
        passage = begin(
            [text.tokens[-1], *drafted],
            runner.steps,
            runner.embed,
            text.kv,
            start=text.position,
            sizes=[rows],
        )
        (x,) = runner.sweep(passage)
        with span(runner.tiers.timeline, "verify"):
            found = runner.steps.verify(
                runner.head,
                runner.embed,
                x,
                wanted,
                text.seen,
                np.int32(text.position + 1),
                text.values,
                mode=text.mode,
            )
            taken = int(found.taken)
        text.seen = found.seen
        tokens = [checked(token) for token in np.asarray(found.tokens)[:taken].tolist()]
        logprobs = np.asarray(found.logprobs)[:taken].tolist()
        return tokens, logprobs, bool(found.unsure)

    def _one(self, text: Text) -> tuple[list[int], list[float]]:
        """One token without a draft."""
        runner, last = self._runner, text.tokens[-1]
        with _Clock() as clock:
            if runner.on_device:
                tokens, logprobs, carry = runner.decode_on_device(
                    first_carry(last, text.position, text.kv, text.seen),
                    1,
                    text.eos,
                    text.values,
                    text.mode,
                )
                text.kv, text.seen = carry.kv, carry.seen
            else:
                x = runner.decode(last, text.position, text.kv)
                token, logprob, text.seen = runner.next_token(
                    x, text.seen, text.position + 1, text.values, text.mode
                )
                tokens, logprobs = [token], [logprob]
        if not clock.compiled:
            self.pace.note_plain(clock.seconds)
        return tokens, logprobs

    def close(self) -> None:
        self._drafter.close()


class _Clock:
    """Seconds of a block, and whether XLA compiled in it: then they say little."""

    seconds = 0.0
    compiled = False

    def __enter__(self) -> "_Clock":
        self._compile_s, self._start = compile_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.compiled = compile_seconds() > self._compile_s
