"""From a store's path to an engine: prepares, then fills device and DRAM."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from m2jax.bundled import bundled_store
from m2jax.cache.manager import TierManager
from m2jax.cache.policy import POLICIES
from m2jax.cache.reading import no_records
from m2jax.compiled_kernels import prepare_kernels
from m2jax.demand import make_demand
from m2jax.dense_part import LoadProgress, load_dense_part, load_predictors_part
from m2jax.draft.setup import AUTO, make_speculation
from m2jax.engine import Engine
from m2jax.memory import give_back_freed
from m2jax.mix import PrecisionMix
from m2jax.plan import DEFAULT_DISTANCE, LAYERS
from m2jax.preparing import Prepared, check_before_loading, prepare
from m2jax.runner import Runner
from m2jax.stats import SsdReads
from m2jax.steps import Steps
from m2jax.store import (
    ChunkStore,
    SlowChunks,
    choose_chunks,
    emulated_rate,
    open_store,
)

log = logging.getLogger("m2jax")


def load(
    store: str | Path | None = None,
    *,
    hbm: str | int | None = None,
    dram: str | int | None = None,
    mix: str | PrecisionMix | Sequence[PrecisionMix] | None = None,
    scorer: str = "base",
    lookahead: int = 0,
    policy: str = "lru",
    context: int | None = None,
    distance: int = DEFAULT_DISTANCE,
    planes: Sequence[str] = (),
    dense: int = 16,
    draft: str | Path = AUTO,
    draft_tokens: int | None = None,
    emulate_ssd: str | int | None = None,
    in_place: bool | None = None,
    reads: str = LAYERS,
    progress: LoadProgress = lambda what, nbytes: None,
    chunks: ChunkStore | None = None,
) -> Engine:
    """Opens a store within budgets.

    Args:
        store: folder made by `m2jax convert`; None = the bundled model.
        hbm, dram: bytes each tier may hold, as in "8GiB"; None = what is free.
        mix: percent of neurons at 16/8/4 bits, as in "25/25/50", or one mix a layer
            ("0/25/75*3,0/50/50"); what is missing to 100 is skipped. None = the one
            that `m2jax search-mix` found for this store, else DEFAULT_MIX.
        scorer: "base", "gate", "lowrank" (after `m2jax calibrate`) or "none".
        lookahead: layers between what a lowrank scorer sees and what it ranks, 0 or 1.
        policy: "lru" or "lfu".
        context: positions for prompt and text; None = the model's, at most 4096.
        distance: layers that SSD reads run ahead.
        planes: kept ready for whole passes beside those of the mix: ("w16",) for
            `Engine.compare`.
        dense: bits of attention, embedding and output matrices on the device: 16 (as in
            the store), 8 or 4.
        draft: what proposes tokens that one sweep then verifies: "base" (plane q4),
            "ngram" (prompt look-up), the folder of another store of the same
            vocabulary, or "none". "auto": base where the plan says that it pays. The
            text is the same with any.
        draft_tokens: how many are drafted each time; None = as many as pay.
        emulate_ssd: bytes a second at which SSD reads are held, as in "500MB".
        in_place: whether the device uses rows where they lie in DRAM; None = a CPU
            does. False on a CPU: copies and counts as for an accelerator.
        reads: what a token reads from SSD where DRAM does not hold all: "layers" whole,
            ahead of time, or the "records" that it wants and finds in no slot. With
            records nothing is drafted. The text is the same with both.
        progress: called with what arrived and its bytes.
        chunks: where neuron records are read from; None = the store's own files.

    Raises:
        ValueError: a wrong option. DoesNotFit: budgets too small, naming the smallest.
        StoreError: the store is damaged, unfinished or unreadable.
    """
    start = time.perf_counter()
    if not isinstance(policy, str) or policy not in POLICIES:
        hint = "; belady needs the future" if policy == "belady" else ""
        raise ValueError(f"policy {policy!r}: want one of {sorted(POLICIES)}{hint}")
    rate = emulated_rate(emulate_ssd)
    prepared = prepare(
        open_store(bundled_store(progress) if store is None else store),
        hbm=hbm,
        dram=dram,
        mix=mix,
        scorer=scorer,
        lookahead=lookahead,
        context=context,
        distance=distance,
        planes=planes,
        dense=dense,
        draft=str(draft),
        draft_tokens=draft_tokens,
        in_place=in_place,
        reads=reads,
    )
    tokenizer = check_before_loading(prepared)
    prepare_kernels(progress)
    with ExitStack() as undo:
        other = None
        if prepared.other is not None:
            other = _fill(prepared.other, undo, progress=progress)
        runner = _fill(
            prepared, undo, progress=progress, policy=policy, rate=rate, chunks=chunks
        )
        speculation = make_speculation(
            prepared.draft, runner, other=other, count=prepared.draft_tokens
        )
        give_back_freed()
        undo.pop_all()
    return Engine(
        runner,
        tokenizer,
        mixes=prepared.mixes,
        dense=prepared.dense,
        load_s=time.perf_counter() - start,
        speculation=speculation,
    )


def _fill(
    prepared: Prepared,
    undo: ExitStack,
    *,
    progress: LoadProgress,
    policy: str = "lru",
    rate: int | None = None,
    chunks: ChunkStore | None = None,
) -> Runner:
    """What was planned, in memory.

    Args:
        undo: given what ends the threads that were begun.
    """
    store, layout, plan = prepared.store, prepared.store.layout, prepared.plan
    predictors = None
    if prepared.lookahead is not None:
        predictors = load_predictors_part(store, prepared.lookahead, progress)
    embed, layers, head, dense_bytes = load_dense_part(
        store, predictors, progress, prepared.dense
    )
    source = chunks or choose_chunks(store)
    end_reads: Callable[[], None] = getattr(source, "close", lambda: None)
    undo.callback(end_reads)
    reads = source if rate is None else SlowChunks(source, rate)
    tiers = TierManager(
        reads.read,
        plan.placement,
        {plane: layout.record_bytes(plane) for plane in prepared.demand.planes},
        neurons=layout.neurons,
        original_dtype=layout.original_dtype,
        # Of a decode step: a draft may want more.
        wanted=make_demand(prepared.specs, passing=prepared.planes).wanted,
        policy=policy,
        read_records=reads.read_records if plan.placement.dram_slots else no_records,
        end_reads=end_reads,
    )
    undo.callback(tiers.close)
    tiers.load_resident(lambda nbytes: progress("neurons", nbytes))
    return Runner(
        Steps(store.config, prepared.specs, prepared.lookahead or 0),
        embed=embed,
        layers=layers,
        head=head,
        tiers=tiers,
        plan=plan,
        dense_bytes=dense_bytes,
        ssd=SsdReads(getattr(source, "how", "given"), getattr(source, "why", None)),
    )
