"""Token ids to text as they come. Knows no model and no stream."""

import codecs
from collections.abc import Collection, Sequence

from m2jax.text.tokenizer import Tokenizer


class Detokenizer:
    """Shows text as soon as it is certain; one for each generation.

    What the pushes and the last finish return, joined, is the text of all ids: decode
    of prompt and ids, less decode of the prompt (a character that the prompt leaves
    half done is shown whole), cut where the first stop string begins. Held back
    meanwhile: half a character, and what may be the beginning of a stop string.

    Args:
        stop: strings that end the text. The one that begins first wins, of two that
            begin together the shorter; whether it is there does not depend on how the
            text is cut into tokens.
        prompt_ids: what stands before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
    ):
        listed = isinstance(stop, Collection) and not isinstance(stop, str)
        if not listed or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop: wanted a list of non-empty strings, got {stop!r}")
        self.stop_string: str | None = None
        self._stop = sorted(stop, key=len)
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        before = b"".join(map(tokenizer.token_bytes, prompt_ids))
        self._utf8.decode(before)
        self._strips_space = tokenizer.strips_space and not before

    @property
    def stopped(self) -> bool:
        """A stop string was met; no more ids are wanted."""
        return self.stop_string is not None

    def push(self, token_id: int) -> str:
        """The text that is now certain, "" if none is."""
        return self._take(self._utf8.decode(self._token_bytes(token_id)), last=False)

    def finish(self) -> str:
        """The rest of the text; half a character becomes U+FFFD. Call it once."""
        return self._take(self._utf8.decode(b"", True), last=True)

    def _take(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        if text and self._strips_space:
            text = text.removeprefix(" ")
            self._strips_space = False
        held = self._held + text
        begin, stop = min(
            ((held.find(stop), stop) for stop in self._stop if stop in held),
            key=lambda found: found[0],
            default=(len(held), None),
        )
        certain = begin if last else self._first_beginning(held, begin)
        if certain == begin:
            self.stop_string = stop
        self._held = held[certain:]
        return held[:certain]

    def _first_beginning(self, held: str, end: int) -> int:
        """Where, before end, what is held may be the beginning of a stop string."""
        longest = len(self._stop[-1]) if self._stop else 1
        for at in range(max(0, len(held) - longest + 1), end):
            if any(stop.startswith(held[at:]) for stop in self._stop):
                return at
        return end
