"""Calibration text as windows of token ids. Knows no model."""

from collections.abc import Sequence

import numpy as np

from m2jax.text import Tokenizer

# Where more tokens than this are no characters of their own, the text is not the
# tokenizer's: English on an English vocabulary has none, Chinese on it nearly all.
MOST_BROKEN = 0.5


def calibration_windows(
    tokenizer: Tokenizer | None,
    text: str,
    *,
    length: int,
    tokens: int,
    least: int = 1,
) -> list[list[int]]:
    """Windows of one length, spread evenly over the text.

    Args:
        length: ids of a window, the BOS in front included, where there is one.
        tokens: at most so many in all. least: windows that must be there.

    Raises:
        ValueError: no tokenizer, a length or count out of range, a text that is too
            short, or one of which the tokenizer knows few characters.
    """
    if tokenizer is None:
        raise ValueError("calibration needs a tokenizer, and this store has none")
    if length < 2:
        raise ValueError(f"--window {length}: want 2 tokens or more")
    if tokens < least * length:
        raise ValueError(
            f"--tokens {tokens}: want at least {least * length}, {least} windows of "
            f"{length}"
        )
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    step = length - len(front)
    ids = tokenizer.encode(text, add_bos=False)
    if len(ids) < least * step:
        raise ValueError(
            f"the text has {len(ids)} tokens: want at least {least * step}; give a "
            "longer one, or a smaller --window"
        )
    broken = _broken_share(tokenizer, ids)
    if broken > MOST_BROKEN:
        raise ValueError(
            f"{100 * broken:.0f} % of the text's tokens are unknown or pieces of "
            "characters: it is not of the kind this tokenizer was made for; give "
            "another text"
        )
    room = len(ids) // step
    count = min(tokens // length, room)
    starts = [step * (n * room // count) for n in range(count)]
    return [front + ids[start : start + step] for start in starts]


def check_window(length: int, context: int) -> None:
    """Refuses windows that the model was not made for."""
    if not 2 <= length <= context:
        raise ValueError(
            f"--window {length}: want 2 to {context} tokens, the model's context"
        )


def _broken_share(tokenizer: Tokenizer, ids: Sequence[int]) -> float:
    """Share of tokens whose bytes are no text by themselves."""
    kinds, counts = np.unique(np.array(ids), return_counts=True)
    broken = [not _is_text(tokenizer.token_bytes(int(kind))) for kind in kinds]
    return float(counts[np.array(broken)].sum() / len(ids))


def _is_text(data: bytes) -> bool:
    if not data:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
