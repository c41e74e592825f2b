"""The store's calibration part: read whole or refused, and replaced at once."""

import json
import random
import shutil

import pytest

from m2jax.convert import convert
from m2jax.errors import StoreError
from m2jax.store import open_store, store_info, verify_store
from m2jax.store.calibration import (
    read_json_part,
    read_part,
    write_json_part,
    write_part,
)
from m2jax.store.calibration_index import PARTS
from tests.calibration_parts import FILES, some_files
from tests.small_checkpoints import digests, signed, small_store, tree

AGAIN = "run m2jax calibrate again"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("made") / "store", layers=1)


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "store")


@pytest.fixture
def filled(path):
    """Its store has parts `order` and `mix`."""
    write_part(open_store(path), "order", some_files(0))
    write_json_part(open_store(path), "mix", {"mix": "0/25/75", "kl": 0.125})
    return path


def refused(path, *words, parts=("order",)):
    """Reading and verifying both say so in one line, as damage of the store."""
    commands = [lambda p=part: read_part(open_store(path), p) for part in parts]
    for command in (*commands, lambda: verify_store(path)):
        with pytest.raises(StoreError) as caught:
            command()
        message = str(caught.value)
        assert caught.value.exit_code == 4
        assert len(message.splitlines()) == 1
        assert "convert again" not in message
        for word in (*words, AGAIN):
            assert word in message, message


def index_of(path):
    return path / "calibration" / "index.json"


def test_a_part_is_read_as_it_was_written(path):
    store, before = open_store(path), digests(path)
    assert all(read_part(store, part) is None for part in PARTS)
    write_part(store, "order", some_files(1))
    folder = read_part(store, "order")
    assert folder is not None
    for name, size in FILES.items():
        assert (folder / name).read_bytes() == random.Random(1).randbytes(size)
    write_json_part(store, "mix", facts := {"mix": "0/25/75", "kl": [1e-9, None, {}]})
    assert read_json_part(store, "mix") == facts
    assert read_part(store, "order") == folder
    # What was converted is as it was.
    after = digests(path)
    assert before.items() <= after.items()
    verify_store(path)


def test_a_replaced_part_leaves_nothing_of_the_old_one(filled):
    store, mine = open_store(filled), filled / "calibration" / "mine"
    mine.mkdir()
    (filled / "calibration" / ".trace.half-written").mkdir()
    old, mix = read_part(store, "order"), read_part(store, "mix")
    write_part(store, "order", some_files(2))
    new = read_part(store, "order")
    assert {*(filled / "calibration").iterdir()} == {
        *(index_of(filled), filled / "calibration" / ".lock", mine, new, mix)
    }
    assert new != old


def test_a_copied_store_keeps_its_calibration(filled, tmp_path):
    copy = shutil.copytree(filled, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(filled)
    verify_store(copy)
    assert read_json_part(open_store(copy), "mix") == {"mix": "0/25/75", "kl": 0.125}


@pytest.mark.parametrize("name", ["a.bin", "deep/under/b.bin"])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "cut", "more", "gone"])
def test_a_damaged_file_of_a_part_is_named(filled, name, damage):
    folder = read_part(open_store(filled), "order")
    assert folder is not None
    data = bytearray((folder / name).read_bytes())
    if damage == "gone":
        (folder / name).unlink()
    elif damage in ("cut", "more"):
        (folder / name).write_bytes(data[:-1] if damage == "cut" else data + b"\0")
    else:
        data[{"first": 0, "middle": len(data) // 2, "last": -1}[damage]] ^= 4
        (folder / name).write_bytes(data)
    why = {"cut": "the index says", "more": "the index says", "gone": "missing"}
    refused(filled, f"{folder.name}/{name}: ", why.get(damage, "sha256"))
    # The other part is none the worse, and writing the part again heals it.
    assert read_json_part(open_store(filled), "mix") is not None
    write_part(open_store(filled), "order", some_files(0))
    verify_store(filled)


def test_every_prefix_of_an_index_is_refused(filled):
    data, store = index_of(filled).read_bytes(), open_store(filled)
    for length in range(len(data)):
        index_of(filled).write_bytes(data[:length])
        with pytest.raises(StoreError, match=AGAIN):
            read_part(store, "order")


def test_a_flipped_bit_in_any_byte_of_an_index_is_found(filled):
    data, store = index_of(filled).read_bytes(), open_store(filled)
    for at in range(len(data)):
        spoiled = bytearray(data)
        spoiled[at] ^= 1 << at % 8
        index_of(filled).write_bytes(spoiled)
        with pytest.raises(StoreError, match=AGAIN):
            read_part(store, "order")


GOOD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"version": 2}, "version: this m2jax reads 1, got 2"),
        ({"version": True}, "version"),
        ({"format": "m2jax-store"}, "format"),
        ({"extra": 1}, "want the fields"),
        ({"parts": []}, "parts"),
        ({"model": None}, "model"),
        ({"parts": {"notes": {"x": GOOD}}}, "'notes' is no part"),
        ({"parts": {"order": {}}}, "'order' is no part"),
        ({"parts": {"order": {"../x": GOOD}}}, "'../x' is no name"),
        ({"parts": {"order": {"deep/../../x": GOOD}}}, "is no name"),
        ({"parts": {"order": {"/etc/passwd": GOOD}}}, "is no name"),
        ({"parts": {"order": {".hidden": GOOD}}}, "is no name"),
        ({"parts": {"order": {"": GOOD}}}, "is no name"),
        ({"parts": {"order": {"x": {**GOOD, "bytes": -1}}}}, "want a size"),
        ({"parts": {"order": {"x": {**GOOD, "bytes": True}}}}, "want a size"),
        ({"parts": {"order": {"x": {**GOOD, "sha256": "0"}}}}, "64 hex digits"),
        ({"parts": {"order": {"x": {"bytes": 1}}}}, "field 'sha256' is missing"),
        ({"parts": {"order": {"x": GOOD}}}, "/x: missing"),
    ],
)
def test_an_index_that_m2jax_would_not_write_is_refused(filled, edit, words):
    raw = json.loads(index_of(filled).read_bytes())
    index_of(filled).write_bytes(signed({**raw, **edit}))
    refused(filled, words)


