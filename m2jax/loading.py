"""From a store's path to an engine: opens, plans, fills the device."""

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from m2jax.arguments import as_integer, shown
from m2jax.bundled import bundled_store
from m2jax.cache.manager import TierManager
from m2jax.cache.policy import POLICIES
from m2jax.demand import Demand, make_demand
from m2jax.dense_bits import check_dense
from m2jax.dense_part import (
    LoadProgress,
    load_dense_part,
    load_predictors_part,
    stored_dense_bytes,
    stored_predictor_bytes,
)
from m2jax.draft.setup import (
    AUTO,
    BASE,
    NGRAM,
    NONE,
    check_draft_tokens,
    check_same_vocabulary,
    make_speculation,
    plan_draft,
)
from m2jax.engine import Engine
from m2jax.errors import DoesNotFit
from m2jax.ffn_spec import make_specs
from m2jax.kernels import toolchain
from m2jax.kernels.choice import must_compile, why_slow
from m2jax.layer_mixes import parse_mixes
from m2jax.memory import free_dram_bytes, give_back_freed
from m2jax.mix import PrecisionMix
from m2jax.plan import DEFAULT_DISTANCE, MemoryPlan
from m2jax.planning import DEFAULT_CONTEXT, check_free, plan_for
from m2jax.runner import Runner
from m2jax.steps import Steps
from m2jax.store import (
    ChunkStore,
    SlowChunks,
    Store,
    choose_chunks,
    emulated_rate,
    open_store,
)
from m2jax.store.calibration import read_json_part
from m2jax.text import load_tokenizer
from m2jax.units import parse_bytes

# Moves a fifth of what 25/25/50 does, for a KL of 0.00018 nats instead of 0.00003;
# at the bytes of 25/25/50 plain INT8 is better (docs/quality.md).
DEFAULT_MIX = "0/25/75"
ONLY_Q4_MIX = "0/0/100"

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
    opened = open_store(bundled_store(progress) if store is None else store)
    config, layout = opened.config, opened.layout
    mixes = choose_mixes(opened, mix, scorer=scorer)
    specs = make_specs(config, layout, mixes, scorer=scorer, planes=opened.planes)
    planes = check_planes(opened, planes)
    lookahead = as_integer(lookahead, name="--lookahead", high=1, want="0 or 1")
    predicted = any(spec.predicted for spec in specs)
    budget, rate = parse_bytes(hbm, name="--hbm"), emulated_rate(emulate_ssd)
    dense = check_dense(dense)
    dense_bytes = stored_dense_bytes(opened, dense) + (
        stored_predictor_bytes(opened, lookahead) if predicted else 0
    )
    if str(draft) == NONE and draft_tokens is not None:
        raise ValueError(
            f"--draft-tokens {draft_tokens}: with --draft none nothing is drafted; "
            "leave one of them out"
        )
    # Whole passes draft nothing, and must find the plan that they ask for.
    draft, other = NONE if planes and draft == AUTO else str(draft), None
    if draft not in (AUTO, NONE, BASE, NGRAM):
        other = _load_draft(Path(draft), hbm=budget, context=context, progress=progress)
    beside = other.plan.footprint.hbm if other else 0

    def plan_of(demand: Demand) -> MemoryPlan:
        return plan_for(
            config,
            layout,
            demand,
            dense_bytes=dense_bytes,
            hbm=budget,
            dram=parse_bytes(dram, name="--dram"),
            context=context,
            distance=distance,
            sequences=2 if planes else 1,
            beside=beside,
            in_place=in_place,
        )

    draft, demand, plan = plan_draft(plan_of, specs, planes=planes, draft=draft)
    draft_tokens = check_draft_tokens(draft_tokens, plan.context)
    check_free(plan)
    prepare_kernels(progress)
    folder = opened.tokenizer_folder()
    tokenizer = None
    if folder is not None:
        tokenizer = load_tokenizer(
            folder,
            vocab_size=config.vocab_size,
            bos_token_ids=config.bos_token_ids,
        )
    predictors = (
        load_predictors_part(opened, lookahead, progress) if predicted else None
    )
    embed, layers, head, dense_bytes = load_dense_part(
        opened, predictors, progress, dense
    )
    reads = chunks or choose_chunks(opened)
    tiers = TierManager(
        reads.read if rate is None else SlowChunks(reads, rate).read,
        plan.placement,
        {plane: layout.record_bytes(plane) for plane in demand.planes},
        neurons=layout.neurons,
        original_dtype=layout.original_dtype,
        # Of a decode step: a draft may want more.
        wanted=make_demand(specs, passing=planes).wanted,
        policy=policy,
        end_reads=getattr(reads, "close", lambda: None),
    )
    try:
        tiers.load_resident(lambda nbytes: progress("neurons", nbytes))
    except BaseException:
        tiers.close()
        raise
    runner = Runner(
        Steps(config, specs, lookahead if predicted else 0),
        embed=embed,
        layers=layers,
        head=head,
        tiers=tiers,
        plan=plan,
        dense_bytes=dense_bytes,
    )
    if other is not None:
        check_same_vocabulary(
            runner, tokenizer, other.runner, other.tokenizer, where=Path(draft)
        )
    give_back_freed()
    return Engine(
        runner,
        tokenizer,
        mixes=mixes,
        dense=dense,
        ssd_reads=getattr(reads, "how", "given"),
        load_s=time.perf_counter() - start,
        speculation=make_speculation(
            draft, runner, other=other and other.runner, count=draft_tokens
        ),
    )


