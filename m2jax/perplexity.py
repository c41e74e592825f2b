"""How well an engine predicts a text. Knows no files and prints nothing."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from m2jax.divergence import Divergence
from m2jax.engine import Engine
from m2jax.stats import ratio
from m2jax.text import Tokenizer

DEFAULT_CONTEXT = 512
WORST = 5
MAX_EXPONENT = math.log(sys.float_info.max)

Progress = Callable[[int, int], None]


def perplexity(
    engine: Engine,
    text: str,
    *,
    context: int = DEFAULT_CONTEXT,
    max_tokens: int | None = None,
    reference: bool | None = None,
    worst: int = WORST,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Scores a text in windows that do not overlap.

        nll = -1/n sum_t log p(t | window before t);  perplexity = exp(nll)

    The text is tokenised once. Where the tokenizer puts a BOS in front, a window is
    BOS and context - 1 tokens of the text, so that every token is scored; otherwise
    it is `context` tokens, scored from the second one. The last window may be short.

    Args:
        text: at least 2 tokens.
        context: tokens of a window, BOS included.
        max_tokens: read only so many tokens of the text; None = all.
        reference: also compare every token with the 16-bit model, in the same pass;
            None = where the engine can (`Engine.has_reference`).
        worst: tokens to name, those with the largest KL.
        progress: called after each window with tokens scored and to score.

    Returns:
        nll_per_token: nats. perplexity: None past the largest float.
        bits_per_byte: None where no scored token spells a byte.
        tokens: scored ones. bytes: of UTF-8 that these spell. windows, context.
        divergence: None, or `Divergence.summary` and the worst tokens with the text
        before them.

    Raises:
        ValueError: no tokenizer, a text of fewer than 2 tokens, or a number out of
            range. NumericalError: the model's probabilities hold NaN.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("perplexity needs a tokenizer, and this store has none")
    if not 2 <= context <= engine.context:
        raise ValueError(
            f"context {context}: want 2 to {engine.context}, what the engine was "
            "loaded for"
        )
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens {max_tokens}: want 2 or more")
    ids = tokenizer.encode(text, add_bos=False)[:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: want at least 2")
    windows = list(_windows(ids, context=context, bos_id=tokenizer.bos_id))
    total = sum(len(window) - 1 for window in windows)
    compared = Divergence() if _compares(engine, reference) else None
    nll_sum, tokens, size_bytes = 0.0, 0, 0
    for window in windows:
        if compared is None:
            logprobs = engine.logprobs(window)
        else:
            found = engine.compare(window)
            compared.add(found)
            logprobs = found.logprob
        nll_sum -= float(logprobs.sum(dtype="float64"))
        tokens += len(window) - 1
        size_bytes += sum(len(tokenizer.token_bytes(token)) for token in window[1:])
        progress(tokens, total)
    nll = nll_sum / tokens
    return {
        "nll_per_token": nll,
        "perplexity": math.exp(nll) if nll < MAX_EXPONENT else None,
        "bits_per_byte": ratio(nll_sum / math.log(2), size_bytes),
        "tokens": tokens,
        "windows": len(windows),
        "context": context,
        "bytes": size_bytes,
        "divergence": None
        if compared is None
        else {
            **compared.summary(),
            "worst": _with_text(compared.worst(worst), windows, tokenizer),
        },
    }


def _compares(engine: Engine, reference: bool | None) -> bool:
    if reference and not engine.has_reference:
        raise ValueError(
            "no 16-bit model to compare with: load the engine with planes=('w16',)"
        )
    return engine.has_reference if reference is None else reference


def _with_text(
    worst: list[dict[str, Any]], windows: list[list[int]], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The worst tokens as text, each with what stood before it."""
    ends = np.cumsum([len(window) - 1 for window in windows])
    for entry in worst:
        place = entry["token"]
        number = int(np.searchsorted(ends, place, side="right"))
        window = windows[number]
        column = place - (int(ends[number - 1]) if number else 0) + 1
        entry["text"] = tokenizer.decode(window[column : column + 1])
        entry["before"] = tokenizer.decode(window[max(0, column - 8) : column])
    return worst


def _windows(
    ids: list[int], *, context: int, bos_id: int | None
) -> Iterator[list[int]]:
    """Windows of 2 to `context` tokens, each scored from its second one."""
    front = [] if bos_id is None else [bos_id]
    step = context - len(front)
    for start in range(0, len(ids), step):
        window = front + ids[start : start + step]
        if len(window) > 1:
            yield window
