"""Drafts by prompt look-up: what followed the last words the last time. No model."""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
# How far back a match is looked for.
WINDOW = 4096


def look_up(tokens: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the latest earlier place where the last
    tokens stand; [] if they stand nowhere.

    The longest match of LONGEST down to SHORTEST tokens wins.

    Source: prompt look-up decoding, A. Saxena, 2023.
    """
    text = list(tokens[-WINDOW:])
    for length in range(min(LONGEST, len(text) - 1), SHORTEST - 1, -1):
        ending = text[-length:]
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == ending:
                after = text[start + length : start + length + count]
                return after
    return []
