"""Where time goes, what the machine could do, and how near a run came to it."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import m2jax
from m2jax import bandwidths
from m2jax.bandwidths import Bandwidths
from m2jax.bench import run_bench
from m2jax.roofline import device_bytes_per_token, roofline
from m2jax.timeline import Event, Timeline

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
        tiny_store, mix="25/25/50", hbm=hbm, dram=2**16, context=64, draft="none"
    ) as engine:
        assert engine.plan.ssd_bytes_per_token > 0
        yield engine


def test_time_within_an_event_is_counted_once():
    timeline = Timeline()
    with timeline.span("outer"):
        time.sleep(0.02)
        with timeline.span("inner"):
            time.sleep(0.03)
        with timeline.span("inner"):
            time.sleep(0.01)
    spent = timeline.seconds(threading.current_thread().name)
    assert spent["inner"] == pytest.approx(0.04, abs=0.02)
    assert spent["outer"] == pytest.approx(0.02, abs=0.02)
    whole = next(event for event in timeline.events if event.name == "outer")
    assert sum(spent.values()) == pytest.approx(whole.end_s - whole.start_s)


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
    report = run_bench(
        streaming,
        prompt_tokens=(),
        new_tokens=(6,),
        repeats=1,
        profile=tmp_path / "trace.json",
    )
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
    own = device_bytes_per_token(streaming)
    if bound == "memory":
        seconds += own / 1e9
    found = roofline(
        streaming,
        MACHINE,
        ssd_bytes=ssd_bytes,
        link_bytes=link_bytes,
        tokens_per_s=0.5 / seconds,
    )
    assert found["bound"] == bound
    assert found["percent"] == pytest.approx(50)
    assert found["bytes_per_token"]["memory"] == own


def test_without_a_disk_rate_the_disk_bounds_nothing(streaming):
    blind = replace(MACHINE, ssd=[])
    found = roofline(streaming, blind, ssd_bytes=1e9, link_bytes=0.0, tokens_per_s=1.0)
    assert found["bound"] == "memory"
    assert found["least_s"]["ssd"] is None


def test_bytes_of_a_token_are_those_of_its_classes(tiny_store):
    read = {}
    for mix in ("100/0/0", "0/100/0", "0/0/100"):
        with m2jax.load(tiny_store, mix=mix, context=64) as engine:
            read[mix] = device_bytes_per_token(engine)
            layout, layers = engine.config, engine.config.num_layers
            records = engine.runner.tiers.record_bytes
    assert layout.intermediate_size
    neurons = layers * layout.intermediate_size
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
    for damage in ("", "[]", '{"version": 0}', file.read_text()[:-9]):
        file.write_text(damage)
        assert bandwidths.kept(tmp_path) == MACHINE
    assert len(measured) == 5


def test_this_machine_has_rates(tmp_path):
    found = bandwidths.measure(tmp_path)
    assert found.memory > 1e8
    assert found.best_link > 1e7
    assert found.best_ssd is None or found.best_ssd > 1e6
    assert {way["in_flight"] for way in found.ssd} <= {1, 8}
