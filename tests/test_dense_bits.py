"""The dense part at 8 and 4 bits: the arithmetic, the bytes, the refusals."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import m2jax
from m2jax.cli.models import read_model
from m2jax.convert import convert
from m2jax.dense_bits import DENSE_BITS, dense_matrices, pack_bank
from m2jax.dense_part import shaped_dense_bytes, stored_dense_bytes
from m2jax.quant import (
    dequantise_base,
    dequantise_int8,
    quantise_rows,
    row_shape,
    split_codes,
)
from m2jax.store import open_store
from tests.command_line import Commands

PARITY = Path(__file__).parent / "fixtures" / "parity"
# Tied and not; biases; rows that are padded to whole groups; float32 originals.
FOLDERS = ("smollm2", "qwen2", "llama_width_40", "llama_gqa_fp32")
IDS = [1, 5, 9, 3, 17, 8, 2, 30, 4]
# float32 sums in another order; 8 bits move these logits by 0.01 or more.
ROUNDING = 2e-4
GROUP = 64


def rounded(matrix: np.ndarray, *, bits: int) -> np.ndarray:
    """What a matrix is worth at fewer bits."""
    rows, inputs = matrix.shape
    shape = row_shape(inputs, group_size=GROUP)
    padded = np.zeros((rows, shape.width), np.float32)
    padded[:, :inputs] = matrix
    codes, scales, _ = quantise_rows(padded, group=shape.group)
    q4, r4 = split_codes(codes)
    if bits == 8:
        found = dequantise_int8(q4, r4, scales, group=shape.group)
    else:
        found = dequantise_base(q4, scales, group=shape.group)
    return found[:, :inputs]


def with_rounded_matrices(source: Path, target: Path, *, bits: int) -> Path:
    """The checkpoint in float32, its attention and embeddings as `rounded` has them."""
    shutil.copytree(source, target)
    stacked = ("self_attn.", "embed_tokens.", "lm_head.")
    for path in target.glob("*.safetensors"):
        weights = {}
        for name, array in load_file(path).items():
            array = array.astype(np.float32)
            if array.ndim == 2 and any(part in name for part in stacked):
                array = np.ascontiguousarray(rounded(array, bits=bits))
            weights[name] = array
        save_file(weights, path)
    config = json.loads((target / "config.json").read_text())
    for field in ("torch_dtype", "dtype"):
        if field in config:
            config[field] = "float32"
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", FOLDERS)
def test_fewer_bits_are_a_checkpoint_of_rounded_matrices(name, bits, tmp_path):
    own = convert(PARITY / name, tmp_path / "own")
    other = convert(
        with_rounded_matrices(PARITY / name, tmp_path / "source", bits=bits),
        tmp_path / "other",
    )
    with (
        m2jax.load(own, mix="100/0/0", dense=bits) as packed,
        m2jax.load(own, mix="100/0/0") as plain,
        m2jax.load(other, mix="100/0/0") as wanted,
    ):
        given, right = packed.logits(IDS), wanted.logits(IDS)
        assert np.abs(given - right).max() < ROUNDING
        assert np.abs(plain.logits(IDS) - right).max() > 50 * ROUNDING
        # One token at a time, by the device's loop.
        options = {"max_new_tokens": 8, "ignore_eos": True}
        assert (
            packed.generate(IDS, **options).token_ids
            == wanted.generate(IDS, **options).token_ids
        )


@pytest.mark.parametrize("bits", DENSE_BITS)
@pytest.mark.parametrize("name", FOLDERS)
def test_the_plan_counts_the_bytes_that_are_held(name, bits, tmp_path):
    store = open_store(convert(PARITY / name, tmp_path / "store"))
    with m2jax.load(store.path, dense=bits) as engine:
        runner = engine.runner
        banks = [runner.embed, runner.head, *(p.attention for p in runner.layers)]
        held = sum(array.nbytes for bank in banks for array in bank.values())
        shared = ("scales", "down_norm", "noise")
        held += sum(getattr(p, field).nbytes for p in runner.layers for field in shared)
        footprint = engine.plan.footprint.dense
    arrays = sum("/c/" in path for path in store.files if path.startswith("dense/"))
    # An index and a checksum beside each array.
    assert 0 <= footprint - held <= 20 * arrays
    item = 4 if store.layout.original_dtype == "float32" else 2
    shaped = shaped_dense_bytes(store.config, store.layout, item_bytes=item, bits=bits)
    assert shaped == held


def test_fewer_bits_are_fewer_bytes_and_the_plan_says_so(tmp_path):
    store = open_store(convert(PARITY / "smollm2", tmp_path / "store"))
    sizes = [stored_dense_bytes(store, bits) for bits in DENSE_BITS]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    for path in (store.path, PARITY / "smollm2"):
        planned = [read_model(path, dense=bits).dense_bytes for bits in DENSE_BITS]
        assert planned == sorted(set(planned), reverse=True)
        assert planned[1] - planned[2] == sizes[1] - sizes[2]


def test_every_matrix_of_a_model_is_known(tmp_path):
    """A matrix left out would stay at 16 bits unseen."""
    store = open_store(convert(PARITY / "llama_gqa_fp32", tmp_path / "store"))
    names = {name.split("/")[-1] for name in dense_matrices(store.config, store.layout)}
    assert names == {"embedding", "qkv", "o", "lm_head"}


@pytest.mark.parametrize("bits", [0, 2, 5, 32])
def test_other_numbers_of_bits_are_refused(bits, m2jax_command: Commands):
    with pytest.raises(ValueError, match=rf"--dense {bits}: want one of"):
        m2jax.load(dense=bits)
    done = m2jax_command("plan", PARITY / "smollm2", "--dense", bits)
    assert done.code == 2
    assert f"--dense {bits}" in done.error


def test_a_weight_too_large_for_a_scale_is_named():
    bank = {"qkv": np.full((2, 64), 1e9, np.float32), "input_norm": np.ones(64)}
    with (
        ThreadPoolExecutor(1) as workers,
        pytest.raises(ValueError, match="--dense 8: qkv: weights of 1e"),
    ):
        pack_bank(bank, workers, bits=8, group=GROUP)
