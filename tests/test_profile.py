"""Where time goes, what the machine could do, and how near a run came to it."""

import json
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest

import m2jax
from m2jax import bandwidths
from m2jax.bandwidths import Bandwidths
from m2jax.bench import run_bench
from m2jax.roofline import roofline
from m2jax.step_bytes import step_bytes
from m2jax.timeline import Event, Timeline
from tests.drafting import budgets, load

MACHINE = Bandwidths(
    memory=1e9,
    link={"1048576": 5e8, "67108864": 4e8},
    ssd=[
        {"bytes": 1, "in_flight": 1, "direct": True, "bytes_per_s": 1e8},
        {"bytes": 1, "in_flight": 8, "direct": True, "bytes_per_s": 2e8},
    ],
)


@pytest.fixture(scope="module")
def streaming(tiny_store: Path):
    """Planes r4 and w16 pass through DRAM at every step."""
    with m2jax.load(tiny_store, mix="25/25/50") as whole:
        foot = whole.plan.footprint
    hbm = foot.hbm - foot.records // 4
    with m2jax.load(
        tiny_store,
        mix="25/25/50",
        hbm=hbm,
        dram=2**16,
        context=64,
        draft="none",
        in_place=False,
    ) as engine:
        assert engine.plan.ssd_bytes_per_token > 0
        yield engine


def test_time_within_an_event_is_counted_once():
    timeline = Timeline()
    # In the order of their ends, as they are noted.
    timeline.events = [
        Event("inner", 2.0, 5.0, "main", {}),
        Event("inner", 6.0, 7.0, "main", {}),
        Event("outer", 1.0, 8.0, "main", {}),
        Event("inner", 9.0, 9.5, "main", {}),
    ]
    assert timeline.seconds("main") == {"inner": 4.5, "outer": 3.0}


def test_events_are_noted_as_they_end_with_their_thread():
    timeline = Timeline()
    with timeline.span("outer", layer=1), timeline.span("inner"):
        pass
    inner, outer = timeline.events
    assert (inner.name, outer.name, outer.about) == ("inner", "outer", {"layer": 1})
    assert 0 <= outer.start_s <= inner.start_s <= inner.end_s <= outer.end_s
    assert outer.thread == threading.current_thread().name


def test_events_of_other_threads_are_their_own():
    timeline = Timeline()
    timeline.events = [
        Event("read", 0.0, 5.0, "reader", {}),
        Event("wait", 1.0, 2.0, "main", {}),
    ]
    assert timeline.seconds("main") == {"wait": 1.0}


def test_a_trace_is_what_perfetto_opens(tmp_path):
    timeline = Timeline()
    timeline.events = [Event("read", 0.5, 0.75, "reader", {"layer": 3})]
    timeline.write(tmp_path / "trace.json")
    named, event = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (named["ph"], named["args"]) == ("M", {"name": "reader"})
    assert event == {
        "ph": "X",
        "name": "read",
        "pid": 0,
        "tid": named["tid"],
        "ts": 5e5,
        "dur": 2.5e5,
        "args": {"layer": 3},
    }


def test_a_profile_shows_reads_waits_transfers_and_compute(streaming, tmp_path):
    timeline = Timeline()
    report = run_bench(
        streaming, prompt_tokens=(), new_tokens=(6,), repeats=1, timeline=timeline
    )
    timeline.write(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in trace if event["ph"] == "X"}
    assert {"SSD read", "wait for SSD", "transfer", "compute"} <= names
    (tg,) = report["results"]
    spent = tg["milliseconds_per_token"]
    # Reads are the SSD threads'; the main thread waits for them.
    assert "SSD read" not in spent
    assert {"wait for SSD", "transfer", "compute", "host"} <= set(spent)
    assert min(spent.values()) >= 0
    # Nothing is noted when no one asks.
    assert streaming.runner.tiers.timeline is None


@pytest.mark.parametrize("kind", ["base", "another model"])
def test_drafts_and_their_verification_are_events_and_count_as_compute(
    tiny_store, kind
):
    options = {"draft": str(tiny_store)}
    if kind == "base":
        options = {"draft": "base", **budgets(tiny_store, "25/25/50")}
    timeline = Timeline()
    with load(tiny_store, draft_tokens=3, **options) as engine:
        report = run_bench(
            engine, prompt_tokens=(), new_tokens=(24,), repeats=1, timeline=timeline
        )
    (tg,) = report["results"]
    main = threading.current_thread().name
    own = [event for event in timeline.events if event.name in ("draft", "verify")]
    # The profiled run is one more of the same text.
    sweeps = tg["drafts"]["sweeps"]
    assert [event.name for event in own] == ["draft", "verify"] * sweeps
    assert {event.thread for event in own} == {main}
    spent = tg["milliseconds_per_token"]
    assert not {"draft", "verify"} & set(spent)
    drafting_ms = 1e3 * sum(event.end_s - event.start_s for event in own)
    assert spent["compute"] * 25 > drafting_ms
    # Other threads work meanwhile: of the main one's time nothing counts twice.
    assert min(spent.values()) >= 0


