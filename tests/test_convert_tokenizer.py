"""Tokenizers that no store could be used with: refused before a byte is written."""

import json

import pytest

from m2jax.convert import convert
from tests.small_checkpoints import TOKENIZER, small_checkpoint
from tests.small_tokenizers import ALLOW_SWIG, load, train_sentencepiece

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922\n"
    "size 9085657\n"
)


def with_token(token_id):
    fields = json.loads(TOKENIZER["tokenizer.json"])
    fields["model"]["vocab"] |= {"b": token_id}
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("tokenizer.json", LFS_POINTER, "not a usable tokenizer"),
        ("tokenizer.json", with_token(9999), "token id 9999"),
        ("tokenizer.model", LFS_POINTER, "tokenizer.model"),
        ("tokenizer_config.json", "[", "tokenizer_config.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused(tmp_path, name, text, why):
    source = small_checkpoint(tmp_path / "source")
    if name == "tokenizer.model":
        (source / "tokenizer.json").unlink()
    (source / name).write_text(text)
    with pytest.raises(ValueError, match=f"^{source / name}: ") as caught:
        convert(source, tmp_path / "store")
    assert why in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "store").exists()


@ALLOW_SWIG
def test_a_store_keeps_the_tokens_that_files_add_to_a_sentencepiece_model(tmp_path):
    source = small_checkpoint(tmp_path / "source", vocab=400)
    (source / "tokenizer.json").unlink()
    train_sentencepiece(source)
    size = load(source).vocab_size
    (source / "added_tokens.json").write_text(json.dumps({"<|end|>": size}))
    (source / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    folder = convert(source, tmp_path / "store") / "tokenizer"
    assert load(folder).encode("<|end|>", parse_special=True)[-1] == size


def test_a_checkpoint_without_a_tokenizer_is_converted(tmp_path):
    source = small_checkpoint(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    assert convert(source, tmp_path / "store").exists()
