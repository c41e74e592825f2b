"""Text to token ids and back, by the tokenizer a checkpoint brought. Knows no model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from m2jax.text.bos import bos_rule
from m2jax.text.from_json import JsonTokenizer
from m2jax.text.from_sentencepiece import SentencePieceTokenizer


class Tokenizer(Protocol):
    """Text to token ids and back.

    vocab_size: highest id it knows, plus one; at most the model's.
    bos_id: the BOS that encode puts in front, None if it puts none.
    strips_space: decode drops one space at the very start.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def strips_space(self) -> bool: ...

    def encode(
        self, text: str, *, add_bos: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            add_bos: put bos_id in front, unless the ids begin with it already.
            parse_special: "<s>" and the like mean the special token (a rendered chat
                template); otherwise they are text like any other (what a user typed).

        Raises:
            ValueError: a lone surrogate, with its offset.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids: their token_bytes joined and read as UTF-8.

        Each longest invalid run of bytes becomes one U+FFFD.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token, maybe only part of a character.

        b"" for special tokens and for ids past vocab_size (rows of padding).

        Raises:
            ValueError: a negative id.
        """
        ...


def load_tokenizer(
    folder: Path, *, vocab_size: int, bos_token_ids: tuple[int, ...]
) -> Tokenizer | None:
    """The tokenizer in a folder: tokenizer.json, else tokenizer.model, else None.

    BOS: the file's own rule (a post-processor; always, with SentencePiece) unless
    add_bos_token in tokenizer_config.json says otherwise.

    Args:
        vocab_size: rows of the model's embedding.
        bos_token_ids: of the model's config; asked last.

    Raises:
        ValueError: a damaged file, or a token whose id has no row.
        NotImplementedError: a kind of tokenizer that cannot be read here.
    """
    json_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_path.is_file():
        path = json_path
    elif model_path.is_file():
        path = model_path
    else:
        return None
    rule = bos_rule(folder, model_ids=bos_token_ids)
    kind = JsonTokenizer if path is json_path else SentencePieceTokenizer
    tokenizer = kind(path, bos=rule)
    highest = max(tokenizer.vocab_size - 1, tokenizer.bos_id or 0)
    if highest >= vocab_size:
        raise ValueError(
            f"{path}: has token id {highest}, but the embedding has {vocab_size} rows; "
            "it belongs to another checkpoint"
        )
    return tokenizer
