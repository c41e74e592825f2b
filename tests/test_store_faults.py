"""Stores that are damaged: every byte that is not the manifest's is found and named."""

import json
import os
import resource
import shutil

import pytest

from m2jax import layout as layout_module
from m2jax.aligned import aligned_buffer
from m2jax.errors import StoreError, TierFailed, is_memory_error
from m2jax.store import (
    DirectChunks,
    TensorStoreChunks,
    open_store,
    store_info,
    verify_store,
)
from tests.small_checkpoints import SMALL_CHUNK_TARGET_BYTES, signed, small_store

PLANES = ("q4", "r4", "w16")


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "CHUNK_TARGET_BYTES", SMALL_CHUNK_TARGET_BYTES)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "store")


def read(chunks, store, layer, plane):
    layout = store.layout
    shape = (layout.padded_neurons, layout.record_bytes(plane))
    out = aligned_buffer(shape)
    out.fill(0xA5)
    chunks.read(layer, plane, out)
    return out


@pytest.fixture(params=[TensorStoreChunks, DirectChunks])
def reads(request):
    """Both ways to read."""
    return request.param


def flip(file, *, bit=0, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def found_by(command, *words, error=StoreError, code=4):
    """One line, of the right kind, that holds all the words."""
    with pytest.raises(error) as caught:
        command()
    message = str(caught.value)
    assert caught.value.exit_code == code
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("keep", ["all but one byte", "half", "nothing", "one more"])
def test_a_chunk_of_another_size_is_named_with_both_sizes(path, plane, keep, reads):
    store = open_store(path)
    chunks = reads(store)
    read(chunks, store, 1, plane)
    file = f"neurons/01/{plane}/c/1/0"
    size = (path / file).stat().st_size
    left = {"all but one byte": size - 1, "half": size // 2, "nothing": 0}
    os.truncate(path / file, left.get(keep, size + 1))
    sizes = (f"{left.get(keep, size + 1):,} bytes", f"manifest says {size:,}")
    found_by(lambda: open_store(path), file, *sizes)
    found_by(lambda: verify_store(path), file, *sizes)
    found_by(
        lambda: read(chunks, store, 1, plane),
        *(file, *sizes, "layer 1", f"plane {plane}", "chunk 1"),
    )
    read(chunks, store, 0, plane)


@pytest.mark.parametrize("plane", PLANES)
def test_a_missing_chunk_is_named_and_never_reads_as_zeros(path, plane, reads):
    store = open_store(path)
    chunks = reads(store, verify=False)
    read(chunks, store, 0, plane)
    file = f"neurons/00/{plane}/c/2/0"
    (path / file).unlink()
    found_by(lambda: open_store(path), f"{file}: missing")
    found_by(lambda: verify_store(path), f"{file}: missing")
    found_by(
        lambda: read(chunks, store, 0, plane),
        *(f"{file}: missing", "layer 0", f"plane {plane}", "chunk 2"),
    )


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_flipped_bit_in_a_chunk_is_found_at_its_first_read(path, plane, chunk, reads):
    file = f"neurons/01/{plane}/c/{chunk}/0"
    flip(path / file, bit=3, at=17)
    store = open_store(path)
    chunks = reads(store)
    for _ in range(2):
        found_by(
            lambda: read(chunks, store, 1, plane),
            *(file, "layer 1", f"plane {plane}", f"chunk {chunk}", "sha256"),
        )
    read(chunks, store, 0, plane)
    found_by(lambda: verify_store(path), file, "sha256")


def test_only_who_asks_reads_unchecked(path, reads):
    flip(path / "neurons/01/q4/c/0/0", at=5)
    store = open_store(path)
    out = read(reads(store, verify=False), store, 1, "q4")
    assert out[:128].tobytes() == (path / "neurons/01/q4/c/0/0").read_bytes()


@pytest.mark.parametrize(
    ("bank", "file"),
    [
        ("embed", "state/embedding/c/0/0"),
        ("layers/01", "state/qkv/c/0/0"),
        ("layers/01", "state/scales/c/0/0/0"),
        ("layers/00", "state/scales/zarr.json"),
        ("layers/00", "state/_METADATA"),
        ("head", "_CHECKPOINT_METADATA"),
        ("head", "commit_success.txt"),
    ],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_bank_gives_no_arrays(path, bank, file, damage):
    store = open_store(path)
    name = f"dense/{bank}/{file}"
    if damage == "flip":
        flip(path / name, at=30)
    elif damage == "cut":
        os.truncate(path / name, (path / name).stat().st_size - 1)
    else:
        (path / name).unlink()
    found_by(lambda: store.dense(bank), name)
    found_by(lambda: verify_store(path), name)
    if damage != "flip":
        found_by(lambda: open_store(path), name)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_damaged_tokenizer_is_not_handed_on(path, name):
    store = open_store(path)
    flip(path / "tokenizer" / name)
    found_by(store.tokenizer_folder, f"tokenizer/{name}", "sha256")


def test_a_changed_array_description_is_found_before_it_is_used(path):
    file = path / "neurons/00/q4/zarr.json"
    file.write_bytes(file.read_bytes().replace(b"[384,96]", b"[384,69]"))
    store = open_store(path)
    found_by(lambda: read(TensorStoreChunks(store), store, 1, "w16"), "00/q4/zarr.json")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("neurons/00/q4/c/0/0", "neurons/01/q4/c/0/0"),
        ("neurons/01/q4/c/1/0", "neurons/01/r4/c/1/0"),
        ("neurons/01/w16/c/0/0", "neurons/01/w16/c/1/0"),
        ("dense/layers/00/state/o/c/0/0", "dense/layers/01/state/o/c/0/0"),
    ],
)
def test_swapped_files_of_one_size_are_both_found(path, one, other, reads):
    (path / one).rename(path / "aside")
    (path / other).rename(path / one)
    (path / "aside").rename(path / other)
    store = open_store(path)
    found_by(lambda: verify_store(path), min(one, other), "2 bad files in all")
    for file in (one, other):
        kind, layer, plane = file.split("/")[:3]
        if kind == "neurons":
            chunks = reads(store)
            found_by(
                lambda c=chunks, at=int(layer), p=plane: read(c, store, at, p), "sha256"
            )
        else:
            found_by(lambda p=plane: store.dense(f"layers/{p}"), file)


def test_verify_counts_all_bad_files_and_names_the_first(path):
    for file in ("neurons/01/q4/c/0/0", "dense/embed/state/_METADATA"):
        flip(path / file)
    (path / "tokenizer/tokenizer.json").unlink()
    found_by(lambda: verify_store(path), "dense/embed/state/_METADATA", "3 bad files")


def test_a_link_that_leads_out_of_the_store_is_refused(path, tmp_path):
    outside = tmp_path / "outside"
    (path / "neurons/00/q4/c/0/0").rename(outside)
    (path / "neurons/00/q4/c/0/0").symlink_to(outside)
    for command in (open_store, verify_store, store_info):
        found_by(lambda c=command: c(path), "neurons/00/q4/c/0/0", str(outside), "link")


def test_a_link_within_the_store_is_a_file_like_any(path):
    (path / "neurons/00/q4/c/0/0").rename(path / "elsewhere")
    (path / "neurons/00/q4/c/0/0").symlink_to(path / "elsewhere")
    verify_store(path)


def test_a_failing_machine_is_not_called_a_damaged_store(path, reads):
    store = open_store(path)
    chunks = reads(store)
    read(chunks, store, 0, "q4")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        with pytest.raises(TierFailed) as caught:
            read(chunks, store, 0, "q4")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.exit_code == 5
    assert "neurons/00/q4: could not be read: Too many open files" in str(caught.value)
    read(chunks, store, 0, "q4")


def test_an_unreadable_file_is_not_called_a_damaged_store(path):
    (path / "neurons/00/q4/c/0/0").unlink()
    (path / "neurons/00/q4/c/0/0").symlink_to("0")
    for command in (open_store, verify_store):
        found_by(lambda c=command: c(path), "Too many levels", error=TierFailed, code=5)


def test_a_group_the_scales_do_not_have_is_found_when_they_are_read(path):
    raw = json.loads((path / "manifest.json").read_bytes())
    raw["quantiser"]["group"] = 16
    (path / "manifest.json").write_bytes(signed(raw))
    store = open_store(path)
    found_by(lambda: store.dense("layers/00"), "dense/layers/00: want arrays", "scales")


def test_a_thread_that_finds_no_memory_is_no_damage_of_the_store(path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    def no_thread(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ocp, "load", no_thread)
    with pytest.raises(RuntimeError, match="start new thread") as caught:
        open_store(path).dense("embed")
    assert is_memory_error(caught.value)
