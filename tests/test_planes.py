"""Stores that keep only some planes of their neurons."""

import json
import re
import shutil

import numpy as np
import pytest

import m2jax
from m2jax import layout as layout_module
from m2jax.config import config_from_json
from m2jax.convert import convert
from m2jax.convert.target import check_space
from m2jax.errors import DoesNotFit, StoreError
from m2jax.layer_mixes import format_mixes
from m2jax.layout import PLANES, check_planes, make_layout
from m2jax.store import TensorStoreChunks, open_store, store_info, verify_store
from m2jax.store.manifest import bytes_to_manifest
from tests.conftest import TINY
from tests.small_checkpoints import (
    SMALL_CHUNK_TARGET_BYTES,
    digests,
    read_plane,
    signed,
    small_checkpoint,
)

LEGAL = [("q4",), ("q4", "r4"), ("q4", "w16"), ("q4", "r4", "w16")]
TOO_LARGE = 1e5


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "CHUNK_TARGET_BYTES", SMALL_CHUNK_TARGET_BYTES)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("made") / "source")


@pytest.fixture(scope="module")
def whole(source):
    return convert(source, source.with_name("whole"))


@pytest.fixture(scope="module")
def small(source):
    """Without the original weights."""
    return convert(source, source.with_name("small"), planes=("q4", "r4"))


@pytest.mark.parametrize("planes", LEGAL)
def test_a_store_of_some_planes_is_the_whole_one_less_the_others(
    source, whole, tmp_path, planes
):
    store = verify_store(convert(source, tmp_path / "store", planes=planes))
    assert (store.planes, store.layout.planes) == (planes, planes)
    kept = {
        name: digest
        for name, digest in digests(whole).items()
        if not name.startswith("neurons/") or name.split("/")[2] in planes
    }
    made = digests(store.path)
    same_manifest = made.pop("manifest.json") == kept.pop("manifest.json")
    assert made == kept
    assert same_manifest == (planes == PLANES)
    assert set(made) == set(store.files)
    raw = json.loads((store.path / "manifest.json").read_bytes())
    assert raw["planes"].keys() == {*planes}
    assert ("of" in raw["quantiser"]) == ("w16" not in planes)


def test_planes_may_be_given_in_any_order(source, whole, tmp_path):
    store = convert(source, tmp_path / "store", planes=reversed(PLANES))
    assert digests(store) == digests(whole)


@pytest.mark.parametrize(
    "planes",
    [(), ("w16",), ("r4",), ("r4", "w16"), ("q4", "q4"), ("q4", "q2"), "q4", ("",)],
)
def test_planes_that_make_no_store_are_refused_before_anything_is_written(
    source, tmp_path, planes
):
    with pytest.raises(ValueError, match=r"planes '.*': want q4, and r4 or w16"):
        convert(source, tmp_path / "store", planes=planes)
    assert not (tmp_path / "store").exists()


def test_planes_are_put_in_their_one_order():
    assert check_planes(["w16", "q4"]) == ("q4", "w16")


def test_a_plane_is_read_where_it_is_and_refused_where_it_is_not(whole, small):
    store = open_store(small)
    for plane in ("q4", "r4"):
        assert (
            read_plane(store, 1, plane) == read_plane(open_store(whole), 1, plane)
        ).all()
    layout = store.layout
    out = np.zeros((layout.padded_neurons, layout.record_bytes("w16")), np.uint8)
    with pytest.raises(ValueError, match=r"has no plane w16, only q4, r4"):
        TensorStoreChunks(store).read(0, "w16", out)


def test_8_bit_answers_need_no_original_weights(tiny_store, tmp_path):
    small = convert(TINY, tmp_path / "small", planes=("q4", "r4"))
    tokens = np.random.default_rng(0).integers(3, 90, 12).tolist()
    logits = {}
    for store in (tiny_store, small):
        with m2jax.load(store, mix="0/50/50") as engine:
            logits[store] = engine.logits(tokens)
    assert (logits[small] == logits[tiny_store]).all()
    with pytest.raises(ValueError, match="w16"):
        m2jax.load(small, mix="25/25/50")


def test_info_and_the_command_line_tell_the_planes(m2jax_command, source, tmp_path):
    store = tmp_path / "store"
    assert m2jax_command("convert", source, store, "--planes", "q4, r4").code == 0
    facts = m2jax_command("info", store, "--json").facts
    assert facts == store_info(store)
    assert facts["planes"].keys() == {"q4", "r4"}
    config, layout = open_store(store).config, open_store(store).layout
    weights = config.num_layers * layout.padded_neurons * 3 * layout.width
    assert sum(plane["bytes"] for plane in facts["planes"].values()) == weights
    assert "left out     plane w16" in m2jax_command("info", store).out
    assert m2jax_command("verify", store).code == 0
    refused = m2jax_command("convert", source, tmp_path / "other", "--planes", "w16")
    assert refused.code == 2
    assert "want q4" in refused.error


