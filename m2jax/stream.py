"""The loop over tokens: one generation, its stop rules and its figures.

`runner` owns the loop over layers; prompts are token ids that have been checked.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.arguments import as_integer
from m2jax.compiling import compile_seconds
from m2jax.device_loop import RUN_TOKENS, first_carry
from m2jax.draft.drafters import Text
from m2jax.draft.loop import Speculation
from m2jax.draft.pace import MOST_ROWS
from m2jax.kernels.choice import report
from m2jax.kv import LayerKV, block_sizes
from m2jax.runner import Progress, Runner
from m2jax.sampling import Sampling
from m2jax.stats import Counters, Stats, Timings
from m2jax.text import Detokenizer, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """One finished generation.

    text: without stop string; None where the store has no tokenizer. token_ids: the
    generated ones, an end-of-text token included. logprobs: of each, under the
    unmodified logits. finish_reason: "stop" (end of text or stop string) or "length".
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    prompt_tokens: int
    finish_reason: FinishReason
    seed: int
    stats: Stats


@dataclass
class _Request:
    """State of one generation while it runs."""

    prompt: list[int]
    limit: int
    sampling: Sampling
    eos: frozenset[int]
    start_s: float
    before: Counters
    compiled_before_s: float
    after_first: Counters | None = None
    after_last: Counters | None = None
    compiled_s: float = 0.0
    kernels: dict[str, Any] = field(default_factory=dict)
    first_s: float | None = None
    last_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    def take(self, token: int, logprob: float) -> bool:
        """Notes a token; True if it ends the text."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.eos:
            self.finish_reason = "stop"
        return token in self.eos


class Stream:
    """One generation as an iterator over pieces of text; see `Engine.stream`.

    run_tokens: the most that are made between two looks at the stop strings where
    decoding runs without the host; None = as many as a run may make.
    run_s: about how long making them may take: so long nobody can interrupt it.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        prompt: list[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] | None,
        ignore_eos: bool,
        run_tokens: int | None,
        run_s: float,
        progress: Progress,
        load_s: float,
        speculation: Speculation | None = None,
    ):
        most = as_integer(
            max_new_tokens, name="max_new_tokens", want="an integer from 0"
        )
        stop = () if stop is None else stop
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this store has none")
        self._runner = runner
        self._load_s = load_s
        self._speculation = speculation
        self._run_tokens, self._run_s = run_tokens, run_s
        self._progress = progress
        self._text: list[str] = []
        self._detokenizer = (
            Detokenizer(tokenizer, stop=stop, prompt_ids=prompt) if tokenizer else None
        )
        eos = () if ignore_eos else runner.config.eos_token_ids
        self._request = _Request(
            prompt=prompt,
            limit=min(most, runner.plan.context - len(prompt)),
            sampling=sampling.with_seed(),
            eos=frozenset(eos),
            start_s=time.perf_counter(),
            before=self._runner.counters(),
            compiled_before_s=compile_seconds(),
        )
        self._pieces = self._run()
        self._done = self._failed = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            if not self._done:
                self._runner.check_open()
            piece = next(self._pieces)
        except StopIteration:
            self._end()
            raise
        except BaseException:
            self._failed = True
            raise
        self._text.append(piece)
        return piece

    def _end(self) -> None:
        """The figures are those of now: the engine may go on with something else."""
        if self._done:
            return
        self._done = True
        request = self._request
        request.after_last = self._runner.counters()
        request.kernels = report()
        request.compiled_s = compile_seconds() - request.compiled_before_s

    def result(self) -> Generation:
        """The finished generation.

        Raises:
            RuntimeError: the iterator is not exhausted, or it failed.
        """
        if self._failed:
            raise RuntimeError("the stream failed: it has no result")
        if not self._done:
            raise RuntimeError("the stream has not ended: iterate over it first")
        request, runner = self._request, self._runner
        first, last, count = request.first_s, request.last_s, len(request.tokens)
        assert request.after_last is not None
        decode = request.after_last.since(request.after_first or request.before)
        return Generation(
            text="".join(self._text) if self._detokenizer else None,
            token_ids=request.tokens,
            logprobs=request.logprobs,
            prompt_tokens=len(request.prompt),
            finish_reason=request.finish_reason,
            seed=request.sampling.seed or 0,
            stats=Stats(
                held=runner.held(),
                ssd=runner.ssd,
                request=request.after_last.since(request.before),
                decode=decode,
                decode_steps=max(0, count - 1),
                timings=Timings(
                    load_s=self._load_s,
                    ttft_s=None if first is None else first - request.start_s,
                    tpot_s=(
                        (last - first) / (count - 1)
                        if first is not None and last is not None and count > 1
                        else None
                    ),
                    compile_s=request.compiled_s,
                ),
                kernels=request.kernels,
            ),
        )

    def _run(self) -> Iterator[str]:
        """Pieces of text; each token passes `take` and the detokenizer once."""
        request, detokenizer = self._request, self._detokenizer
        for token, logprob in self._tokens():
            ended = request.take(token, logprob)
            if detokenizer:
                piece = detokenizer.push(token)
                if piece:
                    yield piece
                if detokenizer.stopped:
                    request.finish_reason = "stop"
                    return
            if ended:
                break
        # What was held back as a possible beginning of a stop string was none.
        rest = detokenizer.finish() if detokenizer else ""
        # Or a shorter one stood in it.
        if detokenizer and detokenizer.stopped:
            request.finish_reason = "stop"
        if rest:
            yield rest

    def _tokens(self) -> Iterator[tuple[int, float]]:
        """Tokens and logprobs one by one; notes when they came."""
        if self._request.limit == 0:
            return
        for tokens, logprobs in self._token_runs():
            self._request.last_s = time.perf_counter()
            yield from zip(tokens, logprobs, strict=True)

    def _token_runs(self) -> Iterator[tuple[list[int], list[float]]]:
        """Tokens and logprobs, as many at a time as are made at a time."""
        request, runner = self._request, self._runner
        values, mode = request.sampling.values(), request.sampling.mode
        prompt = request.prompt
        # While a trace is recorded, every token is decoded by itself.
        speculation = self._speculation if runner.tiers.trace is None else None
        kv = runner.new_kv(
            max(sum(block_sizes(len(prompt))), len(prompt) + request.limit),
            spare=MOST_ROWS if speculation else 0,
        )
        seen = np.zeros(runner.config.vocab_size, np.bool_)
        seen[prompt] = True
        position = len(prompt)
        token, logprob, seen = runner.next_token(
            self._last_row(kv), jnp.asarray(seen), position, values, mode
        )
        request.first_s = time.perf_counter()
        request.after_first = runner.counters()
        yield [token], [logprob]
        if speculation:
            text = Text([*prompt, token], kv, seen, values, mode, self._ends())
            yield from speculation.runs(text, request.limit - 1)
            return
        made = 1
        if not runner.on_device:
            while made < request.limit:
                x = runner.decode(token, position, kv)
                position += 1
                token, logprob, seen = runner.next_token(
                    x, seen, position, values, mode
                )
                made += 1
                yield [token], [logprob]
            return
        most = min(self._run_tokens or RUN_TOKENS, RUN_TOKENS)
        run = 1
        carry = first_carry(token, position, kv, seen)
        while made < request.limit:
            begun = time.perf_counter()
            tokens, logprobs, carry = runner.decode_on_device(
                carry, min(run, request.limit - made), self._ends(), values, mode
            )
            made += len(tokens)
            took = time.perf_counter() - begun
            run = max(1, min(most, int(self._run_s / took * len(tokens))))
            yield tokens, logprobs

    def _last_row(self, kv: list[LayerKV]) -> Array:
        """[1, D] of the prompt's last token. The other rows go: of a long prompt they
        are large."""
        prompt = self._request.prompt
        *_, block = self._runner.prefill(prompt, kv, self._progress)
        last = (len(prompt) - 1) % block.shape[0]
        return block[last : last + 1]

    def _ends(self) -> np.ndarray:
        """int32, one for each end of text that the model has: -1, which never equals a
        token, where it is none here. One shape: one program."""
        eos, known = self._request.eos, len(self._runner.config.eos_token_ids)
        return np.array([*sorted(eos), *[-1] * max(1, known)], np.int32)[
            : max(1, known)
        ]
