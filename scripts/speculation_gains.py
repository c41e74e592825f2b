"""What drafts gain in tokens a second, as plain JSON values."""

import statistics
from pathlib import Path
from typing import Any

from speculation_runs import CONTEXT, NAMES, Say, Sizes, prompts, run

import m2jax
from m2jax.engine import Engine
from m2jax.store import open_store

# Draft steps that one sweep of the target's missing planes takes: the ratio of a 7B
# model on an SSD of 3 GB/s.
SWEEP_STEPS = 20
# Two of them in use, two being read.
RING = 4


def base_only(store: Path, mix: str, **options: Any) -> Engine:
    """An engine whose budgets hold the base plane and the ring, and nothing more."""
    layout = open_store(store).layout
    with m2jax.load(store, mix="0/0/100", context=CONTEXT) as base:
        resident = base.plan.footprint.hbm
    # Every layer of a mix for all wants the same planes.
    others = {"100/0/0": ("w16",), "0/100/0": ("r4",), "25/25/50": ("r4", "w16")}[mix]
    layer_bytes = sum(map(layout.plane_bytes, others))
    return m2jax.load(
        store,
        mix=mix,
        context=CONTEXT,
        hbm=resident,
        dram=RING * layer_bytes,
        **options,
    )


def gains(store: Path, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """Tokens a second with and without drafts, SSD held and not, every prompt."""
    found = []
    for mix in sizes.targets:
        with base_only(store, mix, draft="base") as engine:
            missing = engine.plan.ssd_bytes_per_token
        for held in (True, False):
            # Anew each time: what a shared machine gives changes within minutes.
            with m2jax.load(store, mix="0/0/100", context=CONTEXT) as resident:
                step_s = _draft_step(resident, sizes)
            rate = int(missing / (SWEEP_STEPS * step_s)) if held else None
            say(f"gain at {mix}, SSD {'free' if rate is None else f'{rate:,} B/s'}")
            found.append(
                {
                    "mix": mix,
                    "ssd_bytes_per_s": rate,
                    "missing_bytes": missing,
                    "resident_step_s": step_s,
                    **_gain(store, mix, rate, sizes),
                }
            )
    return found


def _draft_step(engine: Engine, sizes: Sizes) -> float:
    """Seconds of a token where all is at 4 bits and resident."""
    prompt = prompts(engine, "stories", length=sizes.prompt, count=1)[0]
    times = []
    for _ in range(sizes.repeats + 1):
        done = engine.generate(prompt, max_new_tokens=sizes.new, ignore_eos=True)
        assert done.stats.timings.tpot_s is not None
        times.append(done.stats.timings.tpot_s)
    return statistics.median(times[1:])


def _gain(store: Path, mix: str, rate: int | None, sizes: Sizes) -> dict[str, Any]:
    """The same prompts by an engine without drafts and by one with."""
    rows = []
    with (
        base_only(store, mix, draft="none", emulate_ssd=rate) as plain,
        base_only(store, mix, draft="base", emulate_ssd=rate) as drafting,
    ):
        texts = [
            prompt
            for group in zip(
                *(
                    prompts(
                        plain,
                        name,
                        length=sizes.prompt,
                        count=-(-sizes.gain_prompts // len(NAMES)),
                    )
                    for name in NAMES
                )
            )
            for prompt in group
        ][: sizes.gain_prompts]
        for engine in (plain, drafting):
            # Compiles, and lets the pace see what things cost.
            for prompt in texts[:2]:
                run(engine, prompt, sizes)
        for number, prompt in enumerate(texts):
            without, drafted = (run(e, prompt, sizes) for e in (plain, drafting))
            decode = drafted.stats.decode
            rows.append(
                {
                    "text": NAMES[number % len(NAMES)],
                    "plain_tpot_s": without.stats.timings.tpot_s,
                    "draft_tpot_s": drafted.stats.timings.tpot_s,
                    "same_ids": without.token_ids == drafted.token_ids,
                    "drafted": decode.drafted,
                    "accepted": decode.accepted,
                    "sweeps": decode.sweeps,
                    "draft_s": decode.draft_s,
                    "sweep_s": decode.sweep_s,
                    "read_bytes": decode.ssd_read_bytes,
                    "compile_s": drafted.stats.timings.compile_s,
                }
            )
    return {"prompts": rows}
