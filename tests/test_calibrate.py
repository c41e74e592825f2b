"""calibrate, whole: what it keeps in a store, how it goes on, what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import m2jax
from m2jax.cache.trace import Trace
from m2jax.calibrate import evaluator, fit, run, work
from m2jax.calibrate.fit import FitOptions
from m2jax.calibrate.fitted import keep_layer
from m2jax.calibrate.run import calibrate
from m2jax.calibrate.search_mix import search_mix
from m2jax.calibrate.text import calibration_windows
from m2jax.errors import NumericalError, StoreError
from m2jax.store import open_store, verify_store
from m2jax.store.calibration import (
    calibration_index,
    read_json_part,
    read_part,
    write_json_part,
)
from m2jax.store.calibration_index import index_to_bytes
from tests.small_checkpoints import digests

TEXT = "".join(f"The dog number {n} saw a cat under the tree.\n" for n in range(300))
OPTIONS = FitOptions(epochs=2)
SIZES = {"tokens": 384, "window": 64}
# Where what is found does not matter.
FEW = {"tokens": 128, "window": 64}


@pytest.fixture(scope="module")
def calibrated(bundled_store, tmp_path_factory) -> tuple[Path, dict]:
    store = tmp_path_factory.mktemp("calibrated") / "store"
    shutil.copytree(bundled_store, store)
    return store, calibrate(store, TEXT, mix="25/25/50", options=OPTIONS, **SIZES)


@pytest.fixture
def no_hits(monkeypatch):
    """What the report alone says, and that of `calibrated` has said, takes most of the
    time of a calibration."""
    monkeypatch.setattr(run, "expected_hits", lambda trace, neurons: [])


def test_every_part_is_kept_and_the_manifest_is_untouched(calibrated, bundled_store):
    store, facts = calibrated
    opened = open_store(store)
    parts = {
        *("order", "predictors-0", "predictors-1"),
        "report",
        "thresholds",
        "trace",
    }
    assert calibration_index(opened).keys() == parts
    assert read_json_part(opened, "report") == json.loads(json.dumps(facts))
    kept = read_json_part(opened, "thresholds")
    assert kept == {"importance": [layer["threshold"] for layer in facts["layers"]]}
    kept = {p: d for p, d in digests(store).items() if "calibration/" not in p}
    assert kept == digests(bundled_store)


def test_the_order_is_a_permutation_of_every_layer(calibrated):
    store, _ = calibrated
    folder = read_part(open_store(store), "order")
    assert folder is not None
    orders = np.load(folder / "order.npy")
    assert orders.shape == (8, 704)
    assert (np.sort(orders, axis=1) == np.arange(704)).all()


def test_the_trace_has_the_mix_s_wanted_sets(calibrated):
    store, _ = calibrated
    folder = read_part(open_store(store), "trace")
    assert folder is not None
    trace = Trace.load(folder / "trace.npz", neurons=704)
    entries = trace.entries()
    assert {entry.plane for entry in entries} == {"r4", "w16"}
    assert {entry.wanted.size for entry in entries} == {176}
    assert {entry.layer for entry in entries} == set(range(8))
    assert max(entry.step for entry in entries) == SIZES["tokens"] - 1
    by = {(entry.step, entry.layer, entry.plane): entry.wanted for entry in entries}
    assert not set(by[5, 3, "r4"].tolist()) & set(by[5, 3, "w16"].tolist())


def test_the_trace_is_what_decoding_wants(calibrated, bundled_store):
    """In layer 0, whose input no mix has touched, token by token of a window."""
    store, _ = calibrated
    folder = read_part(open_store(store), "trace")
    assert folder is not None
    kept = {
        (entry.step, entry.plane): set(entry.wanted.tolist())
        for entry in Trace.load(folder / "trace.npz").entries()
        if entry.layer == 0
    }
    engine = m2jax.load(bundled_store, mix="25/25/50", context=64)
    window = calibration_windows(
        engine.tokenizer, TEXT, length=SIZES["window"], tokens=SIZES["tokens"]
    )[0]
    runner, found = engine.runner, Trace()
    kv = runner.new_kv(64)
    runner.prefill(window[:10], kv)
    runner.record(found)
    for position in range(10, 16):
        runner.decode(window[position], position, kv)
    entries = [entry for entry in found.entries() if entry.layer == 0]
    assert len(entries) == 12
    for entry in entries:
        # Sums in another order may swap neighbours at the edge of a class.
        shared = set(entry.wanted.tolist()) & kept[entry.step + 10, entry.plane]
        assert len(shared) >= entry.wanted.size - 1


def test_the_report_has_every_layer_and_scorer(calibrated):
    _, facts = calibrated
    assert facts["tokens"] == SIZES["tokens"]
    assert len(facts["layers"]) == 8
    assert facts["recall"].keys() == {"base", "gate", "base, 1 ahead", "base, 2 ahead"}
    for layers in facts["recall"].values():
        assert len(layers) == 8
    base = [layer["25"] for layer in facts["recall"]["base"]]
    gate = [layer["25"] for layer in facts["recall"]["gate"]]
    assert min(base) > 0.9 > max(gate)
    assert facts["recall"]["base, 2 ahead"][:2] == [None, None]
    assert facts["predictors"].keys() == {"0", "1"}
    chance = 0.25
    for layer in facts["predictors"]["0"]:
        assert layer["recall"]["25"] > 1.3 * chance
    assert {row["plane"] for row in facts["hits"]} == {"r4", "w16"}
    layout = open_store(calibrated[0]).layout
    for row in facts["hits"]:
        of_slot = layout.record_bytes(row["plane"])
        assert row["hbm_bytes"] == 8 * row["slots"] * of_slot


def test_the_predictors_rank_when_the_store_is_loaded(calibrated):
    store, _ = calibrated
    for lookahead in (0, 1):
        engine = m2jax.load(
            store, mix="25/25/25", scorer="lowrank", lookahead=lookahead, context=64
        )
        done = engine.generate("Once upon a time", max_new_tokens=8)
        assert len(done.token_ids) == 8


@pytest.mark.usefixtures("no_hits")
def test_an_interrupted_calibration_goes_on_and_ends_in_the_same_bytes(
    calibrated, bundled_store, tmp_path, monkeypatch
):
    store = tmp_path / "store"
    shutil.copytree(bundled_store, store)
    kept, trained = fit.keep_layer, []

    def interrupted(folder, layer, fitted):
        kept(folder, layer, fitted)
        trained.append(layer)
        if len(trained) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit, "keep_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(store, TEXT, mix="25/25/50", options=OPTIONS, **SIZES)
    assert calibration_index(open_store(store)) == {}
    calibrate(store, TEXT, mix="25/25/50", options=OPTIONS, **SIZES)
    # Five before, and no layer of them again.
    assert len(trained) == 16
    parts, wanted = (
        {
            part: files
            for part, files in calibration_index(open_store(path)).items()
            if part != "report"  # holds timings
        }
        for path in (store, calibrated[0])
    )
    assert parts == wanted
    assert not (store / work.FOLDER).exists()


def test_nan_stops_it_names_the_layer_and_keeps_nothing(bundled_store, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(bundled_store, store)
    exact, calls = evaluator.Activations, []

    def broken(h, importance, base, gate, precise, ahead=()):
        calls.append(h)
        bad = np.float32(np.nan if len(calls) > 15 else 1)
        return exact(h * bad, importance, base, gate, precise, ahead)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "Activations", broken)
        # Six windows a layer.
        with pytest.raises(NumericalError, match="layer 2: activations hold NaN"):
            calibrate(store, TEXT, lookaheads=(), **SIZES)
    assert calibration_index(open_store(store)) == {}


def no_sweep(*args):
    raise AssertionError("nothing is measured for a run that is refused")


@pytest.mark.usefixtures("no_hits")
def test_an_unfinished_run_of_other_options_is_refused_before_the_sweep(
    bundled_store, tmp_path, monkeypatch
):
    store = tmp_path / "store"
    shutil.copytree(bundled_store, store)

    def interrupted(folder, layer, fitted):
        keep_layer(folder, layer, fitted)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "keep_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(store, TEXT, options=OPTIONS, **FEW)
    monkeypatch.setattr(run, "measure", no_sweep)
    before = digests(store)
    with pytest.raises(ValueError, match="lookahead-0: was started for another"):
        calibrate(store, TEXT, options=FitOptions(epochs=3), **FEW)
    assert digests(store) == before


@pytest.mark.usefixtures("no_hits")
@pytest.mark.parametrize("damage", ["index", "no index", "mix", "foreign"])
def test_a_damaged_calibration_is_repaired_by_calibrating_again(
    damage, bundled_store, tmp_path, caplog
):
    store = tmp_path / "store"
    shutil.copytree(bundled_store, store)
    write_json_part(open_store(store), "mix", {"mix": "100/0/0"})
    [part] = (store / "calibration").glob("mix-*")
    index = store / "calibration" / "index.json"
    if damage == "foreign":
        files = calibration_index(open_store(store))
        index.write_bytes(index_to_bytes(files, model="0" * 64))
    elif damage == "no index":
        index.unlink()
    else:
        (part / "facts.json" if damage == "mix" else index).write_bytes(b"{")
    facts = calibrate(store, TEXT, lookaheads=(), **FEW)
    assert facts["mix"] == "0/25/75"
    assert "taking the default mix" in caplog.text
    assert read_json_part(open_store(store), "report") is not None
    if damage == "mix":
        with pytest.raises(StoreError, match="run m2jax search-mix again"):
            m2jax.load(store)
        search_mix(store, TEXT, bits=16, **FEW)
    verify_store(store)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("too short", {}, r"has \d+ tokens: want at least 126"),
        ("東京" * 900, {}, "are unknown or pieces of characters"),
        (TEXT, {"mix": "0/0"}, "mix '0/0'"),
        (TEXT, {"tokens": 64}, "--tokens 64: want at least 128"),
        (
            TEXT,
            {"lookaheads": (0, 3)},
            r"lookaheads \(0, 3\): want some of",
        ),
        (TEXT, {"options": FitOptions(rank=257)}, "rank 257: want 1 to 256"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_and_nothing_kept(
    text, options, says, bundled_store, monkeypatch
):
    monkeypatch.setattr(run, "measure", no_sweep)
    with pytest.raises(ValueError, match=says):
        calibrate(bundled_store, text, **{**SIZES, **options})
    assert not (bundled_store / "calibration").exists()
    assert not (bundled_store / work.FOLDER).exists()
