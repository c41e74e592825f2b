"""Tokenizer files: which one is read, whose BOS holds, and what is refused."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from m2jax.text import special_strings
from tests.small_tokenizers import ALLOW_SWIG, BUNDLED, load, make_folders

pytestmark = ALLOW_SWIG


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return make_folders(tmp_path_factory)


@pytest.fixture
def edited(tmp_path):
    """A copy of the bundled tokenizer.json after an edit of its fields."""

    def edit(change=lambda fields: None, *, config=None) -> Path:
        fields = json.loads((BUNDLED / "tokenizer.json").read_text())
        change(fields)
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return edit


def without_template(fields):
    fields["post_processor"] = None


@pytest.mark.parametrize(
    ("template", "config", "bos"),
    [
        (True, None, 1),
        (True, {"add_bos_token": True, "bos_token": "</s>"}, 1),
        (True, {"add_bos_token": False}, None),
        (False, None, None),
        (False, {"bos_token": "<s>"}, None),
        (False, {"add_bos_token": True, "bos_token": "<s>"}, 1),
        (False, {"add_bos_token": True, "bos_token": {"content": "</s>"}}, 2),
        (False, {"add_bos_token": True}, 7),
    ],
)
def test_bos_is_what_the_files_say(edited, template, config, bos):
    folder = edited(lambda f: template or without_template(f), config=config)
    tokenizer = load(folder, bos_token_ids=(7,))
    assert tokenizer.bos_id == bos
    assert tokenizer.encode("the") == [bos] * (bos is not None) + tokenizer.encode(
        "the", add_bos=False
    )


@pytest.mark.parametrize(
    ("config", "bos"),
    [
        ({}, 1),
        ({"add_bos_token": False}, None),
        ({"bos_token": "<|user|>"}, 3),
        ({"bos_token": "not there"}, 1),
    ],
)
def test_sentencepiece_puts_a_bos_unless_told_not_to(folders, tmp_path, config, bos):
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(tmp_path).bos_id == bos


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token: wanted true or false"),
        ({"add_bos_token": True, "bos_token": "nope"}, "'nope' is not in the vocab"),
    ],
)
def test_a_bos_that_cannot_be_found_is_refused(edited, config, said):
    with pytest.raises(ValueError, match=said):
        load(edited(without_template, config=config))


def test_truncation_and_padding_of_the_file_are_ignored(edited):
    def cut(fields):
        fields["truncation"] = {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    text = "Once upon a time there was a dog"
    assert load(edited(cut)).encode(text) == load(BUNDLED).encode(text)


def test_more_tokens_than_embedding_rows_are_refused_and_fewer_are_not(folders):
    for folder in folders.values():
        size = load(folder).vocab_size
        assert load(folder, vocab_size=size + 64).vocab_size == size
        with pytest.raises(
            ValueError, match=f"token id {size - 1}, .* {size - 1} rows"
        ):
            load(folder, vocab_size=size - 1)


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_that_is_not_special_is_spelled_as_it_is_written(
    edited, special
):
    added = {"id": 8192, "content": "café", "special": special, "normalized": False}
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip"], False)
    folder = edited(lambda fields: fields["added_tokens"].append(added | flags))
    tokenizer = load(folder, vocab_size=8193)
    ids = tokenizer.encode("a café", parse_special=True)
    assert ids[-1] == 8192
    assert tokenizer.decode(ids) == ("a " if special else "a café")


def test_sentencepiece_takes_added_tokens_from_the_files_beside_it(folders, tmp_path):
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path)
    size = load(tmp_path).vocab_size
    decoder = {str(size + 2): {"content": "<think>", "special": False}}
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<|end|>": size, "<|end|>>": size + 1, "<tool>": size + 3})
    )
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": "<|end|>", "additional_special_tokens": ["<|end|>>"]}'
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder})
    )
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == size + 4
    plain = tokenizer.encode("the<think><tool><|end|>")
    assert {size + 2, size + 3} <= set(plain)
    assert size not in plain
    parsed = tokenizer.encode("the<think><|end|><|end|>><tool>", parse_special=True)
    assert parsed[-4:] == [size + 2, size, size + 1, size + 3]
    # Special is what another file names; the others are spelled.
    assert tokenizer.decode(parsed) == "the<think><tool>"


def test_legacy_false_puts_no_space_behind_a_special_token(folders, tmp_path):
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path)
    old = load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    new = load(tmp_path)
    text = "the dog<|user|> the<s>dog"
    assert old.decode(old.encode(text, parse_special=True)) == "the dog  the dog"
    assert new.decode(new.encode(text, parse_special=True)) == "the dog thedog"
    assert new.encode("the dog") == old.encode("the dog")


def test_a_folder_without_a_tokenizer_gives_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load(tmp_path) is None


def test_tokenizer_json_wins_over_tokenizer_model(edited):
    folder = edited()
    (folder / "tokenizer.model").write_bytes(b"not a model")
    assert load(folder).vocab_size == 8192


def test_special_strings_come_from_both_files_and_the_config_wins(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(
        '{"bos_token": "<a>", "eos_token": {"content": "<b>"}}'
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<c>", "pad_token": null, "add_bos_token": true}'
    )
    assert special_strings(tmp_path) == {"bos_token": "<c>", "eos_token": "<b>"}


DAMAGES = {
    "no model": (lambda f: f.pop("model"), ValueError, "not a usable tokenizer"),
    "no vocab": (lambda f: f["model"].pop("vocab"), ValueError, "not a usable"),
    "strange decoder": (
        lambda f: f.update(decoder={"type": "CTC", "pad_token": "_"}
        | {"word_delimiter_token": "|", "cleanup": True}),
        NotImplementedError,
        "decoder CTC is not supported",
    ),
    "template without its tokens": (
        lambda f: f["post_processor"]["special_tokens"].clear(),
        ValueError,
        "not a usable tokenizer",
    ),
    "template of two tokens": (
        lambda f: f["post_processor"]["single"].insert(
            0, {"SpecialToken": {"id": "<s>", "type_id": 0}}
        ),
        NotImplementedError,
        "2 tokens in front",
    ),
    "added tokens that collide": (
        lambda f: f["added_tokens"][3].update(content="<|assistant|>"),
        ValueError,
        r"added token '<\|assistant\|>' has id 3, but",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_tokenizer_json_is_refused_in_one_line(edited, name):
    change, error, said = DAMAGES[name]
    with pytest.raises(error, match=f"tokenizer.json: .*{said}") as caught:
        load(edited(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 1000, -2])
def test_a_truncated_tokenizer_is_refused_in_one_line(folders, tmp_path, kept):
    for folder, name in (("json", ".json"), ("sentencepiece", ".model")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / f"tokenizer{name}"
        path.write_bytes((folders[folder] / path.name).read_bytes()[:kept])
        with pytest.raises(ValueError, match=path.name) as caught:
            load(path.parent)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[1]", b"{", b"[" * 100_000])
def test_a_damaged_tokenizer_config_is_refused_in_one_line(edited, data):
    folder = edited()
    (folder / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_over_256_mib_is_not_read(tmp_path, name):
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, (256 << 20) + 1)
    with pytest.raises(ValueError, match=f"{name}: 268,435,457 bytes; at most"):
        load(tmp_path)


def test_tiktoken_ranks_are_recognised_and_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(NotImplementedError, match=r"tiktoken .* tokenizer\.json"):
        load(tmp_path)


def test_without_sentencepiece_the_error_names_the_extra(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        NotImplementedError, match=r"pip install -e '.\[sentencepiece\]'"
    ):
        load(folders["sentencepiece"])
