"""tokenizer.json through the library `tokenizers`. Knows no other tokenizer file."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from m2jax.text.bos import BosRule
from m2jax.text.files import read_text
from m2jax.text.spelling import check_text, spell, spelling_of


class JsonTokenizer:
    """A tokenizer.json, read once and never changed, so that threads may share it.

    Of the post-processor only what it puts in front is used (BOS): a prompt goes on, so
    an EOS behind it is not added.
    """

    def __init__(self, path: Path, *, bos: BosRule):
        text = read_text(path)
        try:
            library = tokenizers.Tokenizer.from_str(text)
            fields = json.loads(text)
            # Files may carry the truncation and padding of somebody's training run.
            library.no_truncation()
            library.no_padding()
            prefix = _prefix(fields.get("post_processor"))
            self._spelling = spelling_of(fields.get("decoder"))
            added = [(t["content"], t["id"]) for t in fields.get("added_tokens", [])]
        except NotImplementedError as error:
            raise NotImplementedError(f"{path}: {error}") from None
        except Exception as error:
            raise ValueError(f"{path}: not a usable tokenizer: {error!r}") from None
        if len(prefix) > 1:
            raise NotImplementedError(
                f"{path}: post_processor puts {len(prefix)} tokens in front of a text; "
                "one (BOS) is supported"
            )
        for content, wanted in added:
            # The library gives a colliding added token another id without a word.
            if (given := library.token_to_id(content)) != wanted:
                raise ValueError(
                    f"{path}: added token {content!r} has id {wanted}, but the "
                    f"vocabulary makes it {given}: ids collide or leave a hole"
                )
        library.encode_special_tokens = True
        self._plain = library
        self._added = library.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = 1 + max(library.get_vocab().values(), default=-1)
        self.strips_space = self._spelling.strips_space
        own = prefix[0] if prefix else None
        self.bos_id = bos.bos_id(
            own, usual=own is not None, token_id=library.token_to_id
        )

    @cached_property
    def _special(self) -> tokenizers.Tokenizer:
        # A second copy rather than a switch: the library refuses to be changed while
        # another thread encodes ("Already borrowed"), or that thread sees the change.
        copy = tokenizers.Tokenizer.from_str(self._plain.to_str())
        copy.encode_special_tokens = False
        return copy

    def encode(
        self, text: str, *, add_bos: bool = True, parse_special: bool = False
    ) -> list[int]:
        check_text(text)
        library = self._special if parse_special else self._plain
        try:
            ids = library.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise ValueError(
                f"text: this tokenizer cannot encode it: {error}"
            ) from None
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return spell(map(self.token_bytes, ids), strips_space=self.strips_space)

    def token_bytes(self, token_id: int) -> bytes:
        spelled = self._bytes.get(token_id)
        if spelled is None:
            spelled = self._bytes[token_id] = self._spell(token_id)
        return spelled

    def _spell(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"token id {token_id}: wanted 0 or more")
        if token_id >= self.vocab_size:
            return b""
        added = self._added.get(token_id)
        if added is not None and added.special:
            return b""
        if added is not None and self._spelling.byte_level:
            return added.content.encode()
        piece = self._plain.id_to_token(token_id)
        return b"" if piece is None else self._spelling.token_bytes(piece)


def _prefix(processor: dict[str, Any] | None) -> list[int]:
    """The ids that a post-processor puts in front of one text.

    Read from the file, not asked of the library: on a template whose tokens are missing
    that aborts with a panic, which is no Exception.
    """
    ids: list[int] = []
    match processor:
        case {"type": "TemplateProcessing"}:
            for piece in processor["single"]:
                if "SpecialToken" not in piece:
                    break
                ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        case {"type": "Sequence"}:
            for step in processor["processors"]:
                ids = _prefix(step) + ids
        case {"type": "BertProcessing" | "RobertaProcessing"}:
            ids.append(processor["cls"][1])
    return ids
