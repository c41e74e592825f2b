"""The bench's figures against the generations they come from, and its refusals."""

import json
import statistics
from pathlib import Path

import jax
import pytest

import m2jax
from m2jax.bench import START_TOKENS, plain_ids, run_bench
from m2jax.cli.bench import _read_plane
from m2jax.engine import Engine
from m2jax.memory import memory_bytes, memory_limit_bytes
from m2jax.stream import Generation

LAYERS, NEURONS, CONTEXT = 3, 88, 128
MIX = "25/0/0"


def load(store: Path, *, mix: str, **budgets: int) -> Engine:
    return m2jax.load(
        store, mix=mix, context=CONTEXT, draft="none", in_place=False, **budgets
    )


@pytest.fixture(scope="module")
def engine(tiny_store: Path) -> Engine:
    """Slots for some neurons in HBM, one layer in DRAM: reads SSD at every step."""
    with load(tiny_store, mix=MIX) as resident:
        whole = resident.plan.footprint
    layer_bytes = whole.records // LAYERS
    engine = load(
        tiny_store, mix=MIX, hbm=whole.hbm - layer_bytes // 3, dram=layer_bytes
    )
    assert engine.plan.ssd_bytes_per_token > 0
    return engine


def test_the_ssd_is_judged_by_chunks_as_large_as_those_that_are_read(
    engine, tiny_store
):
    assert _read_plane(engine) == "w16"
    with load(tiny_store, mix="0/25/75", hbm=engine.plan.footprint.hbm) as resident:
        assert not resident.plan.ssd_bytes_per_token
    whole = resident.plan.footprint
    small = {"hbm": whole.hbm - whole.records // 4, "dram": 2**16}
    with load(tiny_store, mix="0/25/75", **small) as streamed:
        assert _read_plane(streamed) == "r4"


class Recorded:
    """Every generation of an engine while a bench runs, with what was asked."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[dict] = []
        self.done: list[Generation] = []
        generate = engine.generate

        def recording(prompt, **options):
            self.asked.append({"prompt": list(prompt), **options})
            self.done.append(generate(prompt, **options))
            return self.done[-1]

        monkeypatch.setattr(engine, "generate", recording)


def test_figures_are_those_of_the_generations_after_the_warm_up(engine, monkeypatch):
    runs = Recorded(engine, monkeypatch)
    report = run_bench(engine, prompt_tokens=(12,), new_tokens=(9,), repeats=3)
    # Of each test a warm-up, three that count, and one that is profiled.
    assert len(runs.done) == 10
    pp = [12 / run.stats.timings.ttft_s for run in runs.done[1:4]]
    tg = [1 / run.stats.timings.tpot_s for run in runs.done[6:9]]
    assert [result["test"] for result in report["results"]] == ["pp12", "tg9"]
    for result, samples in zip(report["results"], (pp, tg), strict=True):
        assert result["samples_tokens_per_s"] == pytest.approx(samples)
        assert result["tokens_per_s_mean"] == pytest.approx(statistics.mean(samples))
        assert result["tokens_per_s_sd"] == pytest.approx(statistics.stdev(samples))
        assert result["repeats"] == 3
        assert result["compile_s"] >= 0


def test_a_run_in_which_xla_compiled_is_made_again(engine, monkeypatch):
    runs, lines = Recorded(engine, monkeypatch), []
    recorded = engine.generate

    def forgetful(*given, **options):
        if len(runs.done) == 2:
            jax.clear_caches()
        return recorded(*given, **options)

    monkeypatch.setattr(engine, "generate", forgetful)
    options = {"prompt_tokens": (), "new_tokens": (9,), "repeats": 2}
    report = run_bench(engine, **options, progress=lines.append)
    assert [run.stats.timings.compile_s > 0 for run in runs.done[2:]] == [
        True,
        False,
        False,
    ]
    counted = [1 / runs.done[i].stats.timings.tpot_s for i in (1, 3)]
    (result,) = report["results"]
    assert result["samples_tokens_per_s"] == pytest.approx(counted)
    assert lines[2] == "tg9: XLA compiled, once more"


def test_a_test_runs_exactly_its_tokens(engine, monkeypatch):
    runs = Recorded(engine, monkeypatch)
    run_bench(engine, prompt_tokens=(12,), new_tokens=(9,), repeats=1)
    sizes = [(run.prompt_tokens, run.stats.decode_steps) for run in runs.done]
    assert sizes == [(12, 0)] * 3 + [(START_TOKENS, 9)] * 3


def test_prompts_repeat_and_hold_plain_ids(engine, monkeypatch):
    runs = Recorded(engine, monkeypatch)
    run_bench(engine, prompt_tokens=(16,), new_tokens=(), repeats=1)
    first, *others = (asked["prompt"] for asked in runs.asked)
    assert others == [first] * 2
    assert len(set(first)) > 8
    assert set(first) <= set(plain_ids(engine))


def test_plain_ids_are_those_that_spell_something(engine, bundled_store):
    ids = set(range(engine.config.vocab_size))
    assert set(plain_ids(engine)) == ids - {1, 2}
    with m2jax.load(bundled_store) as bundled:
        ids = set(range(bundled.config.vocab_size))
        assert set(plain_ids(bundled)) == ids - {0, 1, 2, 3, 4}


def test_repeats_are_the_same_tokens_at_any_temperature(engine, monkeypatch):
    texts = []
    for temperature in (0.0, 1.0):
        runs = Recorded(engine, monkeypatch)
        run_bench(
            engine,
            prompt_tokens=(),
            new_tokens=(9,),
            repeats=1,
            temperature=temperature,
        )
        first, *others = (run.token_ids for run in runs.done)
        assert others == [first] * 2
        texts.append(first)
    assert texts[0] != texts[1]


def test_the_end_of_text_token_ends_no_test(engine, monkeypatch):
    runs = Recorded(engine, monkeypatch)
    run_bench(engine, prompt_tokens=(), new_tokens=(5,), repeats=1)
    assert all(asked["ignore_eos"] for asked in runs.asked)


def test_bytes_per_token_are_those_of_the_plan(engine):
    # At temperature 0 random weights repeat one token, and its records stay.
    report = run_bench(
        engine, prompt_tokens=(12,), new_tokens=(9,), repeats=2, temperature=1.0
    )
    pp, tg = report["results"]
    plan = engine.plan
    assert tg["bytes_per_token"]["ssd_to_dram"] == plan.ssd_bytes_per_token
    assert pp["bytes_per_token"]["ssd_to_dram"] == plan.ssd_bytes_per_token / 12
    assert 0 < tg["bytes_per_token"]["dram_to_hbm"] <= plan.link_bytes_per_token
    assert tg["hit_ratio"]["dram"] == 0.0
    assert 0 < tg["hit_ratio"]["hbm"] < 1
    for result in (pp, tg):
        assert 0 < result["held_bytes"]["dram"] <= plan.dram_budget_bytes
        assert 0 < result["held_bytes"]["hbm"] <= plan.hbm_budget_bytes


def test_nothing_moves_where_everything_is_resident(tiny_store):
    with load(tiny_store, mix="100/0/0") as resident:
        assert resident.plan.placement.resident
        report = run_bench(resident, prompt_tokens=(), new_tokens=(9,), repeats=1)
    assert report["settings"]["resident"]
    (tg,) = report["results"]
    assert tg["bytes_per_token"] == {"ssd_to_dram": 0, "dram_to_hbm": 0}
    assert tg["hit_ratio"] == {"dram": None, "hbm": 1.0}
    assert tg["tokens_per_s_sd"] is None


def test_the_report_says_where_and_with_what_it_was_measured(engine):
    report = run_bench(engine, prompt_tokens=(4,), new_tokens=(), repeats=1)
    assert report["settings"] == {
        "mix": MIX,
        "dense": 16,
        "ssd_reads": engine.ssd_reads,
        "ssd_why": engine.runner.ssd.why,
        "neurons": {"all": NEURONS, "k16": 22, "k8": 0, "k4": 0},
        "scorer": "base",
        "policy": "lru",
        "draft": "none",
        "reads": "layers",
        "context": CONTEXT,
        "hbm_budget_bytes": engine.plan.hbm_budget_bytes,
        "dram_budget_bytes": engine.plan.dram_budget_bytes,
        "resident": False,
        "temperature": 1.0,
    }
    machine = report["machine"]
    assert machine["backend"] == "cpu"
    assert machine["cores"] >= 1
    assert machine["versions"]["m2jax"] == m2jax.__version__
    assert json.loads(json.dumps(report)) == report


def test_progress_names_each_repeat(engine):
    lines = []
    run_bench(
        engine,
        prompt_tokens=(4,),
        new_tokens=(3,),
        repeats=2,
        progress=lines.append,
    )
    assert [line.split(",")[0] for line in lines] == [
        "pp4: warm-up",
        "pp4: 1 of 2",
        "pp4: 2 of 2",
        "tg3: warm-up",
        "tg3: 1 of 2",
        "tg3: 2 of 2",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_tokens": (CONTEXT,)}, "pp128 takes 129 positions.* holds 128"),
        ({"new_tokens": (112,)}, "tg112 takes 129 positions.* holds 128"),
        ({"prompt_tokens": (0,)}, "pp0: want 1 token or more"),
        ({"prompt_tokens": (), "new_tokens": ()}, "nothing to measure"),
        ({"repeats": 0}, "repeats 0: want 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(engine, options, words):
    options = {"prompt_tokens": (4,), "new_tokens": (4,)} | options
    with pytest.raises(ValueError, match=words) as refusal:
        run_bench(engine, **options)
    assert "\n" not in str(refusal.value)


def test_the_memory_limit_is_the_least_of_the_cgroups_around(tmp_path):
    cgroups = tmp_path / "cgroup"
    cgroups.write_text("4:cpu:/other\n0::/slice/job\n")
    (tmp_path / "slice" / "job").mkdir(parents=True)
    (tmp_path / "memory.max").write_text("4096\n")
    inner, outer = tmp_path / "slice/job/memory.max", tmp_path / "slice/memory.max"

    def limit() -> int | None:
        return memory_limit_bytes(cgroups=cgroups, root=tmp_path / ".")

    inner.write_text("max\n")
    outer.write_text("2048\n")
    assert limit() == 2048
    inner.write_text("1024\n")
    assert limit() == 1024
    for path in (inner, outer, tmp_path / "memory.max"):
        path.write_text(f"{2 * memory_bytes()}\n")
    assert limit() is None


def test_the_memory_limit_of_an_old_cgroup_is_found(tmp_path):
    cgroups = tmp_path / "cgroup"
    cgroups.write_text("3:cpuset,memory:/job\n0::/\n")
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "memory/job/memory.limit_in_bytes").write_text("8192\n")
    assert memory_limit_bytes(cgroups=cgroups, root=tmp_path) == 8192
