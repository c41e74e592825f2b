"""Tokens a second of a loaded engine, by llama-bench's tests. Prints nothing."""

import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import numpy as np

from m2jax.bandwidths import Bandwidths
from m2jax.engine import Engine
from m2jax.kernels.choice import report
from m2jax.layer_mixes import format_mixes
from m2jax.machine import machine_facts
from m2jax.plan import LAYERS, RECORDS
from m2jax.roofline import roofline, where_time_went
from m2jax.stats import Counters, ratio
from m2jax.stream import Generation
from m2jax.timeline import Timeline

START_TOKENS = 16
SEED = 0
# Runs of one test that do not count; after that a run counts, compiled in or not.
MOST_UNTIMED = 6


@dataclass(frozen=True)
class _Test:
    """pp: a prompt of `tokens`. tg: `tokens` steps after a prompt of START_TOKENS."""

    kind: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.tokens}"

    @property
    def prompt(self) -> int:
        return self.tokens if self.kind == "pp" else START_TOKENS

    @property
    def new(self) -> int:
        """Tokens to choose. The first one ends the prompt's time, and belongs to it."""
        return 1 if self.kind == "pp" else self.tokens + 1

    @property
    def positions(self) -> float:
        """That a pass sees, on average."""
        return self.prompt if self.kind == "pp" else self.prompt + self.new / 2

    def passes(self, accepted: float) -> float:
        """Over the layers a token, where such a share of tokens was drafted right."""
        return 1 / self.tokens if self.kind == "pp" else 1 - accepted

    def seconds(self, done: Generation) -> float:
        timings = done.stats.timings
        if self.kind == "pp":
            assert timings.ttft_s is not None
            return timings.ttft_s
        assert timings.tpot_s is not None
        return timings.tpot_s * self.tokens

    def moved(self, done: Generation) -> Counters:
        return done.stats.request if self.kind == "pp" else done.stats.decode


