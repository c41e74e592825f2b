"""A JSON file that somebody else wrote: read whole, or refused in one line."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.strict_json import MAX_JSON_BYTES, check_number, read_json, show

OBJECT = {"a": [1, 2.5, None, True], "é": {"a": "b\n"}, "big": 2**63}


def write(folder, data):
    path = folder / "config.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def refusal(path):
    with pytest.raises(ValueError) as raised:
        read_json(path)
    # A subclass, such as JSONDecodeError, would not have our message.
    assert type(raised.value) is ValueError
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_an_object_is_read_as_it_was_written(tmp_path):
    assert read_json(write(tmp_path, json.dumps(OBJECT))) == OBJECT
    assert read_json(write(tmp_path, json.dumps(OBJECT, ensure_ascii=False))) == OBJECT


def test_no_prefix_of_a_file_is_taken_for_the_file(tmp_path):
    data = json.dumps(OBJECT, ensure_ascii=False).encode()
    for size in range(len(data)):
        refusal(write(tmp_path, data[:size]))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("", "not JSON"),
        ("hidden_size: 64", "line 1 column 1"),
        ('{"a": 1} {}', "column 10"),
        ("\ufeff{}", "BOM"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 at byte 0"),
        ('{"a": NaN}', "'NaN' is not a finite number"),
        ('{"a": [-Infinity]}', "'-Infinity' is not a finite number"),
        ('{"a": 1e999}', "'1e999' is not a finite number"),
        ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' appears twice"),
        ('{"x": {"a": 1, "a": 2}}', "'a' appears twice"),
        ("[1]", "wanted a JSON object, got [1]"),
        ("null", "wanted a JSON object, got None"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("[" * 200_000, "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_file_that_is_no_strict_object_is_refused_and_told_why(tmp_path, data, named):
    assert named in refusal(write(tmp_path, data))


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "config.json")
    assert "no such file" in refusal(write(tmp_path, "{}") / "config.json")


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    assert "not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_a_file_of_16_mib_is_read_and_a_larger_one_refused(tmp_path):
    path = write(tmp_path, "{}" + " " * (MAX_JSON_BYTES - 2))
    assert read_json(path) == {}
    path.write_bytes(path.read_bytes() + b" ")
    assert "larger than 16,777,216 bytes" in refusal(path)


@given(st.floats() | st.integers() | st.booleans() | st.text() | st.none())
def test_a_checked_number_is_a_float_of_its_range(value):
    try:
        number = check_number(value, low=-1.0, high=1e6, field="f", where="w")
    except ValueError:
        assert isinstance(value, bool | str | None) or not -1.0 <= value <= 1e6
    else:
        assert type(number) is float
        assert number == value
        assert -1.0 <= number <= 1e6
        assert not isinstance(value, bool)


@pytest.mark.parametrize(
    "value",
    ["x\n" * 1000, "\ud800", [list(range(1000))] * 1000, {"a" * 9999: {}}, 10**5000],
    ids=["long", "surrogate", "list", "dict", "huge"],
)
def test_any_value_is_shown_as_a_short_piece_of_one_line(value):
    text = show(value)
    assert len(text) < 300
    assert "\n" not in text
    text.encode()
