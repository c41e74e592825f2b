"""The ReLU form of the bundled model: made from 3 MB, trained, and truly sparse."""

import importlib
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import m2jax
from m2jax.bundled import SOURCE
from m2jax.perplexity import perplexity

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))
relu_model, zeros = (
    importlib.import_module(name) for name in ("relu_model", "train_zeros")
)
TEXTS = SCRIPTS / "data" / "text"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("relu") / "model"
    relu_model.write_relu_model(out)
    return out


@pytest.fixture(scope="module")
def swapped(made, tmp_path_factory) -> Path:
    """The bundled weights with ReLU in place of SiLU, not trained."""
    out = tmp_path_factory.mktemp("swapped") / "model"
    shutil.copytree(made, out)
    shutil.copyfile(SOURCE / WEIGHTS, out / WEIGHTS)
    return out


@cache
def facts(folder: Path, name: str) -> dict:
    text = (TEXTS / f"{name}.txt").read_text()[:12000]
    return zeros.zero_shares(folder, text, length=256)


@pytest.mark.parametrize("name", ["python", "stories"])
def test_training_won_back_most_of_what_the_swap_cost(made, swapped, name):
    stock, before, after = (
        facts(folder, name)["nll_per_token"] for folder in (SOURCE, swapped, made)
    )
    assert before > stock + 0.04
    assert after < before - 0.03
    assert after < stock + 0.05


def test_most_of_its_activations_are_exactly_zero(made):
    assert facts(made, "python")["zero_share"] > 0.8


def test_the_engine_runs_it_at_the_same_loss(made, tmp_path):
    text = (TEXTS / "stories.txt").read_text()[:4000]
    own = zeros.zero_shares(made, text, length=256)
    store = m2jax.convert(made, tmp_path / "store")
    with m2jax.load(store, mix="100/0/0", context=256) as engine:
        whole = own["windows"] * 255
        found = perplexity(engine, text, context=256, max_tokens=whole)
    assert found["nll_per_token"] == pytest.approx(own["nll_per_token"], abs=1e-4)


def test_the_difference_packs_what_was_trained_up_to_its_4_bits(
    made, tmp_path, monkeypatch
):
    """A norm comes back as float16, a matrix within half a step of 4 bits."""
    trained = tmp_path / "trained"
    shutil.copytree(made, trained)
    weights = load_file(trained / WEIGHTS)
    noise = np.random.default_rng(0)
    for name, array in weights.items():
        if name != relu_model.EMBEDDING:
            change = noise.normal(0, 0.01, array.shape)
            weights[name] = (array + change).astype(np.float16)
    save_file(weights, trained / WEIGHTS)
    monkeypatch.setattr(relu_model, "DELTA", tmp_path / "packed" / "delta")
    relu_model.pack(trained)
    relu_model.write_relu_model(tmp_path / "again")
    again, base = load_file(tmp_path / "again" / WEIGHTS), load_file(SOURCE / WEIGHTS)
    for name, array in weights.items():
        wide = array.astype(np.float32)
        error = np.abs(again[name].astype(np.float32) - wide)
        largest = np.abs(wide - base[name].astype(np.float32)).max()
        # Rounding to 16 levels over twice the largest change, and to float16.
        step = 0 if array.ndim == 1 else largest / 7.5
        assert error.max() <= step / 2 + np.abs(wide).max() * 2**-10, name


def test_other_embeddings_and_full_folders_are_refused(made, tmp_path, capsys):
    trained = tmp_path / "trained"
    shutil.copytree(made, trained)
    weights = load_file(trained / WEIGHTS)
    weights[relu_model.EMBEDDING] = weights[relu_model.EMBEDDING] * np.float16(2)
    save_file(weights, trained / WEIGHTS)
    with pytest.raises(ValueError, match="the embedding differs"):
        relu_model.pack(trained)
    with pytest.raises(ValueError, match="is not empty"):
        relu_model.write_relu_model(made)
