"""The public engine: prompts in, text, tokens or logits out, and what moved for it.

Owns the loop over tokens and its stop rules; `runner` owns the loop over layers.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp
import numpy as np

from m2jax.cache.trace import Trace
from m2jax.compiling import compile_seconds
from m2jax.config import ModelConfig
from m2jax.errors import NumericalError
from m2jax.ffn import FfnSpec
from m2jax.kv import block_sizes
from m2jax.plan import MemoryPlan
from m2jax.runner import Progress, Runner
from m2jax.sampling import Sampling
from m2jax.stats import Counters, Stats, Timings
from m2jax.steps import ResidentCarry
from m2jax.text import Detokenizer, Tokenizer

DEFAULT_NEW_TOKENS = 256
STREAM_TOKENS = 8
MIN_RUN_TOKENS = 16

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


class Engine:
    """A loaded store. Made by `m2jax.load`; one request at a time.

    Args:
        runner: the model in its tiers.
        tokenizer: None where the store has none; prompts are then token ids.
        load_s: seconds that loading took, for the figures.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, *, load_s: float):
        self._runner = runner
        self.tokenizer = tokenizer
        self.load_s = load_s

    @property
    def config(self) -> ModelConfig:
        return self._runner.config

    @property
    def plan(self) -> MemoryPlan:
        return self._runner.plan

    @property
    def spec(self) -> FfnSpec:
        """Scorer, and how many neurons of a layer are in each precision class."""
        return self._runner.steps.spec

    @property
    def policy(self) -> str:
        """Name of the slot pools' eviction policy."""
        return self._runner.tiers.policy

    @property
    def context(self) -> int:
        """Positions that prompt and text may take together."""
        return self._runner.plan.context

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt as token ids, checked.

        Raises:
            ValueError: empty, text without a tokenizer, an id outside the vocabulary,
                or longer than the context.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("the prompt is empty; give some text, or token ids")
            if self.tokenizer is None:
                raise ValueError(
                    "this store has no tokenizer: give the prompt as token ids "
                    "(--token-ids 1,2,3)"
                )
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise ValueError("the prompt is empty: want at least one token")
        vocab = self.config.vocab_size
        for place, token in enumerate(ids):
            if not 0 <= token < vocab:
                raise ValueError(
                    f"prompt token {place} is {token}: want ids from 0 to {vocab - 1}"
                )
        if len(ids) > self.context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context holds {self.context}; "
                "shorten it, or raise --context (the model was made for "
                f"{self.config.context})"
            )
        return ids

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits: float32 [T, V], row t after token t.

        Raises:
            ValueError: see `encode`. NumericalError: NaN or infinity.
        """
        ids = self.encode(list(token_ids))
        found = np.concatenate([np.asarray(part) for part in self._runner.logits(ids)])
        if not np.all(np.isfinite(found)):
            raise NumericalError("the model's logits hold NaN or infinity")
        return found

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """log p of each token after the first, given those before: float32 [T - 1]."""
        return self._runner.target_logprobs(self.encode(list(token_ids)))

    def record(self, trace: Trace | None) -> None:
        """Notes the wanted sets of all decode steps from now on; None stops it."""
        self._runner.record(trace)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Text after a prompt.

        Args:
            prompt: text, or token ids as they are.
            max_new_tokens: at most so many; clamped to what the context leaves.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampling`.
            stop: strings that end the text and are not part of it.
            ignore_eos: go on after the model's end-of-text token.

        Raises:
            ValueError: a value out of range. StoreError: bytes damaged or unreadable.
            NumericalError: the logits hold NaN.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        stream = Stream(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            run_tokens=MIN_RUN_TOKENS if stop else None,
        )
        for _ in stream:
            pass
        return stream.result()

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> "Stream":
        """Pieces of text as they become certain; joined they are `generate`'s text.

        The iterator's `result()` gives the `Generation` when it is exhausted.

        Args:
            progress: called with layers done and in all while the prompt is read.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        return Stream(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            run_tokens=STREAM_TOKENS,
            progress=progress,
        )

    def close(self) -> None:
        """Ends the reader threads. The engine cannot be used afterwards."""
        self._runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream:
    """One generation as an iterator over pieces of text.

    run_tokens: tokens made between two looks at the stop strings where decoding runs
    without the host; None = all.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        ignore_eos: bool,
        run_tokens: int | None,
        progress: Progress = lambda done, total: None,
    ):
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
            raise ValueError(f"max_new_tokens {max_new_tokens!r}: want an integer")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens {max_new_tokens}: want 0 or more")
        if stop and engine.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this store has none")
        ids = engine.encode(prompt)
        self._engine = engine
        self._runner = engine._runner
        self._run_tokens = run_tokens
        self._progress = progress
        self._text: list[str] = []
        self._detokenizer = (
            Detokenizer(engine.tokenizer, stop=stop, prompt_ids=ids)
            if engine.tokenizer
            else None
        )
        eos = () if ignore_eos else engine.config.eos_token_ids
        self._request = _Request(
            prompt=ids,
            limit=min(max_new_tokens, engine.context - len(ids)),
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
            piece = next(self._pieces)
        except StopIteration:
            self._done = not self._failed
            raise
        except BaseException:
            self._failed = True
            raise
        self._text.append(piece)
        return piece

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
        decode = runner.counters().since(request.after_first or request.before)
        return Generation(
            text="".join(self._text) if self._detokenizer else None,
            token_ids=request.tokens,
            logprobs=request.logprobs,
            prompt_tokens=len(request.prompt),
            finish_reason=request.finish_reason,
            seed=request.sampling.seed or 0,
            stats=Stats(
                held=runner.held(),
                request=runner.counters().since(request.before),
                decode=decode,
                decode_steps=max(0, count - 1),
                timings=Timings(
                    load_s=self._engine.load_s,
                    ttft_s=None if first is None else first - request.start_s,
                    tpot_s=(
                        (last - first) / (count - 1)
                        if first is not None and last is not None and count > 1
                        else None
                    ),
                    compile_s=compile_seconds() - request.compiled_before_s,
                ),
            ),
        )

    def _run(self) -> Iterator[str]:
        """Pieces of text; each token passes `take` and the detokenizer once."""
        request, detokenizer = self._request, self._detokenizer
        if request.limit > 0:
            for tokens, logprobs in self._token_runs():
                request.last_s = time.perf_counter()
                for token, logprob in zip(tokens, logprobs, strict=True):
                    ended = request.take(token, logprob)
                    if detokenizer:
                        piece = detokenizer.push(token)
                        if detokenizer.stopped:
                            request.finish_reason = "stop"
                            ended = True
                        if piece:
                            yield piece
                    if ended:
                        return
        if detokenizer and not detokenizer.stopped:
            rest = detokenizer.finish()
            if rest:
                yield rest

    def _token_runs(self) -> Iterator[tuple[list[int], list[float]]]:
        """Tokens and logprobs, as many at a time as are made at a time."""
        request, runner = self._request, self._runner
        values, mode = request.sampling.values(), request.sampling.mode
        prompt = request.prompt
        positions = max(sum(block_sizes(len(prompt))), len(prompt) + request.limit)
        kv = runner.new_kv(positions)
        seen = np.zeros(runner.config.vocab_size, np.bool_)
        seen[prompt] = True
        xs = runner.prefill(prompt, kv, self._progress)
        last = (len(prompt) - 1) % xs[-1].shape[0]
        position = len(prompt)
        token, logprob, seen = runner.next_token(
            xs[-1][last : last + 1], jnp.asarray(seen), position, values, mode
        )
        request.first_s = time.perf_counter()
        request.after_first = runner.counters()
        yield [token], [logprob]
        made = 1
        if not runner.resident:
            while made < request.limit:
                x = runner.decode(token, position, kv)
                position += 1
                token, logprob, seen = runner.next_token(
                    x, seen, position, values, mode
                )
                made += 1
                yield [token], [logprob]
            return
        run = self._run_tokens or _at_least(request.limit)
        carry = ResidentCarry(
            tokens=jnp.zeros(run, jnp.int32),
            logprobs=jnp.zeros(run, jnp.float32),
            count=jnp.int32(0),
            token=jnp.int32(token),
            position=jnp.int32(position),
            kv=kv,
            seen=seen,
        )
        # -1 never equals a token: an empty list of ends.
        eos = np.array(sorted(request.eos) or [-1], np.int32)
        while made < request.limit:
            limit = min(run, request.limit - made)
            tokens, logprobs, carry = runner.decode_resident(
                carry, limit, eos, values, mode
            )
            made += len(tokens)
            yield tokens, logprobs


def _at_least(count: int) -> int:
    """The power of two not below `count`: buffer lengths of few sizes."""
    size = MIN_RUN_TOKENS
    while size < count:
        size *= 2
    return size
