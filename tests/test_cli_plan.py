"""`m2jax plan`: from a store, a checkpoint's folder or a config.json alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import m2jax
from m2jax.bundled import SOURCE
from tests.command_line import Commands
from tests.small_checkpoints import make_config

BUDGETS = ("--hbm", "20MiB", "--dram", "10MiB")
LLAMA_70B = make_config(
    hidden=8192,
    ffn=28672,
    layers=80,
    heads=64,
    kv_heads=8,
    vocab=128256,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def config_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("70b") / "config.json"
    path.write_text(json.dumps(LLAMA_70B))
    return path


def edited(folder: Path, **fields: Any) -> Path:
    """The bundled model's config.json with other fields."""
    raw = json.loads((SOURCE / "config.json").read_text())
    path = folder / "config.json"
    path.write_text(json.dumps(raw | fields))
    return path


def test_the_plan_is_that_of_the_engine(m2jax_command: Commands, bundled_store: Path):
    facts = m2jax_command("plan", bundled_store, *BUDGETS, "--json").facts
    with m2jax.load(bundled_store, hbm="20MiB", dram="10MiB") as engine:
        plan = engine.plan
    foot = plan.footprint
    hbm, dram = facts["tiers"]["hbm"], facts["tiers"]["dram"]
    assert facts["fits"] is True
    assert facts["context"] == plan.context
    assert hbm == {
        "budget_bytes": plan.hbm_budget_bytes,
        "need_bytes": foot.hbm,
        "dense_bytes": foot.dense,
        "kv_bytes": foot.kv,
        "record_bytes": foot.records,
        "staging_bytes": foot.staging,
    }
    assert (dram["fixed_bytes"], dram["ring_bytes"]) == (
        foot.dram_fixed,
        foot.dram_ring,
    )
    assert facts["bytes_per_token"] == {
        "ssd_to_dram": plan.ssd_bytes_per_token,
        "dram_to_hbm_at_most": plan.link_bytes_per_token,
    }
    files = (path for path in bundled_store.rglob("*") if path.is_file())
    stored = sum(path.stat().st_size for path in files if path.name != "manifest.json")
    assert facts["tiers"]["ssd"]["store_bytes"] == stored


def test_a_config_alone_plans_as_the_store_does(
    m2jax_command: Commands, bundled_store: Path, tmp_path: Path
):
    shutil.copy(SOURCE / "config.json", tmp_path)
    of_store = m2jax_command("plan", bundled_store, "--json").facts
    for model in (tmp_path, tmp_path / "config.json"):
        found = m2jax_command("plan", model, "--json").facts
        assert found["bytes_per_token"] == of_store["bytes_per_token"]
        assert found["slots"] == of_store["slots"]
        for part in ("kv_bytes", "record_bytes", "staging_bytes"):
            assert found["tiers"]["hbm"][part] == of_store["tiers"]["hbm"][part]
        for tier, part in (("hbm", "dense_bytes"), ("ssd", "store_bytes")):
            guessed, stored = found["tiers"][tier][part], of_store["tiers"][tier][part]
            # A store also holds metadata and the tokenizer.
            assert guessed <= stored < 1.05 * guessed + (1 << 20)


def test_a_plan_that_does_not_fit_is_an_object_and_exit_code_3(
    m2jax_command: Commands, bundled_store: Path
):
    done = m2jax_command("plan", bundled_store, "--hbm", "1MiB", "--json")
    assert done.code == 3
    facts = done.facts
    assert facts["fits"] is False
    assert facts["error"]["type"] == "DoesNotFit"
    assert facts["error"]["message"] == done.error
    assert "the smallest that works is" in done.error
    assert facts["tiers"]["hbm"]["budget_bytes"] == 1 << 20


def test_a_plan_of_single_records_is_that_of_the_engine(
    m2jax_command: Commands, bundled_store: Path
):
    budgets = ("--hbm", "19MB", "--dram", "1.2MB", "--reads", "records")
    facts = m2jax_command("plan", bundled_store, *budgets, "--json").facts
    with m2jax.load(bundled_store, hbm="19MB", dram="1.2MB", reads="records") as engine:
        plan = engine.plan
    dram, slots = facts["tiers"]["dram"], plan.placement.dram_slots
    assert dram["record_bytes"] == plan.footprint.dram_records > 0
    assert dram["slots"] == sum(slots["r4"]) > 0
    assert dram["need_bytes"] == plan.footprint.dram
    assert facts["bytes_per_token"]["ssd_to_dram"] == plan.ssd_bytes_per_token
    assert facts["draft"]["kind"] == "none"
    shown = m2jax_command("plan", bundled_store, *budgets).out
    assert f"{sum(slots['r4']):,} slots" in shown
    assert "at most" in next(line for line in shown.splitlines() if "SSD to" in line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reads", "chunks"), "--reads 'chunks': want layers or records"),
        (("--reads", "records", "--draft", "base"), "want --draft none, or --reads"),
    ],
)
def test_a_way_to_read_that_cannot_be_is_refused(
    m2jax_command: Commands, bundled_store: Path, options, message
):
    done = m2jax_command("plan", bundled_store, *options)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize("device", [(), ("--emulate-hbm",)])
