"""Text to token ids and back: odd text, special strings, what ids spell."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_tokenizers import ALLOW_SWIG, BUNDLED, SPACE, load, make_folders

pytestmark = ALLOW_SWIG

ODD_TEXTS = {
    "empty": "",
    "nul": "a\0b",
    "emoji": "\N{ROCKET} and \N{BRAIN}\u200d",
    "right to left": "שלום עולם",
    "spaces": "  a   b \n\n\tc ",
    "special": "<s></s><|user|><0x41>",
}


REPLACE = tokenizers.decoders.Replace(SPACE, " ")
FUSE = tokenizers.decoders.Fuse()
DECODERS = {
    "none": None,
    "byte level": tokenizers.decoders.ByteLevel(),
    "metaspace": tokenizers.decoders.Metaspace(),
    "metaspace inside": tokenizers.decoders.Metaspace(prepend_scheme="never"),
    "replace": tokenizers.decoders.Sequence([REPLACE, FUSE]),
    "bytes": tokenizers.decoders.Sequence(
        [
            REPLACE,
            tokenizers.decoders.ByteFallback(),
            FUSE,
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return make_folders(tmp_path_factory)


@pytest.fixture(scope="module", params=["bundled", "sentencepiece", "json"])
def tokenizer(request, folders):
    return load(folders[request.param])


@pytest.fixture(scope="module")
def both(folders):
    """One model twice: from its tokenizer.json, and from its tokenizer.model."""
    return load(folders["json"]), load(folders["sentencepiece"])


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_text_is_kept_exactly(tokenizer, name):
    ids = tokenizer.encode(ODD_TEXTS[name])
    assert ids[0] == 1
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == ODD_TEXTS[name]


def test_a_line_of_1_mb_is_kept_exactly(folders):
    line = "So it goes. " * 87_400
    for kind in ("bundled", "sentencepiece"):
        tokenizer = load(folders[kind])
        assert tokenizer.decode(tokenizer.encode(line)) == line


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE)))
def test_any_text_without_surrogates_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=st.text("the dog<0x41>s é\n\N{ROCKET}"))
def test_both_readers_give_one_model_the_same_ids(both, text):
    by_json, by_sentencepiece = both
    ids = by_sentencepiece.encode(text)
    assert by_json.encode(text) == ids
    assert [by_json.token_bytes(i) for i in ids] == [
        by_sentencepiece.token_bytes(i) for i in ids
    ]


def test_the_ids_are_those_of_the_library():
    library = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    text = "def f(x):\n    return 'Once upon a time, ½ \N{ROCKET}'\n"
    assert load(BUNDLED).encode(text) == library.encode(text).ids
    assert load(BUNDLED).encode(text, add_bos=False) == library.encode(text).ids[1:]


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 6), max_size=8))
@pytest.mark.parametrize("name", DECODERS)
def test_ids_spell_what_the_decoder_of_the_file_makes_of_them(words, name, ids):
    library, tokenizer = words(DECODERS[name])
    assert tokenizer.decode(ids) == library.decode(ids)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of a few pieces with a given decoder, by the library and by us."""
    pieces = [
        "the",
        SPACE + "the",
        "é",
        "\u0120a",
        "<\uff5cx\uff5c>",
        "<0x41>",
        "\u2582",
    ]
    folder = tmp_path_factory.mktemp("words")

    @cache
    def make(decoder):
        vocab = {piece: i for i, piece in enumerate(pieces)}
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "the"))
        if decoder is not None:
            library.decoder = decoder
        library.save(str(folder / "tokenizer.json"))
        return library, load(folder)

    return make


def test_special_strings_are_text_unless_asked_for(tokenizer):
    text = "<s>the dog</s><|user|>"
    plain = tokenizer.encode(text, add_bos=False)
    parsed = tokenizer.encode(text, add_bos=False, parse_special=True)
    user = tokenizer.encode("<|user|>", add_bos=False, parse_special=True)
    assert not {1, 2, *user} & set(plain)
    assert len(user) == 1
    assert [parsed[0], *parsed[-2:]] == [1, 2, *user]
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode([0, *parsed]) == "the dog"
    assert tokenizer.encode(text, add_bos=False) == plain


def test_parsing_special_strings_in_one_thread_does_not_leak_into_others(tokenizer):
    text = "the dog </s>" * 50
    wanted = {
        special: tokenizer.encode(text, parse_special=special) for special in (0, 1)
    }
    assert wanted[0] != wanted[1]

    def encode(n: int) -> bool:
        special = n % 2
        return tokenizer.encode(text, parse_special=special) == wanted[special]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(encode, range(200)))


def test_bos_is_never_put_twice(tokenizer):
    assert tokenizer.encode("<s>the", parse_special=True).count(1) == 1
    assert tokenizer.encode("<s>the").count(1) == 1
    assert tokenizer.encode("")[:1] == [1]


def test_an_eos_of_the_post_processor_is_not_put_behind_a_prompt(folders):
    tokenizer = load(folders["json"])
    library = tokenizers.Tokenizer.from_file(str(folders["json"] / "tokenizer.json"))
    assert [*tokenizer.encode("the dog"), 2] == library.encode("the dog").ids


def test_a_lone_surrogate_is_refused_with_its_offset(tokenizer):
    with pytest.raises(ValueError, match=r"U\+D83D at character 3;"):
        tokenizer.encode("abc\ud83d")


def test_ids_without_a_token_spell_nothing_and_negative_ones_are_refused(tokenizer):
    ids = tokenizer.encode("the dog")
    assert tokenizer.decode([ids[0], 8191 + 5, *ids[1:], 2**40]) == "the dog"
    with pytest.raises(ValueError, match="token id -1"):
        tokenizer.decode([-1])
