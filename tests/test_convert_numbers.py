"""Conversion between dtypes, numbers that cannot be kept, and the memory it takes."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from m2jax.convert import convert
from m2jax.store import open_store
from tests.small_checkpoints import (
    edit_tensor,
    expected_rows,
    join_safetensors,
    make_checkpoint,
    make_config,
    read_plane,
    read_tensors,
    small_checkpoint,
    split_safetensors,
)


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ({"gate_proj.weight": "bfloat16"}, "float32"),
        ({"layers.1.mlp.up_proj.weight": "float32"}, "float32"),
        ({"norm.weight": "float32"}, "float16"),
    ],
)
def test_mixed_dtypes_are_kept_in_the_narrowest_that_holds_all(
    tmp_path, dtypes, wanted
):
    source = make_checkpoint(tmp_path / "source", make_config(), dtypes=dtypes)
    store = open_store(convert(source, tmp_path / "store"))
    assert store.layout.original_dtype == wanted
    rows = expected_rows(source, 1, dtype=wanted)
    records = read_plane(store, 1, "w16").view(wanted)
    assert (records.reshape(-1, 3, 64)[: len(rows)] == rows).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_converts_w16_and_the_dense_part_but_not_the_codes(tmp_path, dtype):
    source = small_checkpoint(tmp_path / "source", dtype="float32")
    kept = open_store(convert(source, tmp_path / "kept"))
    store = open_store(convert(source, tmp_path / "store", dtype=dtype))
    kind = np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    rows = expected_rows(source, 0).astype(kind)
    records = read_plane(store, 0, "w16").view(kind)
    assert records.reshape(-1, 3, 64)[: len(rows)].tobytes() == rows.tobytes()
    embedding = read_tensors(source)["model.embed_tokens.weight"].astype(kind)
    assert store.dense("embed")["embedding"].tobytes() == embedding.tobytes()
    for plane in ("q4", "r4"):
        assert (read_plane(store, 0, plane) == read_plane(kept, 0, plane)).all()


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("model.embed_tokens.weight", -1, np.nan),
        ("model.layers.1.self_attn.k_proj.weight", 1000, -np.inf),
        ("model.layers.1.input_layernorm.weight", 0, np.nan),
        ("model.layers.0.mlp.gate_proj.weight", 0, np.inf),
        ("model.layers.0.mlp.up_proj.weight", -1, np.nan),
        ("model.layers.1.mlp.down_proj.weight", 1000, np.nan),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, name, index, value):
    source = small_checkpoint(tmp_path / "source")
    file = source / "model.safetensors"
    size = read_tensors(source)[name].size
    edit_tensor(file, name, index % size, value)
    with pytest.raises(
        ValueError, match=f"{name}: weights hold NaN or infinity; .*download"
    ):
        convert(source, tmp_path / "store")


def test_a_weight_too_large_for_the_asked_dtype_is_refused_by_name(tmp_path):
    source = small_checkpoint(tmp_path / "source", dtype="float32")
    file = source / "model.safetensors"
    header, body = split_safetensors(file)
    name = "model.layers.1.self_attn.o_proj.weight"
    start = header[name]["data_offsets"][0]
    join_safetensors(
        file, header, body[:start] + np.float32(1e5).tobytes() + body[start + 4 :]
    )
    with pytest.raises(ValueError, match=f"{name}: holds weights too large"):
        convert(source, tmp_path / "store", dtype="float16")
    convert(source, tmp_path / "store", dtype="bfloat16", overwrite=True)


PROGRAM = """
import resource, sys
from m2jax.convert import convert
from m2jax.store import open_store
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
convert(sys.argv[1], sys.argv[2])
open_store(sys.argv[2]).dense("embed")
before = peak()
convert(sys.argv[3], sys.argv[4])
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large_conversion(tmp_path_factory):
    """Of 98 MiB, in a process of its own that has converted a small one before."""
    folder = tmp_path_factory.mktemp("large")
    small = small_checkpoint(folder / "small")
    shape = {"hidden": 512, "ffn": 2048, "layers": 14, "heads": 8, "kv_heads": 2}
    large = make_checkpoint(folder / "large", make_config(**shape))
    assert (large / "model.safetensors").stat().st_size > 96 << 20
    folders = [small, folder / "small-store", large, folder / "large-store"]
    command = [sys.executable, "-c", PROGRAM, *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True)


def test_memory_stays_far_below_the_size_of_the_source(large_conversion):
    # Two down matrices, two chunks with their float32 blocks, one bank.
    assert int(large_conversion.stdout) < 64


def test_converting_and_loading_say_nothing_on_stderr(large_conversion):
    assert large_conversion.stderr == ""
