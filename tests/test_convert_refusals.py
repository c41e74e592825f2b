"""Sources and targets that conversion refuses, before it writes a byte."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from m2jax.convert import convert, run
from m2jax.store import open_store
from tests.small_checkpoints import (
    digests,
    join_safetensors,
    small_checkpoint,
    split_safetensors,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def source(tmp_path):
    return small_checkpoint(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path):
    return small_checkpoint(tmp_path / "source", shards=3)


def refused(source, tmp_path, *patterns, error=ValueError):
    """Converts, and checks that one line says why not and nothing was written."""
    target = tmp_path / "store"
    with pytest.raises(error) as caught:
        convert(source, target)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for pattern in patterns:
        assert pattern in message
    assert not target.exists()


def edit_header(path, change):
    header, body = split_safetensors(path)
    change(header)
    join_safetensors(path, header, body)


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_missing_source_is_refused(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "nowhere", "no such folder")


def test_a_file_is_no_source(source, tmp_path):
    refused(source / WEIGHTS, tmp_path, WEIGHTS, "a file", "want the folder")


def test_a_folder_without_a_config_is_no_source(source, tmp_path):
    (source / "config.json").unlink()
    refused(source, tmp_path, "no config.json")


@pytest.mark.parametrize(
    ("name", "says"),
    [("model.gguf", "GGUF files are not read"), ("adapter_config.json", "merge it")],
)
def test_what_else_a_folder_holds_is_named(tmp_path, name, says):
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_text("{}")
    refused(source, tmp_path, "no config.json", says)


def test_a_store_is_no_source(source, tmp_path):
    store = convert(source, tmp_path / "first")
    refused(store, tmp_path, "is an m2jax store already")


@pytest.mark.parametrize("text", ["", "{", '{"model_type": NaN}', "[]"])
def test_a_broken_config_is_refused(source, tmp_path, text):
    (source / "config.json").write_text(text)
    refused(source, tmp_path, "config.json")


def test_a_model_we_do_not_compute_is_refused(source, tmp_path):
    edit_json(source / "config.json", lambda raw: raw.update(model_type="mamba"))
    refused(source, tmp_path, "mamba", "llama", error=NotImplementedError)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_cut_file_is_refused(source, tmp_path, size):
    path = source / WEIGHTS
    os.truncate(path, path.stat().st_size - 1 if size == -1 else size)
    refused(source, tmp_path, WEIGHTS, "download it again")


def test_a_pointer_of_git_lfs_is_named(source, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    (source / WEIGHTS).write_text(pointer)
    refused(source, tmp_path, WEIGHTS, "a Git LFS pointer", "git lfs pull")


def test_a_header_longer_than_any_real_one_is_refused_unread(source, tmp_path):
    path = source / WEIGHTS
    with open(path, "r+b") as file:
        file.write((150_000_000).to_bytes(8, "little"))
    os.truncate(path, 200_000_000)
    refused(source, tmp_path, WEIGHTS, "header of 150,000,000 bytes")


def shift(amount):
    def change(header):
        start, end = header[GATE]["data_offsets"]
        header[GATE]["data_offsets"] = [start + amount, end + amount]

    return change


@pytest.mark.parametrize(
    "change",
    [
        shift(-2),
        shift(2),
        shift(10**9),
        lambda header: header[GATE].update(dtype="F32"),
        lambda header: header.pop(GATE),
        lambda header: header[GATE].update(shape=[2**62, 2**62]),
        lambda header: header[GATE].update(shape=[-1, 64]),
        lambda header: header[GATE].pop("data_offsets"),
        lambda header: header.update({GATE: 7}),
    ],
    ids=[
        *("overlap", "shifted", "beyond", "size", "hole", "overflow", "negative"),
        *("no offsets", "no object"),
    ],
)
def test_offsets_that_overlap_leave_holes_or_lie_are_refused(source, tmp_path, change):
    edit_header(source / WEIGHTS, change)
    refused(source, tmp_path, WEIGHTS, "bad safetensors header")


@pytest.mark.parametrize("text", ["not json", "[1]", "{", '{"a": NaN}', "{}x"])
def test_a_header_that_is_no_json_object_is_refused(source, tmp_path, text):
    join_safetensors(source / WEIGHTS, text, b"")
    refused(source, tmp_path, WEIGHTS, "bad safetensors header")


def test_a_name_given_twice_in_a_header_is_refused(source, tmp_path):
    header, body = split_safetensors(source / WEIGHTS)
    text = json.dumps(header)
    twice = text[:-1] + f', "{GATE}": ' + json.dumps(header[GATE]) + "}"
    join_safetensors(source / WEIGHTS, twice, body)
    refused(source, tmp_path, WEIGHTS, GATE, "twice")


def test_a_name_in_two_shards_is_refused(sharded, tmp_path):
    third = sharded / "model-00003-of-00003.safetensors"
    name = next(iter(json.loads((sharded / INDEX).read_text())["weight_map"]))
    header, body = split_safetensors(third)
    end = len(body)
    header[name] = {"dtype": "F16", "shape": [1], "data_offsets": [end, end + 2]}
    join_safetensors(third, header, body + bytes(2))
    refused(sharded, tmp_path, name, third.name, "both")


def test_a_missing_shard_is_named(sharded, tmp_path):
    (sharded / SHARD).unlink()
    refused(sharded, tmp_path, SHARD, "1 of 3", "download")


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded, tmp_path):
    path = sharded / INDEX
    edit_json(path, lambda raw: raw["weight_map"].update({"ghost.weight": SHARD}))
    refused(sharded, tmp_path, "ghost.weight", SHARD)


@pytest.mark.parametrize(
    "name", ["../" + SHARD, "/etc/passwd", "", "..", "a/b", 7, None]
)
def test_the_index_names_only_files_beside_it(sharded, tmp_path, name):
    path = sharded / INDEX
    edit_json(path, lambda raw: raw["weight_map"].update({GATE: name}))
    refused(sharded, tmp_path, INDEX, GATE)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(sharded, tmp_path, weight_map):
    path = sharded / INDEX
    edit_json(path, lambda raw: raw.update(weight_map=weight_map))
    refused(sharded, tmp_path, INDEX, "weight_map")


def test_a_missing_tensor_is_named(source, tmp_path):
    def rename(header):
        header["another.weight"] = header.pop("lm_head.weight")

    edit_header(source / WEIGHTS, rename)
    refused(source, tmp_path, "lm_head.weight is missing", "config.json")


def test_a_wrong_shape_is_named(source, tmp_path):
    edit_header(source / WEIGHTS, lambda h: h[GATE]["shape"].reverse())
    refused(source, tmp_path, WEIGHTS, GATE, "[300, 64]", "[64, 300]")


@pytest.mark.parametrize("dtype", ["I16", "U16"])
def test_a_dtype_we_do_not_read_is_named(source, tmp_path, dtype):
    edit_header(source / WEIGHTS, lambda h: h[GATE].update(dtype=dtype))
    refused(source, tmp_path, WEIGHTS, GATE, dtype, "F16, BF16, F32")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_a_pickle_is_refused_and_never_opened(source, tmp_path, name):
    (source / WEIGHTS).unlink()
    mark = tmp_path / "mark"
    (source / name).write_bytes(pickle.dumps(Payload(mark)))
    refused(source, tmp_path, name, "safetensors")
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_left_alone(source, tmp_path):
    mark = tmp_path / "mark"
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    open_store(convert(source, tmp_path / "store"))
    assert not mark.exists()


def test_a_source_without_weights_is_refused(source, tmp_path):
    (source / WEIGHTS).unlink()
    refused(source, tmp_path, WEIGHTS, INDEX)


@pytest.mark.parametrize("option", [{"group_size": 48}, {"dtype": "int8"}])
def test_an_option_out_of_range_is_refused(source, tmp_path, option):
    with pytest.raises(ValueError, match="want"):
        convert(source, tmp_path / "store", **option)
    assert not (tmp_path / "store").exists()


def test_the_source_folder_is_no_target(source):
    before = digests(source)
    for target in (source, source / ".." / "source", source.parent):
        with pytest.raises(ValueError, match="holds the source"):
            convert(source, target, overwrite=True)
    assert digests(source) == before


def test_a_target_within_the_source_works(source):
    store = convert(source, source / "store")
    assert open_store(store).config.num_layers == 2


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_no_target(source, tmp_path, name, overwrite):
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="a folder with other files"):
        convert(source, target, overwrite=overwrite)
    assert list(digests(target)) == [name]


def test_a_file_is_no_target(source, tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    with pytest.raises(ValueError, match="a file, no store"):
        convert(source, target, overwrite=True)
    assert target.read_text() == "mine"
    with pytest.raises(OSError, match="target"):
        convert(source, target / "store")


def test_an_empty_folder_is_a_target(source, tmp_path):
    (tmp_path / "target").mkdir()
    open_store(convert(source, tmp_path / "target"))


def test_a_target_with_a_link_that_leads_out_is_refused(source, tmp_path):
    store = convert(source, tmp_path / "store")
    outside = tmp_path / "outside"
    shutil.move(store / "neurons", outside)
    (store / "neurons").symlink_to(outside)
    before = digests(outside)
    with pytest.raises(ValueError, match="neurons: a link that leads out"):
        convert(source, store, overwrite=True)
    assert digests(outside) == before


def test_a_disk_that_takes_no_files_is_named(monkeypatch, source):
    if not Path("/proc").is_dir():
        pytest.skip("there is no /proc")
    monkeypatch.setattr(run, "check_space", lambda *_, **__: None)
    with pytest.raises(OSError, match="/proc/m2jax-store"):
        convert(source, "/proc/m2jax-store")
