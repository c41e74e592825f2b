"""search-mix on models whose best mix is known, and what it keeps."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import m2jax
from m2jax.bundled import SOURCE
from m2jax.calibrate import search_mix as module
from m2jax.calibrate.own_text import OwnText
from m2jax.calibrate.search_mix import search_mix
from m2jax.errors import NumericalError, TierFailed
from m2jax.layer_mixes import parse_mixes
from m2jax.mix import ALL_16, PrecisionMix
from m2jax.store import open_store
from m2jax.store.calibration import read_json_part

TEXT = "".join(f"The dog number {n} saw a cat under the tree.\n" for n in range(400))
LAYERS, GROUP = 3, 64


def at_4_bits(weights: np.ndarray) -> np.ndarray:
    """The nearest weights that plane q4 holds exactly: multiples of a power of two,
    from -8 to 7, with -8 in every group."""
    rows = weights.astype(np.float32).reshape(-1, GROUP)
    step = 2.0 ** np.ceil(np.log2(np.abs(rows).max() / 8))
    codes = np.clip(np.rint(rows / step), -8, 7)
    codes[:, 0] = -8
    return (codes * step).reshape(weights.shape).astype(np.float16)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """The bundled model's first layers; layer 1's weights lose nothing at 4 bits."""
    source = tmp_path_factory.mktemp("planted") / "source"
    shutil.copytree(SOURCE, source)
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS
    (source / "config.json").write_text(json.dumps(config))
    weights = {
        name: array
        for name, array in load_file(source / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    }
    for matrix in ("gate", "up"):
        name = f"model.layers.1.mlp.{matrix}_proj.weight"
        weights[name] = at_4_bits(weights[name])
    down = "model.layers.1.mlp.down_proj.weight"
    weights[down] = np.ascontiguousarray(at_4_bits(weights[down].T.copy()).T)
    save_file(weights, source / "model.safetensors")
    return m2jax.convert(source, source.parent / "store")


def bits_of(mix: PrecisionMix) -> float:
    return (16 * mix.percent16 + 8 * mix.percent8 + 4 * mix.percent4) / 100


def test_the_layer_that_loses_nothing_at_4_bits_gets_4_bits(planted):
    found = search_mix(planted, TEXT, bits=6.6, tokens=256, window=64)
    mixes = parse_mixes(found["mix"], LAYERS)
    assert (mixes[1].percent16, mixes[1].percent8, mixes[1].percent4) == (0, 0, 100)
    # What it saves goes to the others, and all of it.
    for layer in (0, 2):
        assert bits_of(mixes[layer]) > 6.6
    assert 6.5 < found["cost"] <= 6.6 + 1e-9
    assert found["kl"] < 0.5 * found["uniform"]["kl"]
    assert read_json_part(open_store(planted), "mix") == found


def test_the_mix_found_is_the_default_of_later_runs(planted):
    found = search_mix(planted, TEXT, bits=6, tokens=128, window=64)
    assert m2jax.load(planted).mixes == parse_mixes(found["mix"], LAYERS)
    assert m2jax.load(planted, mix="0/0/100").mixes == parse_mixes("0/0/100", LAYERS)


def test_a_mix_ranked_by_another_scorer_is_told_where_it_is_used(planted, caplog):
    options = {"tokens": 128, "window": 64}
    search_mix(planted, TEXT, bits=6, scorer="gate", **options)
    m2jax.load(planted, scorer="gate")
    m2jax.load(planted, mix="0/25/75")
    assert caplog.text == ""
    m2jax.load(planted)
    assert "found for --scorer gate, and base ranks" in caplog.text


def test_a_store_that_cannot_be_written_is_refused_before_the_work(
    planted, tmp_path, monkeypatch
):
    def load(*args, **options):
        raise AssertionError("nothing is loaded for a search that is refused")

    monkeypatch.setattr(module, "load", load)
    store = shutil.copytree(planted, tmp_path / "store")
    shutil.rmtree(store / "calibration", ignore_errors=True)
    with monkeypatch.context() as patch:
        # Tests may run as root, who may write everywhere.
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(TierFailed, match="store: cannot be written"):
            search_mix(store, TEXT, bits=6)
    (store / "calibration").write_text("a file where the folder should be")
    with pytest.raises(TierFailed, match="calibration: cannot be written"):
        search_mix(store, TEXT, bits=6)


def test_a_mix_that_the_store_cannot_take_is_told(
    planted, m2jax_command, monkeypatch, tmp_path
):
    def fail(store, part, facts):
        raise TierFailed("calibration: cannot be written: No space left on device")

    monkeypatch.setattr(module, "write_json_part", fail)
    text = tmp_path / "text"
    text.write_text(TEXT)
    command = ("search-mix", planted, "--text", text, "--bits", "6")
    done = m2jax_command(*command, "--tokens", "128", "--window", "64", "--json")
    assert done.code == 5
    found = done.facts["mix"]
    assert parse_mixes(found, LAYERS)
    assert "No space left on device" in done.error
    assert f"mix {found} was found and not kept" in done.error
    assert done.facts["measured"]


def test_a_budget_in_bytes_counts_what_moves(planted):
    layout = open_store(planted).layout
    r4 = LAYERS * layout.neurons * layout.record_bytes("r4")
    found = search_mix(
        planted, TEXT, bytes_per_token=r4 // 2, tokens=128, window=64, keep=False
    )
    mixes = parse_mixes(found["mix"], LAYERS)
    moved = sum(
        layout.neurons
        * (
            mix.percent16 * layout.record_bytes("w16")
            + mix.percent8 * layout.record_bytes("r4")
        )
        / 100
        for mix in mixes
    )
    assert moved == pytest.approx(found["cost"])
    assert 0.8 * (r4 // 2) < moved <= r4 // 2 + 1e-6


def test_the_entropy_objective_keeps_one_mix_for_all_layers(planted):
    found = search_mix(
        planted, TEXT, bits=8, objective="entropy", tokens=128, window=64, keep=False
    )
    assert "," not in found["mix"]
    assert found["cost"] == pytest.approx(8, abs=0.01)
    entropies = {one["mix"]: one["entropy"] for one in found["measured"]}
    assert entropies[found["mix"]] == min(entropies.values()) == found["entropy"]
    # Both ends: plain INT8, and no 8 bits at all.
    assert "0/100/0" in entropies
    assert any(parse_mixes(mix, 1)[0].percent8 < 1 for mix in entropies)


@pytest.mark.parametrize("objective", ["kl", "entropy"])
def test_nan_names_its_layer_and_keeps_nothing(objective, planted, monkeypatch):
    whole = module.load

    def spoiled(*args, **options):
        engine = whole(*args, **options)
        params = engine.runner.layers[1]
        norm = params.attention["ffn_norm"].at[3].set(np.nan)
        attention = {**params.attention, "ffn_norm": norm}
        engine.runner.layers[1] = params._replace(attention=attention)
        return engine

    monkeypatch.setattr(module, "load", spoiled)
    before = read_json_part(open_store(planted), "mix")
    options = {"bits": 6, "tokens": 128, "window": 64, "objective": objective}
    with pytest.raises(NumericalError, match="layer 1: activations hold NaN"):
        search_mix(planted, TEXT, **options)
    assert read_json_part(open_store(planted), "mix") == before


def test_without_plane_r4_entropy_is_of_16_and_4_bits_alone(planted, tmp_path):
    store = m2jax.convert(
        planted.parent / "source", tmp_path / "store", planes=("q4", "w16")
    )
    options = {"bits": 6, "objective": "entropy", "tokens": 128, "window": 64}
    found = search_mix(store, TEXT, **options)
    assert [one["mix"] for one in found["measured"]] == ["16.66/0/83.34"]
    assert str(m2jax.load(store).mixes[0]) == found["mix"]
    engine = m2jax.load(store, mix=ALL_16, scorer="none", planes=("q4", "w16"))
    own = OwnText(engine, [[5, 6, 7]], ranker="base", new_tokens=2)
    assert own.entropy(PrecisionMix(25, 0, 75)) > 0
    with pytest.raises(ValueError, match="at 8 bits want plane r4"):
        own.entropy(PrecisionMix(0, 25, 75))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give a budget"),
        ({"bits": 5.0, "bytes_per_token": 9}, "one of them"),
        ({"bits": 3.0}, "smallest possible is 4, .*; with --skip, less is possible"),
        ({"bits": 17.0}, "--bits 17: want more than 0 and at most 16"),
        ({"bits": 5.0, "objective": "magic"}, "objective 'magic'"),
        ({"bits": 5.0, "scorer": "none"}, "scorer 'none': want base"),
        ({"bits": 5.0, "scorer": "lowrank"}, "no predictors for lookahead 0"),
        ({"bits": 5.0, "tokens": 10}, "--tokens 10: want at least 64"),
        ({"bytes_per_token": 9, "objective": "entropy"}, "budget as --bits"),
        ({"bits": 3.9, "objective": "entropy"}, "--bits 3.9: want 4 to 16"),
        (
            {"bits": 5.0, "objective": "entropy", "allow_skip": True},
            "--skip goes with --objective kl",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_and_nothing_kept(options, says, planted):
    before = read_json_part(open_store(planted), "mix")
    with pytest.raises(ValueError, match=says):
        search_mix(planted, TEXT, **{"tokens": 128, "window": 64, **options})
    assert read_json_part(open_store(planted), "mix") == before


def test_a_store_without_original_weights_is_refused(planted, tmp_path):
    store = m2jax.convert(
        planted.parent / "source", tmp_path / "store", planes=("q4", "r4")
    )
    with pytest.raises(ValueError, match="has no plane w16, only q4, r4"):
        search_mix(store, TEXT, bits=5)
    with pytest.raises(ValueError, match="wants 16 bits"):
        m2jax.load(store, mix="25/25/50")
    assert str(m2jax.load(store).mixes[0]) == "0/25/75"
