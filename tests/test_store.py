"""Reading a store: what the runtime is given."""

import logging
import shutil
import sys
import threading

import numpy as np
import pytest
import tensorstore as ts

from m2jax import layout as layout_module
from m2jax.errors import StoreError
from m2jax.params import dense_banks
from m2jax.store import TensorStoreChunks, open_store, store_info, verify_store
from m2jax.store.dense import _hush
from m2jax.store.manifest import bytes_to_manifest, manifest_to_bytes
from m2jax.store.paths import array_metadata
from tests.small_checkpoints import SMALL_CHUNK_TARGET_BYTES, digests, small_store


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "CHUNK_TARGET_BYTES", SMALL_CHUNK_TARGET_BYTES)
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("made") / "store")


def buffer(store, plane):
    layout = store.layout
    shape = (layout.padded_neurons, layout.record_bytes(plane))
    return np.full(shape, 0xA5, np.uint8)


def test_a_read_gives_the_bytes_of_the_chunk_files_in_order(path):
    store = open_store(path)
    assert store.layout.num_chunks == 3
    chunks = TensorStoreChunks(store)
    for layer in range(2):
        for plane in ("q4", "r4", "w16"):
            out = buffer(store, plane)
            chunks.read(layer, plane, out)
            files = [
                path / "neurons" / f"{layer:02}" / plane / "c" / str(chunk) / "0"
                for chunk in range(3)
            ]
            assert out.tobytes() == b"".join(file.read_bytes() for file in files)


def test_many_threads_may_read_at_once(path):
    store = open_store(path)
    chunks, alone = TensorStoreChunks(store), TensorStoreChunks(store, verify=False)
    jobs = [(layer, plane) for layer in range(2) for plane in store.planes] * 8
    outs = [buffer(store, plane) for _, plane in jobs]
    threads = [
        threading.Thread(target=chunks.read, args=(*job, out))
        for job, out in zip(jobs, outs, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (layer, plane), out in zip(jobs, outs, strict=True):
        wanted = buffer(store, plane)
        alone.read(layer, plane, wanted)
        assert (out == wanted).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out[1:],
        lambda out: out.view(np.int8),
        lambda out: np.asfortranarray(out),
        lambda out: out.reshape(-1),
        lambda out: np.frombuffer(out.tobytes(), np.uint8).reshape(out.shape),
    ],
    ids=["rows", "dtype", "order", "flat", "read-only"],
)
def test_a_buffer_of_another_form_is_refused_and_left_alone(path, spoil):
    store = open_store(path)
    out = spoil(buffer(store, "q4"))
    before = out.copy()
    with pytest.raises(ValueError, match=r"out: want writeable C-contiguous uint8"):
        TensorStoreChunks(store).read(0, "q4", out)
    assert (out == before).all()


def test_an_array_is_what_tensorstore_would_have_made_itself(path, tmp_path):
    store = open_store(path)
    for plane in store.planes:
        metadata = array_metadata(store.layout, plane)
        kvstore = {"driver": "file", "path": str(tmp_path / plane)}
        spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
        theirs = ts.open(spec, create=True).result()
        ours = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path / f"neurons/01/{plane}")},
        }
        opened = ts.open(ours, open=True).result()
        assert opened.schema == theirs.schema
        data = opened.read().result()
        theirs.write(data).result()
        made = digests(tmp_path / plane)
        made.pop("zarr.json")
        stored = digests(path / "neurons" / "01" / plane)
        stored.pop("zarr.json")
        assert made == stored


def test_every_bank_has_the_arrays_that_params_names(path):
    store = open_store(path)
    for bank, shapes in dense_banks(store.config, store.layout).items():
        arrays = store.dense(bank)
        assert {name: array.shape for name, array in arrays.items()} == shapes
        assert all(type(array) is np.ndarray for array in arrays.values())


def test_a_copied_or_moved_store_is_as_good(path, tmp_path):
    copy = tmp_path / "a copy \N{SNOWMAN}"
    shutil.copytree(path, copy, copy_function=shutil.copyfile)
    verify_store(copy)
    moved = copy.rename(tmp_path / "moved")
    store = verify_store(moved)
    wanted = open_store(path).dense("layers/01")
    found = store.dense("layers/01")
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_a_link_to_a_store_is_a_store(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    verify_store(link)


def test_a_manifest_survives_writing_and_reading(path):
    data = (path / "manifest.json").read_bytes()
    assert manifest_to_bytes(bytes_to_manifest(data)) == data


def test_reading_writes_nothing_into_the_store(path):
    before = digests(path)
    store = verify_store(path)
    store.dense("head")
    store_info(path)
    TensorStoreChunks(store).read(1, "w16", buffer(store, "w16"))
    assert digests(path) == before


def test_verify_reports_every_file_once(path):
    seen = []
    store = verify_store(path, lambda *step: seen.append(step))
    assert sorted(step[2] for step in seen) == sorted(store.files)
    total = sum(entry.bytes for entry in store.files.values())
    assert seen[-1][:2] == (total, total)


def test_info_adds_up(path):
    info = store_info(path)
    planes = sum(plane["bytes"] for plane in info["planes"].values())
    on_disk = sum(
        file.stat().st_size
        for file in path.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    )
    assert info["bytes"] == on_disk
    small = sum(
        (path / "neurons" / layer / plane / "zarr.json").stat().st_size
        for layer in ("00", "01")
        for plane in info["planes"]
    ) + sum(file.stat().st_size for file in (path / "tokenizer").iterdir())
    assert planes + info["dense"]["bytes"] + small == on_disk
    assert info["model"]["num_layers"] == 2
    assert "tokenizer.json" in info["tokenizer"]


def test_a_checkpoint_without_a_tokenizer_has_no_tokenizer_folder(tmp_path):
    from m2jax.convert import convert
    from tests.small_checkpoints import make_checkpoint, make_config

    source = make_checkpoint(tmp_path / "source", make_config(layers=1))
    store = open_store(convert(source, tmp_path / "store"))
    assert store.tokenizer_folder() is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text("x"), "a file; want a store"),
        (lambda path: path.mkdir(), "no store: it has no manifest.json"),
    ],
)
def test_what_is_no_store_is_refused_in_one_line(tmp_path, make, words):
    path = tmp_path / "thing"
    make(path)
    for command in (open_store, verify_store, store_info):
        with pytest.raises(ValueError, match=words):
            command(path)


def test_a_checkpoint_given_as_a_store_is_told_to_be_converted(path):
    source = path.with_name("store-source")
    with pytest.raises(ValueError, match=r"no store; run m2jax convert .*source STORE"):
        open_store(source)


def test_a_store_without_its_manifest_is_no_store(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"manifest.json is missing"):
        open_store(copy)


def test_orbax_stays_silent_until_the_last_of_several_threads_is_through():
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    level = log.level
    with _hush:
        with _hush:
            pass
        assert log.level > logging.CRITICAL
        assert sys.unraisablehook is not hook
    assert log.level == level
    assert sys.unraisablehook is hook
