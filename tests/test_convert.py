"""Conversion: what a store holds is what the checkpoint held."""

import json
import logging

import numpy as np
import pytest

from m2jax import layout as layout_module
from m2jax.config import config_to_json
from m2jax.convert import convert
from m2jax.hf_config import config_from_hf
from m2jax.store import open_store
from tests.small_checkpoints import (
    SMALL_CHUNK_TARGET_BYTES,
    TOKENIZER,
    digests,
    expected_rows,
    join_safetensors,
    read_plane,
    read_tensors,
    small_checkpoint,
    split_safetensors,
)

SHAPES = {
    "llama_f16": {},
    "llama_bf16_sharded": {"dtype": "bfloat16", "shards": 3, "layers": 3},
    "llama_f32_tied": {"dtype": "float32", "tied": True},
    "llama_bias": {"attention_bias": True},
    "awkward_width": {
        **{"hidden": 40, "heads": 2, "kv_heads": 1, "head_dim": 22, "ffn": 52},
        "dtype": "bfloat16",
    },
    "qwen2": {"model_type": "qwen2", "dtype": "bfloat16"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "tied": True},
    "mistral": {"model_type": "mistral", "heads": 8, "kv_heads": 8},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(layout_module, "CHUNK_TARGET_BYTES", SMALL_CHUNK_TARGET_BYTES)


@pytest.fixture(scope="module", params=SHAPES)
def converted(request, tmp_path_factory):
    """A source folder and its store, for every kind of checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "CHUNK_TARGET_BYTES", SMALL_CHUNK_TARGET_BYTES)
        source = small_checkpoint(folder / "source", **SHAPES[request.param])
        return source, convert(source, folder / "store", group_size=32)


def unpack(plane, width):
    """Nibbles [N, 3, W] of a plane's records: halves of a row, low nibble first."""
    packed = plane.reshape(len(plane), 3, width // 2)
    return np.concatenate([packed % 16, packed // 16], axis=-1).astype(np.int32)


def test_w16_records_are_the_bits_of_the_source(converted):
    source, path = converted
    store = open_store(path)
    for layer in range(store.config.num_layers):
        rows = expected_rows(source, layer)
        records = read_plane(store, layer, "w16").view(rows.dtype)
        records = records.reshape(-1, 3, store.layout.width)
        neurons, hidden = rows.shape[0], rows.shape[2]
        assert records[:neurons, :, :hidden].tobytes() == rows.tobytes()
        assert not records[:neurons, :, hidden:].view(np.uint8).any()


def test_codes_are_the_nearest_multiples_of_the_scale(converted):
    source, path = converted
    store = open_store(path)
    width, group = store.layout.width, store.layout.group
    for layer in range(store.config.num_layers):
        rows = expected_rows(source, layer).astype(np.float32)
        neurons, _, hidden = rows.shape
        rows = np.pad(rows, [(0, 0), (0, 0), (0, width - hidden)])
        scales = store.dense(f"layers/{layer:02}")["scales"][:neurons]
        q4 = unpack(read_plane(store, layer, "q4")[:neurons], width)
        r4 = unpack(read_plane(store, layer, "r4")[:neurons], width)
        steps = np.repeat(scales, group, axis=-1).astype(np.float64)
        error = np.abs((16 * q4 + r4 - 136) * steps - rows)
        # Half a step, and the float32 rounding of a quotient up to 136.
        assert (error <= np.abs(steps) * (0.5 + 136 * 2.0**-22)).all()


def test_padding_neurons_are_zero_bytes_with_zero_scales(converted):
    _, path = converted
    store = open_store(path)
    neurons = store.layout.neurons
    assert store.layout.padded_neurons > neurons
    for layer in range(store.config.num_layers):
        for plane in store.planes:
            records = read_plane(store, layer, plane)
            assert records[neurons - 1].any()
            assert not records[neurons:].any()
        bank = store.dense(f"layers/{layer:02}")
        for name in ("scales", "down_norm", "noise"):
            assert bank[name][neurons - 1].any()
            assert not bank[name][neurons:].any()


def test_down_norm_is_the_norm_of_the_q4_columns(converted):
    _, path = converted
    store = open_store(path)
    neurons, width = store.layout.neurons, store.layout.width
    q4 = unpack(read_plane(store, 1, "q4")[:neurons], width)[:, 2]
    bank = store.dense("layers/01")
    scales = bank["scales"][:neurons, 2].astype(np.float64)
    columns = (16 * q4 - 128) * np.repeat(scales, store.layout.group, axis=-1)
    wanted = np.linalg.norm(columns[:, : store.config.hidden_size], axis=1)
    np.testing.assert_allclose(bank["down_norm"][:neurons], wanted, rtol=1e-6)


def test_noise_is_what_q4_loses_of_each_row(converted):
    source, path = converted
    store = open_store(path)
    neurons, width = store.layout.neurons, store.layout.width
    hidden = store.config.hidden_size
    bank = store.dense("layers/01")
    q4 = unpack(read_plane(store, 1, "q4")[:neurons], width)
    scales = bank["scales"][:neurons].astype(np.float64)
    base = ((16 * q4 - 128) * np.repeat(scales, store.layout.group, axis=-1))[
        :, :, :hidden
    ]
    tensors = read_tensors(source)
    names = ("gate_proj", "up_proj", "down_proj")
    rows = [
        tensors[f"model.layers.1.mlp.{name}.weight"].astype(np.float64)
        for name in names
    ]
    exact = np.stack([rows[0], rows[1], rows[2].T], axis=1)
    lost = np.square(exact - base).sum(axis=2)
    columns = np.square(base[:, 2]).sum(axis=1)
    wanted = np.stack(
        [lost[:, 0] * columns / hidden, lost[:, 1] * columns / hidden, lost[:, 2]], 1
    )
    np.testing.assert_allclose(bank["noise"][:neurons], wanted, rtol=1e-4)


def test_dense_arrays_are_the_bits_of_the_source(converted):
    source, path = converted
    tensors, store = read_tensors(source), open_store(path)

    def same(array, *names):
        wanted = np.concatenate([tensors.pop(name) for name in names])
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        assert array.tobytes() == wanted.tobytes()

    same(store.dense("embed")["embedding"], "model.embed_tokens.weight")
    head = store.dense("head")
    same(head["norm"], "model.norm.weight")
    if "lm_head" in head:
        same(head["lm_head"], "lm_head.weight")
    for layer in range(store.config.num_layers):
        bank = store.dense(f"layers/{layer:02}")
        at = f"model.layers.{layer}."
        attention = at + "self_attn."
        same(bank["input_norm"], at + "input_layernorm.weight")
        same(bank["ffn_norm"], at + "post_attention_layernorm.weight")
        same(bank["qkv"], *(f"{attention}{n}_proj.weight" for n in "qkv"))
        same(bank["o"], attention + "o_proj.weight")
        if "qkv_bias" in bank:
            same(bank["qkv_bias"], *(f"{attention}{n}_proj.bias" for n in "qkv"))
        if "o_bias" in bank:
            same(bank["o_bias"], attention + "o_proj.bias")
        if "q_norm" in bank:
            same(bank["q_norm"], attention + "q_norm.weight")
            same(bank["k_norm"], attention + "k_norm.weight")
    assert all(".mlp." in name for name in tensors)


def test_the_manifest_holds_the_config_and_the_tokenizer_comes_along(converted):
    source, path = converted
    store = open_store(path)
    raw = json.loads((source / "config.json").read_text())
    generation = json.loads(TOKENIZER["generation_config.json"])
    assert store.config == config_from_hf(raw, where="", generation=generation)
    folder = store.tokenizer_folder()
    assert folder is not None
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert found == TOKENIZER
    assert store.manifest.source["name"] == "source"


def test_no_file_holds_a_path_or_a_time(converted):
    _, path = converted
    parent = str(path.parent).encode()
    for file in path.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert parent not in data
            assert b'nsecs": 1' not in data
    assert not (path / ".m2jax-convert").exists()


def test_two_conversions_give_the_same_bytes(tmp_path):
    source = small_checkpoint(tmp_path / "source", shards=2)
    one = convert(source, tmp_path / "one")
    two = convert(source, tmp_path / "a folder with spaces" / ("\N{SNOWMAN}" * 80))
    assert digests(one) == digests(two)


def test_the_bundled_model_converts_whole(tmp_path):
    from m2jax.data import __path__ as data

    store = open_store(convert(f"{data[0]}/pystories8M", tmp_path / "store"))
    assert store.layout.original_dtype == "float16"
    assert config_to_json(store.config)["num_layers"] == 8
    assert store.tokenizer_folder() is not None


def test_progress_ends_at_the_total_and_never_falls(tmp_path):
    seen = []
    source = small_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "store", progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert len({step[1] for step in seen}) == 1
    assert done[0] == 0
    assert done[-1] == seen[-1][1]


def test_extra_tensors_are_named_in_a_warning_and_derived_ones_are_not(
    tmp_path, caplog
):
    source = small_checkpoint(tmp_path / "source", tied=True)
    file = source / "model.safetensors"
    header, body = split_safetensors(file)
    end = len(body)
    for name in (
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.q_proj.bias",
    ):
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
        body, end = body + bytes(4), end + 4
    join_safetensors(file, header, body)
    with caplog.at_level(logging.WARNING, logger="m2jax"):
        convert(source, tmp_path / "store")
    [record] = [record for record in caplog.records if record.name == "m2jax"]
    assert "q_proj.bias" in record.getMessage()
    assert "lm_head" not in record.getMessage()
    assert "inv_freq" not in record.getMessage()
