"""Small tokenizers for the tests: the bundled one, and one trained on the spot."""

import random
from pathlib import Path

import pytest
import tokenizers

from m2jax.text import load_tokenizer

BUNDLED = Path(__file__).parents[1] / "m2jax" / "data" / "pystories8M"
SPACE = "\u2581"
# SWIG's types lack __module__, which Python 3.12 and later say when they are made.
ALLOW_SWIG = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
WORDS = ("a", "the", "dog", "that", "small", "ran", "to", "big", "red", "house", "back")


def make_folders(temporary: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind: "bundled", "sentencepiece", and that model as "json"."""
    trained = train_sentencepiece(temporary.mktemp("sentencepiece"))
    converted = temporary.mktemp("json")
    sentencepiece_to_json(trained, converted)
    return {"bundled": BUNDLED, "sentencepiece": trained, "json": converted}


def train_sentencepiece(folder: Path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(5)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(WORDS, k=9)) for _ in range(300)),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|user|>"],
        pad_id=-1,
        num_threads=1,
        minloglevel=3,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def sentencepiece_to_json(folder: Path, target: Path) -> None:
    """The same model as a tokenizer.json, as transformers converts it."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (left, right)
        for piece in sorted(pieces, key=lambda piece: -model.get_score(vocab[piece]))
        for left, right in ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        if left in vocab and right in vocab
    ]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    library.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Prepend(SPACE),
            tokenizers.normalizers.Replace(" ", SPACE),
        ]
    )
    library.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace(SPACE, " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>", "<|user|>"])
    library.save(str(target / "tokenizer.json"))


def load(folder: Path, **changed):
    return load_tokenizer(folder, **{"vocab_size": 8192, "bos_token_ids": ()} | changed)
