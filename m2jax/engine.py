"""The public engine: prompts in, text, tokens or logits out, and what moved for it.

Checks what it is given; `stream` owns the loop over tokens, `runner` that over layers.
"""

from collections.abc import Sequence

import numpy as np

from m2jax import scoring
from m2jax.arguments import as_token_ids
from m2jax.cache.trace import Trace
from m2jax.config import ModelConfig
from m2jax.draft.loop import Speculation
from m2jax.errors import NumericalError
from m2jax.ffn_spec import FfnSpec, with_mix
from m2jax.mix import ALL_16, PrecisionMix
from m2jax.output import Compared
from m2jax.plan import MemoryPlan
from m2jax.runner import Progress, Runner
from m2jax.sampling import Sampling
from m2jax.stream import Generation, Stream
from m2jax.text import Tokenizer

DEFAULT_NEW_TOKENS = 256
# What a run of many tokens may make at most, and how long it may take: of a stream, and
# of a text that nobody watches.
STREAM_TOKENS, STREAM_S = 8, 0.1
STOP_TOKENS, UNWATCHED_S = 16, 1.0


class Engine:
    """A loaded store. Made by `m2jax.load`; one request at a time.

    Args:
        runner: the model in its tiers.
        tokenizer: None where the store has none; prompts are then token ids.
        mixes: one a layer.
        dense: bits of the dense part's matrices.
        load_s: seconds that loading took, for the figures.
        speculation: how tokens are drafted; None = one at a time.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        *,
        mixes: tuple[PrecisionMix, ...],
        load_s: float,
        dense: int = 16,
        speculation: Speculation | None = None,
    ):
        self._runner = runner
        self._speculation = speculation
        self.tokenizer = tokenizer
        self.mixes, self.dense = mixes, dense
        self.load_s = load_s

    @property
    def config(self) -> ModelConfig:
        return self._runner.config

    @property
    def plan(self) -> MemoryPlan:
        return self._runner.plan

    @property
    def specs(self) -> tuple[FfnSpec, ...]:
        """Per layer: scorer, and how many neurons are in each precision class."""
        return self._runner.steps.specs

    @property
    def runner(self) -> Runner:
        """The model in its tiers, for calibration and measurements."""
        return self._runner

    @property
    def policy(self) -> str:
        """Name of the slot pools' eviction policy."""
        return self._runner.tiers.policy

    @property
    def ssd_reads(self) -> str:
        """How bytes leave the SSD, see `SsdReads.how`."""
        return self._runner.ssd.how

    @property
    def draft(self) -> str:
        """What drafts: "base", "ngram", another store's folder, or "none"."""
        return self._speculation.kind if self._speculation else "none"

    def draft_bytes(self, positions: float) -> float:
        """Bytes that a drafted token reads of the device's memory; 0 without drafts.

        Args:
            positions: that it sees.
        """
        return self._speculation.step_bytes(positions) if self._speculation else 0.0

    @property
    def context(self) -> int:
        """Positions that prompt and text may take together."""
        return self._runner.plan.context

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt as token ids, checked.

        Raises:
            ValueError: empty, text without a tokenizer, no integers, an id outside the
                vocabulary, or longer than the context.
            RuntimeError: the engine is closed.
        """
        self._runner.check_open()
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
            want = "prompt: want text or a sequence of token ids"
            ids = as_token_ids(prompt, want=want)
        return self._checked(ids)

    def _token_ids(self, token_ids: Sequence[int]) -> list[int]:
        """`encode` where no text is taken."""
        self._runner.check_open()
        want = "token_ids: want a sequence of token ids"
        return self._checked(as_token_ids(token_ids, want=want))

    def _checked(self, ids: list[int]) -> list[int]:
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
        ids = self._token_ids(token_ids)
        parts = scoring.logits(self._runner, ids)
        found = np.concatenate([np.asarray(part) for part in parts])
        if not np.all(np.isfinite(found)):
            raise NumericalError("the model's logits hold NaN or infinity")
        return found

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """log p of each token after the first, given those before: float32 [T - 1]."""
        return scoring.target_logprobs(self._runner, self._token_ids(token_ids))

    @property
    def has_reference(self) -> bool:
        """Whether `compare` can be asked: it was loaded for that, with the 16-bit plane
        and room for a second KV cache."""
        used = self.plan.placement.used
        return self.plan.sequences > 1 and all("w16" in planes for planes in used)

    def compare(self, token_ids: Sequence[int]) -> Compared:
        """Every token after the first, beside the 16-bit model: NumPy [T - 1].

        Both in one pass over the layers.

        Raises:
            ValueError: see `encode`; or loaded without `planes=("w16",)`.
        """
        ids = self._token_ids(token_ids)
        if not self.has_reference:
            raise ValueError(
                "no 16-bit model to compare with: load the engine with planes=('w16',)"
            )
        reference = [with_mix(spec, ALL_16) for spec in self.specs]
        return scoring.compare(self._runner, ids, reference)

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
        stop: Sequence[str] | None = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Text after a prompt.

        Args:
            prompt: text, or token ids as they are.
            max_new_tokens: at most so many; clamped to what the context leaves.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampling`.
            stop: strings that end the text and are not part of it; None = none.
            ignore_eos: go on after the model's end-of-text token.

        Raises:
            ValueError: a value out of range. StoreError: bytes damaged or unreadable.
            NumericalError: the logits hold NaN. RuntimeError: the engine is closed.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        stream = Stream(
            self._runner,
            self.tokenizer,
            self.encode(prompt),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            run_tokens=STOP_TOKENS if stop else None,
            run_s=UNWATCHED_S,
            progress=lambda done, total: None,
            load_s=self.load_s,
            speculation=self._speculation,
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
        stop: Sequence[str] | None = (),
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
            self._runner,
            self.tokenizer,
            self.encode(prompt),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            run_tokens=STREAM_TOKENS,
            run_s=STREAM_S,
            progress=progress,
            load_s=self.load_s,
            speculation=self._speculation,
        )

    def close(self) -> None:
        """Ends the reader threads. The engine can only be closed afterwards."""
        self._runner.close()
        if self._speculation:
            self._speculation.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