def test_a_plan_takes_the_mix_that_the_planes_allow(m2jax_command, tmp_path):
    store = tmp_path / "store"
    convert(TINY, store, planes=("q4",))
    facts = m2jax_command("plan", store, "--json").facts
    with m2jax.load(store) as engine:
        assert facts["mix"] == format_mixes(engine.mixes) == "0/0/100"


def test_the_whole_store_names_no_plane_as_left_out(m2jax_command, whole):
    assert "left out" not in m2jax_command("info", whole).out


def test_a_disk_too_small_for_all_planes_may_hold_two(monkeypatch, source, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))

    def need(planes) -> int:
        with pytest.raises(DoesNotFit) as refused:
            convert(source, tmp_path / "store", planes=planes)
        found = re.search(r"needs ([\d,]+) more bytes", str(refused.value))
        assert found is not None
        return int(found[1].replace(",", ""))

    of_two, of_all = need(("q4", "r4")), need(("q4", "r4", "w16"))
    free = of_all - 1
    assert need(("q4", "r4", "w16")) == of_all > of_two
    free = of_two
    verify_store(convert(source, tmp_path / "store", planes=("q4", "r4")))


def test_a_store_smaller_than_the_one_it_replaces_needs_nothing(tmp_path, caplog):
    with caplog.at_level("INFO", "m2jax"):
        check_space(tmp_path / "store", [10], present=[10**6])
    assert "needs 0 bytes" in caplog.text


def test_only_w16_is_rounded_to_another_dtype(tmp_path):
    """A weight that float16 cannot hold is refused only where float16 must hold it."""
    source = small_checkpoint(tmp_path / "source", dtype="float32")
    name = "model.layers.1.mlp.up_proj.weight"
    put_weight(source / "model.safetensors", name, TOO_LARGE)
    with pytest.raises(ValueError, match=rf"{name}: holds weights too large"):
        convert(source, tmp_path / "whole", dtype="float16")
    half = convert(source, tmp_path / "half", dtype="float16", planes=["q4", "r4"])
    kept = convert(source, tmp_path / "kept", planes=["q4", "r4"])
    for store in map(verify_store, (half, kept)):
        assert store.layout.original_dtype == "float32"
        raw = json.loads((store.path / "manifest.json").read_bytes())
        assert raw["quantiser"]["of"] == "float32"
    assert (
        read_plane(open_store(half), 1, "q4") == read_plane(open_store(kept), 1, "q4")
    ).all()
    assert open_store(half).dense("embed")["embedding"].dtype == np.float16


def put_weight(path, name, value):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    path.write_bytes(data[:start] + np.float32(value).tobytes() + data[start + 4 :])


def test_a_layout_has_the_same_sizes_whatever_its_planes(small):
    config = config_from_json(
        json.loads((small / "manifest.json").read_bytes())["model"], where="model"
    )
    made = {
        make_layout(config, original_dtype="bfloat16", group_size=32, planes=planes)
        for planes in LEGAL
    }
    sizes = {
        (one.chunk_neurons, *(one.record_bytes(plane) for plane in PLANES))
        for one in made
    }
    assert (len(made), len(sizes)) == (4, 1)


def without(*planes):
    def edit(raw):
        for plane in planes:
            del raw["planes"][plane]

    return edit


def quantiser(**fields):
    return lambda raw: raw["quantiser"].update(fields)


def without_dtype(raw):
    del raw["quantiser"]["of"]


def with_w16(raw):
    q4 = raw["planes"]["q4"]
    raw["planes"]["w16"] = {**q4, "dtype": "float16", "record_bytes": 384}
    del raw["quantiser"]["of"]


def with_file(raw):
    raw["files"]["neurons/00/w16/zarr.json"] = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("store", "edit", "words"),
    [
        ("whole", without("q4"), "planes: want q4"),
        ("whole", without(*PLANES), "planes: want q4"),
        ("whole", without("r4"), "is no file of this model"),
        ("whole", without("w16"), "quantiser.of: want one of"),
        ("whole", quantiser(of="float16"), "quantiser: the model implies"),
        ("small", without("r4"), "is no file of this model"),
        ("small", without("q4"), "planes: want q4"),
        ("small", with_w16, "files: "),
        ("small", with_file, "neurons/00/w16/zarr.json' is no file of this model"),
        ("small", without_dtype, "quantiser.of: want one of"),
        ("small", quantiser(of="int8"), "quantiser.of: want one of"),
        ("small", quantiser(of=["float16"]), "quantiser.of: want one of"),
    ],
)
def test_a_manifest_whose_planes_disagree_is_refused(request, store, edit, words):
    path = request.getfixturevalue(store) / "manifest.json"
    raw = json.loads(path.read_bytes())
    assert bytes_to_manifest(signed(raw)) == bytes_to_manifest(path.read_bytes())
    edit(raw)
    with pytest.raises(StoreError) as caught:
        bytes_to_manifest(signed(raw))
    assert words in str(caught.value)