def test_waiting_for_a_layer_that_another_thread_stages_is_not_the_hosts_time(
    streaming,
):
    tiers, timeline, staged = streaming.runner.tiers, Timeline(), Future()
    layer = tiers.placement.dram_layers[0]
    tiers._ahead[layer] = staged
    tiers.profile(timeline)
    Timer(0.05, staged.set_result, ({},)).start()
    assert tiers.whole_planes(layer) == {}
    tiers.profile(None)
    spent = timeline.seconds(threading.current_thread().name)
    assert set(spent) <= {"transfer", "wait for SSD"}
    assert sum(spent.values()) > 0.04


def test_what_the_disk_gives_beside_the_runs_counts(streaming):
    measured = iter([1e6, 2e6, 3e6, 1e6, 2e6, 6e6])
    report = run_bench(
        streaming,
        prompt_tokens=(6,),
        new_tokens=(6,),
        repeats=2,
        machine=MACHINE,
        ssd_rate=lambda: next(measured),
    )
    pp, tg = report["results"]
    assert pp["ssd_bytes_per_s_mean"] == 2e6
    assert pp["roofline"]["bytes_per_s"]["ssd"] == 2e6
    assert tg["ssd_bytes_per_s_mean"] == 3e6
    assert tg["roofline"]["bytes_per_s"]["ssd"] == 3e6
    assert list(measured) == []


@pytest.mark.parametrize(
    ("ssd_bytes", "link_bytes", "bound", "seconds"),
    [
        (1e6, 0.0, "ssd", 1e6 / 2e8),
        # The copy and the reads of memory share it: their times add up.
        (0.0, 1e6, "memory", 1e6 / 5e8),
    ],
)
def test_the_slowest_link_bounds_a_token(
    streaming, ssd_bytes, link_bytes, bound, seconds
):
    own = step_bytes(streaming.runner, streaming.specs, 40)
    if bound == "memory":
        seconds += own / 1e9
    found = roofline(
        streaming,
        MACHINE,
        passes=1.0,
        drafted=0.0,
        ssd_bytes=ssd_bytes,
        link_bytes=link_bytes,
        positions=40,
        tokens_per_s=0.5 / seconds,
    )
    assert found["bound"] == bound
    assert found["percent"] == pytest.approx(50)
    assert found["bytes_per_token"]["memory"] == own


def test_without_a_disk_rate_the_disk_bounds_nothing(streaming):
    blind = replace(MACHINE, ssd=[])
    found = roofline(
        streaming,
        blind,
        passes=1.0,
        drafted=0.0,
        ssd_bytes=1e9,
        link_bytes=0.0,
        positions=1,
        tokens_per_s=1.0,
    )
    assert found["bound"] == "memory"
    assert found["least_s"]["ssd"] is None


def test_bytes_of_a_token_are_those_of_its_classes(tiny_store):
    read = {}
    for mix in ("100/0/0", "0/100/0", "0/0/100"):
        with m2jax.load(tiny_store, mix=mix, context=64) as engine:
            read[mix], eleven = (
                step_bytes(engine.runner, engine.specs, seen) for seen in (1, 11)
            )
            more = eleven - read[mix]
            config, records = engine.config, engine.runner.tiers.record_bytes
    # Ten positions' keys and values, float32.
    assert more == 10 * config.num_layers * 2 * config.num_kv_heads * (
        config.head_dim * 4
    )
    neurons = config.num_layers * config.intermediate_size
    assert read["0/100/0"] - read["0/0/100"] == neurons * records["q4"]
    assert read["100/0/0"] > read["0/100/0"]


def test_what_was_measured_is_kept_for_this_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = []

    def measure(folder: Path) -> Bandwidths:
        measured.append(folder)
        return MACHINE

    monkeypatch.setattr(bandwidths, "measure", measure)
    assert bandwidths.kept(tmp_path) == MACHINE
    assert bandwidths.kept(tmp_path) == MACHINE
    assert len(measured) == 1
    file = tmp_path / "cache" / "m2jax" / bandwidths.FILE
    whole = file.read_text()
    damages = ("", "[]", '{"version": 1}', whole[:-9], whole.replace("memory", "m"))
    for damage in damages:
        file.write_text(damage)
        assert bandwidths.kept(tmp_path) == MACHINE
    assert len(measured) == 1 + len(damages)


def test_this_machine_has_rates(tmp_path):
    found = bandwidths.measure(tmp_path)
    assert found.memory > 1e8
    assert found.best_link > 1e7
    assert found.best_ssd is None or found.best_ssd > 1e6
    assert {way["in_flight"] for way in found.ssd} <= {1, 8}
