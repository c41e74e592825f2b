"""SentencePiece tokenizer.model files. Knows no other tokenizer file."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from m2jax.text.bos import BosRule
from m2jax.text.files import named_special, read_bytes, read_optional_json
from m2jax.text.spelling import check_text, spell

_SPACE = "\u2581"
# Protobuf merges repeated fields: normalizer_spec { add_dummy_prefix: false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


class SentencePieceTokenizer:
    """A SentencePiece model and the tokens that the files beside it add.

    Each stretch of text between special tokens is encoded by itself. The model puts a
    space before the first; before the later ones only if tokenizer_config.json does not
    say "legacy": false (transformers' word for it, with the same default).
    """

    def __init__(self, path: Path, *, bos: BosRule):
        data = read_bytes(path)
        model = _load_model(path, data)
        size: int = model.get_piece_size()
        config = read_optional_json(path.parent / "tokenizer_config.json")
        self._first = self._later = model
        if config.get("legacy") is False:
            self._later = _load_model(path, data + _NO_DUMMY_PREFIX)
        try:
            self._bytes = {i: _token_bytes(model, i) for i in range(size)}
        except ValueError as error:
            raise ValueError(f"{path}: a piece that is damaged: {error}") from None
        control = filter(model.is_control, range(size))
        self._ids = {model.id_to_piece(token_id): token_id for token_id in control}
        literal: list[str] = []
        for token_id, (content, special) in _added_tokens(path.parent).items():
            if token_id >= size:
                self._ids[content] = token_id
                self._bytes[token_id] = b"" if special else content.encode()
                literal += [] if special else [content]
        self._plain_cuts, self._special_cuts = _cuts(literal), _cuts(self._ids)
        self.vocab_size = 1 + max(self._bytes)
        self.strips_space = _strips_space(model)
        named = self._ids.get(bos.name or "")
        own = model.bos_id() if named is None and model.bos_id() >= 0 else named
        self.bos_id = bos.bos_id(own, usual=True, token_id=self._ids.get)

    def encode(
        self, text: str, *, add_bos: bool = True, parse_special: bool = False
    ) -> list[int]:
        check_text(text)
        cuts = self._special_cuts if parse_special else self._plain_cuts
        ids: list[int] = []
        for n, stretch in enumerate(cuts.split(text)):
            if n % 2 == 1:
                ids.append(self._ids[stretch])
            else:
                ids += (self._later if n else self._first).encode(stretch)
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return spell(map(self.token_bytes, ids), strips_space=self.strips_space)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"token id {token_id}: wanted 0 or more")
        return self._bytes.get(token_id, b"")


def _load_model(path: Path, data: bytes) -> Any:
    if _TIKTOKEN.match(data):
        raise NotImplementedError(
            f"{path}: holds tiktoken ranks (Llama 3 as Meta ships it), which are not "
            "read; put the tokenizer.json of its Hugging Face checkpoint beside it"
        )
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise NotImplementedError(
            f"{path}: a SentencePiece model; pip install -e '.[sentencepiece]' in "
            "m2jax's folder, or put a tokenizer.json beside it"
        ) from None
    try:
        model = SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError):
        model = None
    if model is None or model.get_piece_size() == 0:
        raise ValueError(
            f"{path}: not a SentencePiece model ({len(data):,} bytes); "
            "copy it again from the checkpoint"
        )
    return model


def _token_bytes(model: Any, token_id: int) -> bytes:
    if model.is_control(token_id) or model.is_unknown(token_id):
        return b""
    piece = model.id_to_piece(token_id)
    if model.is_byte(token_id):
        return bytes.fromhex(piece[3:5])
    return piece.replace(_SPACE, " ").encode()


def _strips_space(model: Any) -> bool:
    """Whether the model's own decoder drops the space in front of the first word."""
    for token_id in range(model.get_piece_size()):
        if model.id_to_piece(token_id).startswith(_SPACE):
            spelled = _token_bytes(model, token_id).decode()
            return model.decode([token_id]) == spelled[1:]
    return False


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """Id to content, and whether it is special, of tokens that the files beside the
    model add. Of added_tokens.json those are that another file names, as transformers
    has it; tokenizer_config.json says so itself."""
    found: dict[int, tuple[str, bool]] = {}
    path, special = folder / "added_tokens.json", named_special(folder)
    try:
        for content, token_id in read_optional_json(path).items():
            found[int(token_id)] = content, content in special
        path = folder / "tokenizer_config.json"
        for token_id, token in (
            read_optional_json(path).get("added_tokens_decoder", {}).items()
        ):
            found[int(token_id)] = token["content"], bool(token.get("special"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: added tokens not understood: {error!r}") from None
    return found


def _cuts(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings as group 1, the longest first; "" is not one."""
    longest_first = sorted(filter(None, strings), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