def run_bench(
    engine: Engine,
    *,
    prompt_tokens: Sequence[int] = (512,),
    new_tokens: Sequence[int] = (128,),
    repeats: int = 5,
    temperature: float = 1.0,
    progress: Callable[[str], None] = lambda line: None,
    machine: Bandwidths | None = None,
    ssd_rate: Callable[[], float] | None = None,
    timeline: Timeline | None = None,
) -> dict[str, Any]:
    """Runs the tests one after the other, each once untimed and then `repeats` times.
    A run in which XLA compiled, as for a draft of another length, is untimed too and
    made again, as long as a test has no more than MOST_UNTIMED of both.

    A test's prompt is random token ids, the same in every repeat: another one would
    load other numbers of records, and compile for them while the clock runs. An
    end-of-text token ends nothing. pp512 is the time to the first token after 512;
    tg128 the 128 steps after that token, for a prompt of START_TOKENS.

    Args:
        prompt_tokens, new_tokens: sizes of the tests pp and tg.
        temperature: with 1 the text wanders, by a fixed seed; 0 takes the most probable
            token, and small models then soon repeat themselves, which flatters the hit
            ratio.
        progress: called with a line before each test and after each repeat.
        machine: what the rooflines are made from; None = no rooflines.
        ssd_rate: measures what the SSD gives at the moment; called beside every run
            that reads, and then its mean counts, since disks are shared. None = the
            machine's best counts.
        timeline: gets the events of one more run of each test, not timed.

    Returns:
        machine: see `machine_facts`. settings: what the engine was loaded with.
        kernels: what served, see `kernels.choice.report`.
        results: of each test, in order,
            test, repeats, tokens_per_s_mean, samples_tokens_per_s
            tokens_per_s_sd: of the sample; None for one repeat
            ssd_bytes_per_s_mean: of `ssd_rate`, beside the runs; None = not measured
            bytes_per_token: {ssd_to_dram, dram_to_hbm}
            ssd_retries: reads that failed and were tried again, in all repeats
            hit_ratio: {dram, hbm}; None where no records were looked up
            drafts: {drafted, accepted, sweeps, accepted_per_sweep, step_s, sweep_s}:
                seconds of a drafted token and of a sweep; None where nothing drafts
            held_bytes: {hbm, dram}
            compile_s: what the untimed runs took longer than the mean
            roofline: see `roofline.roofline`; None without `machine`
            milliseconds_per_token: see `roofline.where_time_went`; of one more run
        peak_rss_bytes: the process's most memory, compilation included

    Raises:
        ValueError: no tests, a number out of range, a test longer than the context.
    """
    tests = [_Test("pp", n) for n in prompt_tokens]
    tests += [_Test("tg", n) for n in new_tokens]
    _check(tests, repeats=repeats, context=engine.context)
    ids = plain_ids(engine)
    results = []
    timeline = Timeline() if timeline is None else timeline
    for test in tests:
        prompt = np.random.default_rng(SEED).choice(ids, test.prompt).tolist()
        once = partial(
            engine.generate,
            prompt,
            max_new_tokens=test.new,
            temperature=temperature,
            seed=SEED,
            ignore_eos=True,
        )
        reads = machine is not None and engine.plan.ssd_bytes_per_token > 0
        result = _run(
            *(test, once),
            repeats=repeats,
            progress=progress,
            ssd_rate=ssd_rate if reads else None,
        )
        result["milliseconds_per_token"] = _profiled(engine, timeline, test, once)
        result["roofline"] = None
        if machine is not None:
            moved, drafts = result["bytes_per_token"], result["drafts"]
            tokens = result["repeats"] * test.tokens
            result["roofline"] = roofline(
                engine,
                machine,
                passes=test.passes(drafts["accepted"] / tokens),
                drafted=drafts["drafted"] / tokens,
                ssd_bytes=moved["ssd_to_dram"],
                link_bytes=moved["dram_to_hbm"],
                positions=test.positions,
                tokens_per_s=result["tokens_per_s_mean"],
                ssd_bytes_per_s=result["ssd_bytes_per_s_mean"],
            )
        results.append(result)
    return {
        "machine": machine_facts(),
        "settings": {**_settings(engine), "temperature": temperature},
        "kernels": report(),
        "results": results,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _profiled(
    engine: Engine, timeline: Timeline, test: _Test, once: Callable[[], Generation]
) -> dict[str, float]:
    """Where the time of one more run went, its events added to `timeline`."""
    own = Timeline(begun=timeline.begun)
    engine.runner.tiers.profile(own)
    start = time.perf_counter()
    try:
        once()
    finally:
        engine.runner.tiers.profile(None)
    wall_s = time.perf_counter() - start
    timeline.events += own.events
    return where_time_went(
        own,
        thread=threading.current_thread().name,
        wall_s=wall_s,
        # Of a text the prompt is one pass more.
        tokens=test.tokens if test.kind == "pp" else test.new,
    )


def _check(tests: Sequence[_Test], *, repeats: int, context: int) -> None:
    if not tests:
        raise ValueError("nothing to measure: give a prompt size or a number of steps")
    if repeats < 1:
        raise ValueError(f"repeats {repeats}: want 1 or more")
    for test in tests:
        if test.tokens < 1:
            raise ValueError(f"{test.name}: want 1 token or more")
        if test.prompt + test.new > context:
            raise ValueError(
                f"{test.name} takes {test.prompt + test.new} positions, the context "
                f"holds {context}; choose a smaller test, or raise --context"
            )


def _run(
    test: _Test,
    once: Callable[[], Generation],
    *,
    repeats: int,
    progress: Callable[[str], None],
    ssd_rate: Callable[[], float] | None,
) -> dict[str, Any]:
    progress(f"{test.name}: warm-up")
    runs: list[Generation] = []
    untimed_s, wall_s, rates, ssd_rates = [], [], [], []
    while len(runs) < repeats:
        start = time.perf_counter()
        done = once()
        took = time.perf_counter() - start
        if ssd_rate is not None:
            ssd_rates.append(ssd_rate())
        compiled = done.stats.timings.compile_s > 0
        if not untimed_s or (compiled and len(untimed_s) < MOST_UNTIMED):
            if untimed_s:
                progress(f"{test.name}: XLA compiled, once more")
            untimed_s.append(took)
            continue
        wall_s.append(took)
        runs.append(done)
        rates.append(test.tokens / test.seconds(done))
        progress(f"{test.name}: {len(runs)} of {repeats}, {rates[-1]:.1f} tokens/s")
    moved = Counters(*map(sum, zip(*(astuple(test.moved(run)) for run in runs))))
    held = runs[-1].stats.held
    return {
        "test": test.name,
        "tokens_per_s_mean": statistics.fmean(rates),
        "tokens_per_s_sd": statistics.stdev(rates) if len(rates) > 1 else None,
        "repeats": len(rates),
        "samples_tokens_per_s": rates,
        "ssd_bytes_per_s_mean": statistics.fmean(ssd_rates) if ssd_rates else None,
        "bytes_per_token": {
            "ssd_to_dram": moved.ssd_read_bytes / (len(runs) * test.tokens),
            "dram_to_hbm": moved.hbm_load_bytes / (len(runs) * test.tokens),
        },
        "ssd_retries": moved.ssd_retries,
        "held_bytes": {"hbm": held.hbm_bytes, "dram": held.dram_bytes},
        "hit_ratio": {
            "dram": ratio(moved.dram_hits, moved.dram_accesses),
            "hbm": ratio(moved.hbm_hits, moved.hbm_accesses),
        },
        "drafts": {
            "drafted": moved.drafted,
            "accepted": moved.accepted,
            "sweeps": moved.sweeps,
            "accepted_per_sweep": ratio(moved.accepted, moved.sweeps),
            "step_s": moved.draft_s / moved.drafted if moved.drafted else None,
            "sweep_s": moved.sweep_s / moved.sweeps if moved.sweeps else None,
        },
        "compile_s": max(
            0.0, sum(untimed_s) - len(untimed_s) * statistics.fmean(wall_s)
        ),
    }


def plain_ids(engine: Engine) -> np.ndarray:
    """Ids that spell something, special ones left out."""
    config, tokenizer = engine.config, engine.tokenizer
    special = {*config.bos_token_ids, *config.eos_token_ids}
    return np.array(
        [
            token
            for token in range(config.vocab_size)
            if token not in special and (not tokenizer or tokenizer.token_bytes(token))
        ]
    )


def _settings(engine: Engine) -> dict[str, Any]:
    plan, specs = engine.plan, engine.specs
    kept = [spec.counts for spec in specs]
    return {
        "mix": format_mixes(engine.mixes),
        "dense": engine.dense,
        "ssd_reads": engine.ssd_reads,
        "ssd_why": engine.runner.ssd.why,
        "neurons": {
            "all": specs[0].neurons,
            **{
                field: sum(getattr(counts, field) for counts in kept) / len(kept)
                for field in ("k16", "k8", "k4")
            },
        },
        "scorer": specs[0].scorer,
        "policy": engine.policy,
        "draft": engine.draft,
        "reads": RECORDS if plan.placement.dram_slots else LAYERS,
        "context": engine.context,
        "hbm_budget_bytes": plan.hbm_budget_bytes,
        "dram_budget_bytes": plan.dram_budget_bytes,
        "resident": plan.placement.resident,
    }
