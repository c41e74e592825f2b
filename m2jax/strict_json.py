"""JSON from a file that nobody vouches for: read strictly, checked value by value.

Knows no model. Every message is one line that starts with the file and the field.
"""

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 16 << 20

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 60


def show(value: object) -> str:
    """A value from a file as a short piece of one line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits.
        return "an integer of thousands of digits"


def check_integer(value: object, *, low: int, high: int, field: str, where: str) -> int:
    """The value, if it is an integer of low to high; a bool is none."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise ValueError(
        f"{where}: {field}: wanted an integer from {low} to {high}, got {show(value)}"
    )


def check_number(
    value: Any, *, low: float, high: float, field: str, where: str
) -> float:
    """The value as a float, if it is a number of low to high; NaN is in no range."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if plain and low <= value <= high:
        return float(value)
    raise ValueError(
        f"{where}: {field}: wanted a number from {low:g} to {high:g}, got {show(value)}"
    )


def check_flag(value: object, *, field: str, where: str) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{where}: {field}: wanted true or false, got {show(value)}")


def read_json(path: str | Path) -> dict[str, Any]:
    """One JSON object from a file, strictly.

    Raises:
        ValueError: the file is missing, no regular file, larger than 16 MiB, not UTF-8,
            not JSON (NaN, Infinity and duplicate keys are not), or not an object.
        OSError: the machine could not read it.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: not a regular file")
    with open(path, "rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path}: larger than {MAX_JSON_BYTES:,} bytes, the most allowed"
        )
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {show(value)}")
    return value


def parse_json(data: bytes) -> Any:
    """The value of UTF-8 JSON.

    Raises:
        ValueError: what is wrong and where, without the file's name: not UTF-8, not
            JSON, a key given twice, NaN, infinity, a number beyond float64, absurd
            nesting.
    """
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_refuse_number,
            parse_float=_finite,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start:,}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not JSON, or cut short, at line {error.lineno} column "
            f"{error.colno} of {len(data):,} bytes: {error.msg}"
        ) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def canonical_json(value: Any) -> bytes:
    """The one spelling of a value: sorted keys, no spaces, ASCII, a final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"key {show(name)} appears twice in one object")
        result[name] = value
    return result


def _refuse_number(text: str) -> float:
    raise ValueError(f"{show(text)} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if value - value == 0 else _refuse_number(text)


def _integer(text: str) -> int:
    # Python refuses to parse more than 4300 digits, with advice that is not for users.
    if len(text) > 100:
        raise ValueError(f"an integer of {len(text):,} digits")
    return int(text)