@pytest.mark.parametrize("draft", ["auto", "base", "none"])
@pytest.mark.parametrize("mix", ["0/25/75", "100/0/0", "25/25/25"])
def test_the_smallest_budget_that_is_named_fits(
    m2jax_command: Commands, bundled_store: Path, mix: str, draft: str, device: tuple
):
    asked = ("plan", bundled_store, "--mix", mix, "--draft", draft, *device)
    error = m2jax_command(*asked, "--hbm", "1KiB").error
    smallest = int(re.search(r"smallest that works is .* \((\d+) bytes", error)[1])
    done = m2jax_command(*asked, "--hbm", f"{smallest}B", "--json")
    assert done.code == 0
    assert done.facts["fits"]
    if draft == "base":
        assert done.facts["draft"]["kind"] == "base"
        assert done.facts["slots"]["q4"]["least_per_layer"] >= 704
    assert m2jax_command(*asked, "--hbm", f"{smallest - 1}B").code == 3


def test_a_plan_says_for_which_device_it_is(
    m2jax_command: Commands, bundled_store: Path
):
    """On a CPU nothing crosses a link."""
    asked = ("plan", bundled_store, "--hbm", "20MiB", "--mix", "25/25/50", "--json")
    here, there = (
        m2jax_command(*asked, *device).facts for device in ((), ("--emulate-hbm",))
    )
    assert (here["device"], there["device"]) == ("cpu", "accelerator")
    moved = [plan["bytes_per_token"]["dram_to_hbm_at_most"] for plan in (here, there)]
    assert moved[0] == 0 < moved[1]
    assert there["tiers"]["hbm"]["staging_bytes"] > 0


def test_a_70b_model_is_planned_without_weights_for_another_machine(
    m2jax_command: Commands, config_70b: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("m2jax.planning.free_dram_bytes", lambda: 1 << 30)
    done = m2jax_command("plan", config_70b, "--hbm", "64GiB", "--dram", "96GiB")
    assert done.code == 0
    for word in ("dense part", "KV cache", "records", "fixed area", "ring", "a token"):
        assert word in done.out, word
    assert "not on this machine" in done.out


def test_a_larger_context_takes_more_of_the_kv_cache(
    m2jax_command: Commands, bundled_store: Path
):
    sizes = [
        m2jax_command("plan", bundled_store, "--context", tokens, "--json").facts[
            "tiers"
        ]["hbm"]["kv_bytes"]
        for tokens in (256, 1024)
    ]
    assert 0 < sizes[0] < sizes[1]


def test_a_mix_of_one_class_needs_that_plane_alone(
    m2jax_command: Commands, bundled_store: Path
):
    facts = m2jax_command("plan", bundled_store, "--mix", "100/0/0", "--json").facts
    assert list(facts["slots"]) == ["w16"]
    assert facts["resident"] is True


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ({"torch_dtype": 7}, "torch_dtype"),
    ],
)
def test_a_config_that_is_refused_names_file_and_field(
    m2jax_command: Commands, tmp_path: Path, fields: dict[str, Any], told: str
):
    path = edited(tmp_path, **fields)
    done = m2jax_command("plan", path)
    assert done.code == 2
    assert done.error.startswith(f"{path}: {told}")


def test_a_config_without_a_dtype_is_planned_as_float32_and_says_so(
    m2jax_command: Commands, tmp_path: Path
):
    path = edited(tmp_path, torch_dtype=None)
    facts = m2jax_command("plan", path, "--json").facts
    assert facts["model"]["original_dtype"] == "float32"
    assert any("float32" in note for note in facts["notes"])


def test_neither_store_nor_checkpoint_is_wrong_input(
    m2jax_command: Commands, tmp_path: Path
):
    (tmp_path / "notes.txt").write_text("no model")
    for model in (tmp_path, tmp_path / "notes.txt"):
        assert m2jax_command("plan", model).code == 2
