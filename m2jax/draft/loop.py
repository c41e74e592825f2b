"""The loop over tokens with a draft: propose, verify in one sweep, take what is right.

Owns the pace. The text is the target's own, token by token; see `verify`.
"""

import time
from collections.abc import Iterator

import numpy as np

from m2jax.compiling import compile_seconds
from m2jax.draft.drafters import Drafter, Text
from m2jax.draft.pace import Pace, rows_for
from m2jax.passage import begin
from m2jax.runner import Runner, checked
from m2jax.verify import NOT_DRAFTED


class Speculation:
    """Drafting and verifying for one engine.

    Args:
        kind: "base", "ngram" or the other model's folder, for reports.
    """

    def __init__(self, runner: Runner, drafter: Drafter, pace: Pace, *, kind: str):
        self._runner, self._drafter, self.pace = runner, drafter, pace
        self.kind = kind

    @property
    def held_bytes(self) -> int:
        return self._drafter.held_bytes

    def runs(self, text: Text, more: int) -> Iterator[tuple[list[int], list[float]]]:
        """`more` tokens after the text and their logprobs, some at a time.

        text.tokens grows by what is yielded.
        """
        self.pace.begin()
        alone = False
        while more > 0:
            count = 0 if alone else self.pace.next(self._most(text, more))
            drafted = self._propose(text, count) if count else []
            if drafted:
                tokens, logprobs, alone = self._verify(text, drafted)
            else:
                tokens, logprobs = self._one(text)
                alone = False
            if tokens:
                text.tokens += tokens
                more -= len(tokens)
                yield tokens, logprobs

    def _most(self, text: Text, more: int) -> int:
        """Tokens that may be drafted: the sweep adds one, and pads its rows."""
        room = text.kv[0].keys.shape[1] - text.position
        most = more - 1
        while most > 0 and rows_for(most) > room:
            most = rows_for(most) // 2 - 1 if rows_for(most) > 4 else 0
        return most

    def _propose(self, text: Text, count: int) -> list[int]:
        with _Clock() as clock:
            drafted = self._drafter.propose(text, count)
        if drafted and not clock.compiled:
            self.pace.note_draft(len(drafted), clock.seconds)
        drafts = self._runner.drafts
        drafts.drafted += len(drafted)
        drafts.draft_s += clock.seconds
        return drafted

    def _verify(
        self, text: Text, drafted: list[int]
    ) -> tuple[list[int], list[float], bool]:
        """Tokens, logprobs, and whether the next one must be chosen alone."""
        runner, rows = self._runner, rows_for(len(drafted))
        wanted = np.full(rows, NOT_DRAFTED, np.int32)
        wanted[: len(drafted)] = drafted
        with _Clock() as clock:
            passage = begin(
                [text.tokens[-1], *drafted],
                runner.steps,
                runner.embed,
                text.kv,
                start=text.position,
                sizes=[rows],
            )
            (x,) = runner.sweep(passage)
            found = runner.steps.verify(
                runner.head,
                runner.embed["embedding"],
                x,
                wanted,
                text.seen,
                np.int32(text.position + 1),
                text.values,
                mode=text.mode,
            )
            taken, unsure = int(found.taken), bool(found.unsure)
        tokens = [checked(token) for token in np.asarray(found.tokens)[:taken].tolist()]
        logprobs = np.asarray(found.logprobs)[:taken].tolist()
        text.seen = found.seen
        accepted = taken if unsure else taken - 1
        if not clock.compiled:
            self.pace.note_sweep(len(drafted), clock.seconds)
        if not unsure:
            self.pace.note_accepted(len(drafted), accepted)
        drafts = runner.drafts
        drafts.accepted += accepted
        drafts.sweeps += 1
        drafts.sweep_s += clock.seconds
        return tokens, logprobs, unsure

    def _one(self, text: Text) -> tuple[list[int], list[float]]:
        """One token without a draft."""
        with _Clock() as clock:
            x = self._runner.decode(text.tokens[-1], text.position, text.kv)
            token, logprob, text.seen = self._runner.next_token(
                x, text.seen, text.position + 1, text.values, text.mode
            )
        if not clock.compiled:
            self.pace.note_plain(clock.seconds)
        return [token], [logprob]

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