def test_an_index_spelled_another_way_is_refused(filled):
    raw = json.loads(index_of(filled).read_bytes())
    index_of(filled).write_text(json.dumps(raw))
    refused(filled, "index.json: sha256")


def test_the_calibration_of_another_model_is_refused_and_replaced(filled, tmp_path):
    source = filled.with_name("other-source")
    other = small_store(source.with_name("other"), layers=1, seed=1)
    shutil.copytree(filled / "calibration", other / "calibration")
    refused(other, "calibration belongs to another model", parts=("order", "trace"))
    write_json_part(open_store(other), "mix", {"mix": "100/0/0"})
    assert read_part(open_store(other), "order") is None
    assert len(list((other / "calibration").iterdir())) == 3
    verify_store(other)


def test_parts_without_an_index_are_damage_and_replaced(m2jax_command, filled):
    index_of(filled).unlink()
    refused(filled, "index.json: missing", parts=("order", "mix", "trace"))
    with pytest.raises(StoreError, match=AGAIN):
        store_info(filled)
    assert m2jax_command("plan", filled).code == 4
    write_json_part(open_store(filled), "mix", {"mix": "100/0/0"})
    verify_store(filled)
    assert len(list((filled / "calibration").iterdir())) == 3


def test_what_a_killed_first_writer_left_is_no_damage(path):
    (path / "calibration" / ".mix.half-written").mkdir(parents=True)
    (path / "calibration" / ".lock").touch()
    verify_store(path)
    assert read_part(open_store(path), "mix") is None


def test_advice_names_the_command_that_makes_the_part(filled):
    def spoil(part):
        folder = read_part(open_store(filled), part)
        for file in folder.rglob("*"):
            if file.is_file():
                file.write_bytes(b"spoiled")

    store = open_store(filled)
    spoil("mix")
    for use in (lambda: read_json_part(store, "mix"), lambda: verify_store(filled)):
        with pytest.raises(StoreError, match=r"or run m2jax search-mix again$"):
            use()
    spoil("order")
    both = r"bad files in all; .* m2jax calibrate and m2jax search-mix again$"
    with pytest.raises(StoreError, match=both):
        verify_store(filled)


def test_facts_that_are_no_json_and_parts_there_are_not_are_refused(path):
    store, before = open_store(path), tree(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_part(store, "mix", {"kl": float("nan")})
    for use in (read_part, lambda s, p: write_json_part(s, p, {})):
        with pytest.raises(ValueError, match="part 'notes': want one of mix, order"):
            use(store, "notes")
    assert tree(path) == before


def test_a_part_that_holds_no_facts_is_not_read_as_facts(filled):
    for data in (None, b"[]", b'{"a": NaN}'):
        if data is not None:
            write_part(
                open_store(filled),
                "order",
                lambda folder, d=data: (folder / "facts.json").write_bytes(d),
            )
        with pytest.raises(StoreError, match=rf"facts.json: .*{AGAIN}"):
            read_json_part(open_store(filled), "order")


def test_info_and_verify_count_the_calibration(m2jax_command, filled):
    facts = store_info(filled)
    mix = len(b'{"kl":0.125,"mix":"0/25/75"}\n')
    assert facts["calibration"] == {"mix": mix, "order": sum(FILES.values())}
    assert "mix 29 B, order 3.00 KiB" in m2jax_command("info", filled).out
    checked = m2jax_command("verify", filled, "--json").facts
    assert checked["files"] == facts["files"] + 1 + len(FILES)
    assert checked["bytes"] == facts["bytes"] + mix + sum(FILES.values())
    seen = []
    verify_store(filled, lambda *step: seen.append(step))
    assert seen[-1][:2] == (checked["bytes"], checked["bytes"])


def test_damage_of_both_kinds_means_converting_again(filled):
    index_of(filled).write_bytes(b"{")
    chunk = filled / "neurons" / "00" / "q4" / "c" / "0" / "0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(StoreError, match=r"q4/c/0/0: .*2 bad files.*; convert again$"):
        verify_store(filled)


def test_converting_anew_clears_the_calibration(filled, whole):
    source = whole.with_name("store-source")
    convert(source, filled, group_size=32, overwrite=True)
    assert digests(filled) == digests(whole)
