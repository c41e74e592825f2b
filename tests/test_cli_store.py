"""`m2jax convert`, `info` and `verify`."""

import logging
import shutil
import sys
from pathlib import Path

import pytest

from m2jax.bundled import SOURCE
from m2jax.store import open_store, store_info
from tests.command_line import Commands, flip_bit
from tests.small_checkpoints import small_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "source")


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_convert_makes_a_store_and_tells_its_size(
    m2jax_command: Commands, source: Path, tmp_path: Path
):
    done = m2jax_command("convert", source, tmp_path / "store", "--json")
    assert done.code == 0
    listed = open_store(tmp_path / "store").files
    assert done.facts["store"] == str(tmp_path / "store")
    assert done.facts["files"] == len(listed)
    assert done.facts["bytes"] == sum(entry.bytes for entry in listed.values())


def test_convert_says_what_it_needs_before_it_begins(
    m2jax_command: Commands, source: Path, tmp_path: Path
):
    done = m2jax_command("convert", source, tmp_path / "store")
    assert "needs " in done.err.splitlines()[0]
    assert "bytes, " in done.err.splitlines()[0]
    assert logging.getLogger("m2jax").handlers == []


def test_the_options_of_convert_reach_the_store(
    m2jax_command: Commands, source: Path, tmp_path: Path
):
    store = tmp_path / "store"
    options = ("--group-size", "16", "--dtype", "float32")
    assert m2jax_command("convert", source, store, *options).code == 0
    layout = open_store(store).layout
    assert (layout.group, layout.original_dtype) == (16, "float32")
    refused = m2jax_command("convert", source, store)
    assert refused.code == 2
    assert "--overwrite" in refused.error
    assert m2jax_command("convert", source, store, "--overwrite").code == 0
    assert open_store(store).layout.original_dtype == "float16"


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--dtype", "int8"], "dtype 'int8'"), (["--group-size", "7"], "group size 7")],
)
def test_a_refused_option_of_convert_writes_nothing(
    m2jax_command: Commands,
    source: Path,
    tmp_path: Path,
    options: list[str],
    told: str,
):
    done = m2jax_command("convert", source, tmp_path / "store", *options)
    assert done.code == 2
    assert told in done.error
    assert not (tmp_path / "store").exists()


def test_a_warning_of_the_converter_is_one_line_on_stderr(
    m2jax_command: Commands, tmp_path: Path
):
    shutil.copytree(SOURCE, tmp_path / "source", ignore=shutil.ignore_patterns("tok*"))
    config = (tmp_path / "source" / "config.json").read_text()
    # One layer fewer leaves the tensors of the last one without use.
    config = config.replace('"num_hidden_layers": 8', '"num_hidden_layers": 7')
    (tmp_path / "source" / "config.json").write_text(config)
    done = m2jax_command("convert", tmp_path / "source", tmp_path / "store", "--json")
    assert done.code == 0
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "model.layers.7" in warnings[0]


def test_a_hub_id_is_read_from_the_hubs_cache(
    m2jax_command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    constants = pytest.importorskip("huggingface_hub.constants")
    # As the library lays it out, so that it finds the model without a network.
    model = tmp_path / "hub" / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    small_checkpoint(model / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert m2jax_command("convert", "some/model", "store").code == 0
    assert open_store("store").config.hidden_size == 64
    absent = m2jax_command("convert", "no/model", "other")
    assert absent.code == 5
    assert "no/model: no such folder, and the download" in absent.error


def test_a_hub_id_without_the_library_tells_what_to_install(
    m2jax_command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # None in this table is how Python itself marks a module as not to be had.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    done = m2jax_command("convert", "some/model", "store")
    assert done.code == 2
    assert "pip install -e '.[hub]'" in done.error


@pytest.mark.parametrize("name", ["nosuch", "./some/model", "a/b/c", "/some/model"])
def test_a_missing_folder_that_is_no_hub_id_is_not_looked_for_there(
    m2jax_command: Commands,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    done = m2jax_command("convert", name, "store")
    assert done.code == 2
    assert "no such folder; want a Hugging Face checkpoint" in done.error


def test_info_is_what_the_library_says_of_the_store(
    m2jax_command: Commands, bundled_store: Path
):
    facts = m2jax_command("info", bundled_store, "--json").facts
    assert facts == store_info(bundled_store)
    text = m2jax_command("info", bundled_store).out
    for word in ("llama", "8192 tokens", "plane q4", "plane w16", "tokenizer.json"):
        assert word in text, word


def test_verify_reads_a_whole_store_and_changes_nothing(
    m2jax_command: Commands, bundled_store: Path
):
    before = files(bundled_store)
    done = m2jax_command("verify", bundled_store, "--json")
    assert done.code == 0
    assert done.facts["ok"] is True
    # All but the manifest itself.
    assert done.facts["files"] == len(before) - 1
    assert files(bundled_store) == before


@pytest.mark.parametrize("plane", ["q4", "r4", "w16"])
def test_a_flipped_bit_is_exit_code_4_and_names_the_chunk(
    m2jax_command: Commands, source: Path, tmp_path: Path, plane: str
):
    store = tmp_path / "store"
    assert m2jax_command("convert", source, store).code == 0
    chunk = f"neurons/01/{plane}/c/0/0"
    flip_bit(store / chunk)
    done = m2jax_command("verify", store, "--json")
    assert done.code == 4
    assert done.facts["error"]["type"] == "StoreError"
    assert chunk in done.error
    # Its size is right, so that opening does not see it.
    assert m2jax_command("info", store).code == 0


def test_a_store_without_its_manifest_is_exit_code_4(
    m2jax_command: Commands, source: Path, tmp_path: Path
):
    store = tmp_path / "store"
    assert m2jax_command("convert", source, store).code == 0
    (store / "manifest.json").unlink()
    for command in ("info", "verify", "plan"):
        done = m2jax_command(command, store)
        assert done.code == 4
        assert "manifest.json is missing" in done.error
