"""`m2jax simulate`: a replay moves what the run moved."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import m2jax
from m2jax.bandwidths import Bandwidths, keep
from m2jax.cache.trace import Trace
from m2jax.predict import Moved, Passes, expect_accepted, expected_tokens
from m2jax.recording import record_generated
from m2jax.store import DirectChunks, open_store
from m2jax.store.calibration import write_json_part, write_part
from tests.budgets import Model, smallest
from tests.command_line import Commands

PROMPTS = ("-p", "Once upon a time", "-p", "def main():")
MIX = ("--mix", "25/25/50")
RATES = ("--ssd", "1GB/s", "--link", "4GB/s", "--memory", "50GB/s")
STEPS = 2 * 11

Simulate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def bundled(bundled_store: Path) -> Model:
    return Model(bundled_store, "25/25/50", "base")


@pytest.fixture
def recorded(m2jax_command: Commands, bundled_store: Path, tmp_path: Path) -> Path:
    out = tmp_path / "trace.npz"
    options = (*PROMPTS, "-n", "12", *MIX, "--temperature", "1", "--seed", "3")
    done = m2jax_command("trace", bundled_store, *options, "--out", out, "--json")
    assert done.code == 0
    facts = done.facts
    assert (facts["tokens"], facts["wanted_sets"]) == (STEPS, STEPS * 8 * 2)
    assert facts["bytes"] == out.stat().st_size
    return out


@pytest.fixture(scope="module")
def tiny_trace(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "tiny.npz"
    with m2jax.load(tiny_store, mix="25/25/50") as engine:
        record_generated(engine, [[1, 17, 5]], new_tokens=20).save(path)
    return path


@pytest.fixture
def tiny(m2jax_command: Commands, tiny_store: Path, tiny_trace: Path) -> Simulate:
    def run(*options: object) -> dict[str, Any]:
        command = ("simulate", tiny_store, tiny_trace, *MIX, *RATES, *options, "--json")
        done = m2jax_command(*command)
        assert done.code == 0, done.err
        return done.facts

    return run


@pytest.fixture(scope="module")
def hbm(tiny_store: Path) -> dict[str, str]:
    """Budgets of the tiny store: pools of fewer slots than neurons, and no slots."""
    model = Model(tiny_store, "25/25/50", "base")
    pools = model.with_pools().plan.hbm_budget_bytes
    return {"pools": f"{pools}B", "none": f"{model.smallest_hbm}B"}


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("held", ["pools", "some planes", "nothing"])
def test_a_replay_of_the_commands_loads_what_the_run_loaded(
    policy: str,
    held: str,
    bundled: Model,
    recorded: Path,
    m2jax_command: Commands,
):
    room = bundled.whole_hbm - bundled.smallest_hbm
    share = {"pools": 0.7, "some planes": 0.3, "nothing": 0}[held]
    hbm = bundled.smallest_hbm + int(share * room)
    command = ("simulate", bundled.store.path, recorded, *MIX, *RATES)
    facts = m2jax_command(*command, "--hbm", f"{hbm}B", "--json").facts
    (found,) = (row for row in facts["policies"] if row["policy"] == policy)
    engine = bundled.load(hbm=hbm, policy=policy)
    assert facts["tiers"]["hbm"]["need_bytes"] == engine.plan.footprint.hbm
    moved = 0
    for prompt in PROMPTS[1::2]:
        text = engine.generate(
            prompt, max_new_tokens=12, temperature=1, seed=3, ignore_eos=True
        )
        moved += text.stats.decode.hbm_load_bytes
    assert found["link_bytes"] == moved
    assert found["bytes_per_token"]["dram_to_hbm"] == moved / STEPS
    if held == "pools":
        directory = engine.runner.tiers._directory.values()
        assert len(directory) == 8 * 2
        assert found["loads"] == sum(pool.loads for pool in directory)
        assert found["hits"] == sum(pool.hits for pool in directory)


def test_a_replay_of_single_records_reads_what_a_run_reads(tiny, tiny_store: Path):
    chunks = DirectChunks(open_store(tiny_store))
    by = partial(
        *(m2jax.load, tiny_store),
        mix="25/25/50",
        reads="records",
        in_place=False,
        chunks=chunks,
    )
    hbm = smallest(lambda: by(hbm=1))
    dram = smallest(lambda: by(hbm=hbm, dram=1))
    budgets = ("--hbm", f"{hbm}B", "--dram", f"{dram}B")
    facts = tiny(*budgets, "--reads", "records")
    (row,) = (row for row in facts["policies"] if row["policy"] == "lru")
    with by(hbm=hbm, dram=dram) as engine:
        run = engine.generate([1, 17, 5], max_new_tokens=20, ignore_eos=True)
        slots = engine.plan.placement.dram_slots
    read = run.stats.decode.ssd_read_bytes / run.stats.decode_steps
    assert row["bytes_per_token"]["ssd_to_dram"] == read > 0
    assert facts["tiers"]["dram"]["slots"] == sum(map(sum, slots.values())) > 0
    assert facts["draft"]["kind"] == "none"


def test_no_policy_beats_belady_and_more_slots_beat_atu(tiny, hbm):
    facts = tiny("--hbm", hbm["pools"])
    loads = {row["policy"]: row["loads"] for row in facts["policies"]}
    assert list(loads) == ["atu", "lru", "lfu", "random", "belady"]
    assert loads["belady"] == min(loads.values())
    assert loads["lru"] < loads["atu"]
    for row in facts["policies"]:
        assert row["hit_ratio"] == row["hits"] / row["accesses"]
        assert row["hits"] + row["loads"] == row["accesses"]


def test_a_prediction_is_that_of_the_plan_where_nothing_hits(
    tiny, hbm, tiny_store: Path, m2jax_command: Commands
):
    facts = tiny("--hbm", hbm["none"])
    command = ("plan", tiny_store, *MIX, "--rates", "1GB,4GB,50GB")
    plan = m2jax_command(*command, "--hbm", hbm["none"], "--json").facts
    speeds = {row["tokens_per_s"] for row in facts["policies"]}
    assert speeds == {plan["draft"]["plain_tokens_per_s"]}
    assert facts["draft"] == plan["draft"]
    link = {row["bytes_per_token"]["dram_to_hbm"] for row in facts["policies"]}
    assert link == {plan["bytes_per_token"]["dram_to_hbm_at_most"]}


def test_tokens_a_second_follow_from_the_slowest_link(tiny, hbm):
    slow = ("--hbm", hbm["pools"], "--dram", "1GiB", "--link", "1MB/s")
    for row in tiny(*slow)["policies"]:
        assert row["bound"] == "link"
        rate = 1e6 / row["bytes_per_token"]["dram_to_hbm"]
        assert row["tokens_per_s"] == pytest.approx(rate)


def test_drafts_are_told_by_how_many_of_a_sweep_are_right(tiny, hbm):
    facts = tiny("--hbm", hbm["pools"], "--draft", "base", "--accepted", "6.5")
    (found,) = facts["draft"]["expected"]
    assert found["drafted"] == 7
    assert found["tokens_per_sweep"] == pytest.approx(7.5)
    lru = next(row for row in facts["policies"] if row["policy"] == "lru")
    assert facts["draft"]["plain_tokens_per_s"] == lru["tokens_per_s"]


@pytest.mark.parametrize("accepted", [0, 1, 2.9, 3, 14.4, 62.5, 63])
@pytest.mark.parametrize("drafted", [None, 63])
def test_an_acceptance_gives_back_the_tokens_it_follows_from(
    accepted: float, drafted: float | None
):
    moved = Moved(100, 100, 100)
    passes = Passes(plain=moved, sweep=moved, draft=moved)
    found = expect_accepted(passes, accepted, drafted, rates=None)
    most = int(found.drafted)
    assert expected_tokens(found.acceptance, most) == pytest.approx(accepted + 1)
    assert found.tokens_per_sweep == accepted + 1
    assert most >= accepted


def test_a_sweep_costs_the_steps_that_were_drafted(tiny, hbm):
    rates = ("--ssd", "1TB/s", "--link", "1TB/s", "--memory", "1MB/s")
    command = ("--hbm", hbm["pools"], "--draft", "base", "--accepted", "6", *rates)
    speeds = [
        tiny(*command, "--drafted", count)["draft"]["expected"][0]["tokens_per_s"]
        for count in ("6.5", "13", "19.5")
    ]
    first, second, third = (1 / speed for speed in speeds)
    assert third - second == pytest.approx(second - first)
    assert second > first


def test_rates_are_those_that_doctor_kept_unless_given(
    tiny_store: Path,
    tiny_trace: Path,
    m2jax_command: Commands,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    way = {"bytes": 4096, "in_flight": 1, "direct": True, "bytes_per_s": 7e8}
    keep(tiny_store, Bandwidths(3e10, {"1": 5e9, "2": 6e9}, [way]))
    command = ("simulate", tiny_store, tiny_trace, *MIX, "--link", "9GB/s")
    assert m2jax_command(*command, "--json").facts["rates"] == {
        "ssd": {"bytes_per_s": 7e8, "from": "measured here before"},
        "link": {"bytes_per_s": 9e9, "from": "given"},
        "memory": {"bytes_per_s": 3e10, "from": "measured here before"},
    }
    shown = m2jax_command(*command).out
    for word in ("668 MiB/s, measured here before", "8.38 GiB/s, given", "| belady |"):
        assert word in shown, word


def test_without_kept_rates_the_machine_is_measured(
    tiny_store: Path,
    tiny_trace: Path,
    m2jax_command: Commands,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = Bandwidths(2e10, {"1": 5e9}, [])
    monkeypatch.setattr("m2jax.bandwidths.measure", lambda folder: found)
    command = ("simulate", tiny_store, tiny_trace, *MIX)
    rates = m2jax_command(*command, "--ssd", "1GB/s", "--json").facts["rates"]
    assert rates["link"] == {"bytes_per_s": 5e9, "from": "measured now"}
    # Nothing could be told of the disk.
    assert "give --ssd" in m2jax_command(*command).error


def test_without_a_file_the_trace_of_calibrate_and_its_mix_are_taken(
    tiny_store: Path, tiny_trace: Path, m2jax_command: Commands, tmp_path: Path
):
    folder = tmp_path / "store"
    shutil.copytree(tiny_store, folder)
    bare = ("simulate", folder, *RATES)
    assert "has no trace" in m2jax_command(*bare).error
    store = open_store(folder)
    write_part(store, "trace", lambda to: shutil.copy(tiny_trace, to / "trace.npz"))
    write_json_part(store, "report", {"mix": "25/25/50"})
    facts = m2jax_command(*bare, "--json").facts
    assert (facts["mix"], facts["trace"]["tokens"]) == ("25/25/50", 19)
    assert facts["trace"]["path"].startswith(str(folder))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--mix", "0/100/0"), "wants whole planes only"),
        (("--mix", "0/25/75"), "give the --mix"),
        (("--mix", "25/24/51"), "22 records, the mix wants 21"),
        (("--ssd", "3"), "--ssd '3'"),
        (("--draft", "magic"), "--draft magic"),
        (("--accepted", "64", "--draft", "base"), "want 0 to 63"),
        (("--accepted", "4", "--draft", "none"), "nothing drafts"),
        (("--drafted", "4", "--draft", "base"), "want --accepted"),
        (("--accepted", "4", "--drafted", "3", "--draft", "base"), "want 4 "),
        (("--accepted", "4", "--drafted", "nan", "--draft", "base"), "want 4 "),
        (("--hbm", "1KiB"), "the smallest that works is"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_one_line(
    options: tuple[str, ...],
    told: str,
    tiny_store: Path,
    tiny_trace: Path,
    m2jax_command: Commands,
):
    mix = () if "--mix" in options else MIX
    done = m2jax_command("simulate", tiny_store, tiny_trace, *RATES, *options, *mix)
    assert done.code in (2, 3)
    assert told in done.error


def test_a_trace_of_other_steps_or_none_is_refused(
    tiny_store: Path, tiny_trace: Path, m2jax_command: Commands, tmp_path: Path
):
    entries = Trace.load(tiny_trace).entries()
    path = tmp_path / "cut.npz"
    for kept, told in (
        (entries[:-1], "and 19 of others"),
        ([], "0 sets of layer 0"),
        ([e for e in entries if e.plane != "r4"], "0 sets of layer 0, plane r4"),
    ):
        cut = Trace()
        for entry in kept:
            cut.record(*entry)
        cut.save(path)
        done = m2jax_command("simulate", tiny_store, path, *MIX, *RATES)
        assert done.code == 2
        assert told in done.error
    path.write_bytes(b"no trace")
    assert "not a trace" in m2jax_command("simulate", tiny_store, path, *MIX).error
    for wrong in (tmp_path, tmp_path / "absent"):
        done = m2jax_command("simulate", tiny_store, wrong, *MIX, *RATES)
        assert done.code == 2
