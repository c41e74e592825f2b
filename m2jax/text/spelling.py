"""What bytes a token spells, and which text has bytes. Knows no tokenizer library.

Text is the bytes of its tokens read as UTF-8, so that it can be shown token by token
and still be the text of the whole. (The decoders of `tokenizers` take back what they
gave: with byte fallback one bad byte turns good characters beside it into U+FFFD.)
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: a printable Latin-1 character is itself, the others follow U+00FF."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)
    }


_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class Spelling:
    """How the pieces of one vocabulary are turned into bytes.

    replace: (from, to) within a piece. prefix: put before every piece.
    strips_space: one space at the very start of a text belongs to no one's words.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    strips_space: bool = False

    def token_bytes(self, piece: str) -> bytes:
        if self.byte_level and all(letter in _ALPHABET for letter in piece):
            return bytes(_ALPHABET[letter] for letter in piece)
        if self.byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        for old, new in self.replace:
            piece = piece.replace(old, new)
        return (self.prefix + piece).encode()


def spelling_of(decoder: dict[str, Any] | None) -> Spelling:
    """The spelling that a tokenizer.json asks for in its field `decoder`.

    Raises:
        NotImplementedError: a decoder that no LLaMA-family tokenizer has.
        KeyError, TypeError, AttributeError: a field is missing or of a wrong type.
    """
    if decoder is None:
        return Spelling(prefix=" ", strips_space=True)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    byte_level = byte_fallback = fused = strips_space = False
    replace: list[tuple[str, str]] = []
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}}:
                replace.append((old, str(step["content"])))
            case {"type": "Metaspace", "replacement": str(old)}:
                replace.append((old, " "))
                scheme = step.get("prepend_scheme", "always")
                strips_space = step.get("add_prefix_space", scheme != "never")
            case {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0} if fused:
                strips_space = step["start"] == 1
            case _:
                raise NotImplementedError(
                    f"decoder {step['type']} is not supported (ByteLevel, Metaspace, "
                    "ByteFallback, Fuse, Replace of a string, Strip of one space are)"
                )
    return Spelling(byte_level, byte_fallback, tuple(replace), "", strips_space)


def spell(pieces: Iterable[bytes], *, strips_space: bool) -> str:
    """Token bytes to text; each longest invalid run of bytes becomes one U+FFFD."""
    text = b"".join(pieces).decode(errors="replace")
    return text[1:] if strips_space and text.startswith(" ") else text


def check_text(text: str) -> None:
    """ValueError with the offset where text has a lone surrogate, hence no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start:,}; wanted text that UTF-8 can hold"
        ) from None