def prepare_kernels(progress: LoadProgress = lambda what, nbytes: None) -> None:
    """Compiles the C++ kernels where they serve and were not compiled here before."""
    compiling = must_compile()
    if compiling:
        progress("compiling kernels, once on this machine", 0)
        toolchain.fit_memory(free_dram_bytes())
    # Registers them now, not while the first step is traced.
    reason = why_slow()
    if compiling and reason is not None:
        log.warning("no compiled kernels, slower ones serve: %s", reason)


def _load_draft(
    folder: Path, *, hbm: int | None, context: int | None, progress: LoadProgress
) -> Engine:
    """The model that drafts, all of it on the device.

    Raises:
        DoesNotFit: it is not.
    """
    most = open_store(folder).config.context
    wanted = DEFAULT_CONTEXT
    if context is not None:
        wanted = as_integer(context, name="--context", low=1, want=f"1 to {most}")
    other = load(
        folder, hbm=hbm, context=min(wanted, most), draft=NONE, progress=progress
    )
    if not other.plan.placement.resident:
        other.close()
        raise DoesNotFit(
            f"--draft {folder}: must fit the HBM budget whole; want a smaller draft "
            "model, or more --hbm"
        )
    return other


def choose_mixes(
    store: Store,
    mix: str | PrecisionMix | Sequence[PrecisionMix] | None,
    *,
    scorer: str | None = None,
) -> tuple[PrecisionMix, ...]:
    """One mix a layer: the one asked for, else the store's own, else DEFAULT_MIX.

    Args:
        scorer: what will rank; warns if the store's own mix was found for another.

    Raises:
        ValueError: no mix, or not one a layer. StoreError: the store's own is damaged.
    """
    layers = store.config.num_layers
    if mix is None:
        found = read_json_part(store, "mix")
        mix = default_mix(store.planes) if found is None else str(found["mix"])
        searched = scorer if found is None else found.get("scorer", scorer)
        if scorer not in (None, searched):
            log.warning(
                "the store's own mix was found for --scorer %s, and %s ranks",
                searched,
                scorer,
            )
    return parse_mixes(mix, layers)


def default_mix(planes: Sequence[str]) -> str:
    """Where neither user nor store names one, of the planes that a store has."""
    return DEFAULT_MIX if "r4" in planes else ONLY_Q4_MIX


def check_planes(store: Store, planes: Sequence[str]) -> tuple[str, ...]:
    """The planes, if a store has them all."""
    if isinstance(planes, str) or not isinstance(planes, Iterable):
        raise ValueError(f"planes {shown(planes)}: want a sequence, as in ('w16',)")
    planes = tuple(planes)
    for plane in planes:
        if plane not in store.planes:
            raise ValueError(
                f"{store.path}: has no plane {plane}, only {', '.join(store.planes)}; "
                "convert the checkpoint again with all planes"
            )
    return planes
