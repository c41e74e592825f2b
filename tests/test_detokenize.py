"""Text shown token by token is the text of the whole, and ends at a stop string."""

import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.text import Detokenizer
from tests.small_tokenizers import ALLOW_SWIG, BUNDLED, load, make_folders

pytestmark = ALLOW_SWIG

INVALID = "\N{REPLACEMENT CHARACTER}"
ROCKET = "\N{ROCKET}"
# For every kind of tokenizer: bytes, words, special tokens and rows of padding. Bytes
# are frequent, so that characters are often broken.
ids_of_tokens = st.lists(st.integers(0, 261) | st.integers(0, 8300), max_size=40)


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory):
    folders = make_folders(tmp_path_factory)
    return {kind: load(folder) for kind, folder in folders.items()}


@pytest.fixture(params=["bundled", "sentencepiece", "json"], scope="module")
def tokenizer(request, tokenizers_by_kind):
    return tokenizers_by_kind[request.param]


@pytest.fixture(scope="module")
def bundled(tokenizers_by_kind):
    return tokenizers_by_kind["bundled"]


def stream(detokenizer, ids) -> list[str]:
    """What each push and the last finish show; ids after the stop are not pushed."""
    shown = []
    for token_id in ids:
        shown.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    return [*shown, detokenizer.finish()]


@settings(deadline=None)
@given(ids=ids_of_tokens)
def test_the_pushes_joined_are_the_text_of_the_whole(tokenizer, ids):
    assert "".join(stream(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


@settings(deadline=None)
@given(ids=ids_of_tokens)
def test_the_text_is_the_one_that_the_library_decodes(bundled, library, ids):
    assert "".join(stream(Detokenizer(bundled), ids)) == library.decode(ids)


@pytest.fixture(scope="module")
def library():
    return tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


@settings(deadline=None)
@given(prompt=st.text("the dog \n" + ROCKET), ids=ids_of_tokens)
def test_the_text_is_what_the_ids_add_to_the_prompt(tokenizer, prompt, ids):
    prompt_ids = tokenizer.encode(prompt)
    shown = stream(Detokenizer(tokenizer, prompt_ids=prompt_ids), ids)
    whole = tokenizer.decode(prompt_ids + ids)
    assert tokenizer.decode(prompt_ids) + "".join(shown) == whole


def test_the_space_of_the_first_word_is_shown_behind_a_prompt_alone(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["sentencepiece"]
    dog = tokenizer.encode("the dog", add_bos=False)[1:]
    assert "".join(stream(Detokenizer(tokenizer), dog)) == "dog"
    assert "".join(stream(Detokenizer(tokenizer, prompt_ids=[1]), dog)) == "dog"
    the = tokenizer.encode("the")
    assert "".join(stream(Detokenizer(tokenizer, prompt_ids=the), dog)) == " dog"


def test_half_a_character_is_held_back_until_it_is_whole(tokenizer):
    ids = tokenizer.encode("a" + ROCKET, add_bos=False)
    *before, last, rest = stream(Detokenizer(tokenizer), ids)
    assert len(ids) > 3
    assert "".join(before) == "a"
    assert (last, rest) == (ROCKET, "")


def test_a_character_cut_at_the_end_becomes_one_replacement_character(tokenizer):
    ids = tokenizer.encode("a" + ROCKET, add_bos=False)[:-1]
    *before, rest = stream(Detokenizer(tokenizer), ids)
    assert ("".join(before), rest) == ("a", INVALID)


def test_a_bad_byte_leaves_the_characters_beside_it_whole(tokenizer):
    lead = tokenizer.encode(ROCKET, add_bos=False)[-4]
    ids = [*tokenizer.encode("a" + ROCKET, add_bos=False), lead]
    ids += tokenizer.encode(ROCKET, add_bos=False)[-4:]
    text = "".join(stream(Detokenizer(tokenizer), ids))
    assert text == f"a{ROCKET}{INVALID}{ROCKET}"


def test_a_character_that_the_prompt_leaves_half_done_is_shown_whole(tokenizer):
    *prompt, last = tokenizer.encode("a" + ROCKET)
    assert stream(Detokenizer(tokenizer, prompt_ids=prompt), [last]) == [ROCKET, ""]


def pieces_to_ids(tokenizer, text: str, rng: random.Random) -> list[int]:
    """The ids of a text that was cut at random places first."""
    ids = []
    while text:
        length = rng.randint(1, 5)
        ids += tokenizer.encode(text[:length], add_bos=False)
        text = text[length:]
    return ids


letters = st.text("ab", min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("abc", max_size=20),
    stop=st.lists(letters, max_size=3),
    rng=st.randoms(use_true_random=False),
)
def test_text_ends_where_the_first_stop_string_begins(bundled, text, stop, rng):
    detokenizer = Detokenizer(bundled, stop=stop)
    shown = stream(detokenizer, pieces_to_ids(bundled, text, rng))
    found = sorted((text.find(s), len(s), s) for s in stop if s in text)
    assert "".join(shown) == (text[: found[0][0]] if found else text)
    assert detokenizer.stopped == bool(found)
    assert detokenizer.stop_string == (found[0][2] if found else None)


@settings(deadline=None)
@given(text=st.text("abc", min_size=1, max_size=20), stop=letters)
def test_nothing_is_held_back_but_what_may_begin_a_stop_string(bundled, text, stop):
    detokenizer = Detokenizer(bundled, stop=[stop])
    shown = ""
    for end in range(1, len(text) + 1):
        if stop in text[:end]:
            break
        shown += detokenizer.push(*bundled.encode(text[end - 1], add_bos=False))
        held = text[len(shown) : end]
        longest = max(n for n in range(len(stop)) if text[:end].endswith(stop[:n]))
        assert held == stop[:longest]


def test_a_stop_string_at_the_first_token_leaves_no_text(bundled):
    [token_id] = bundled.encode("\n", add_bos=False)
    detokenizer = Detokenizer(bundled, stop=["\n"])
    assert detokenizer.push(token_id) == ""
    assert detokenizer.stopped
    assert detokenizer.push(token_id) == ""
    assert detokenizer.finish() == ""


def test_of_two_stop_strings_the_one_that_begins_first_wins(bundled):
    detokenizer = Detokenizer(bundled, stop=["bc", "abcd"])
    shown = [detokenizer.push(*bundled.encode(x, add_bos=False)) for x in "xabcd"]
    assert shown == ["x", "", "", "", ""]
    assert detokenizer.stop_string == "abcd"


def test_a_stop_string_that_a_longer_one_hid_is_found_at_the_end(bundled):
    detokenizer = Detokenizer(bundled, stop=["bc", "abcd"])
    shown = [detokenizer.push(*bundled.encode(x, add_bos=False)) for x in "abc"]
    assert (shown, detokenizer.stopped) == (["", "", ""], False)
    assert detokenizer.finish() == "a"
    assert detokenizer.stop_string == "bc"


def test_a_stop_string_may_be_a_character_split_over_tokens(tokenizer):
    ids = tokenizer.encode(f"dog{ROCKET}dog", add_bos=False)
    detokenizer = Detokenizer(tokenizer, stop=[ROCKET])
    assert "".join(stream(detokenizer, ids)) == "dog"


@pytest.mark.parametrize("stop", [[""], ["a", ""], "abc", [b"a"]])
def test_a_stop_that_is_no_list_of_strings_with_letters_is_refused(bundled, stop):
    with pytest.raises(ValueError, match="stop: wanted a list of non-empty strings"):
        Detokenizer(bundled, stop=stop)
