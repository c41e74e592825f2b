"""What is to be loaded: a store opened, its options checked, its memory planned.

Nothing of it is in memory yet, so that a refusal costs nothing. Knows no tiers.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2jax.arguments import as_integer, shown
from m2jax.demand import Demand
from m2jax.dense_bits import check_dense
from m2jax.dense_part import stored_dense_bytes, stored_predictor_bytes
from m2jax.draft.setup import (
    AUTO,
    BASE,
    NGRAM,
    NONE,
    check_draft_tokens,
    check_reads,
    check_same_vocabulary,
    plan_draft,
)
from m2jax.errors import DoesNotFit
from m2jax.ffn_spec import FfnSpec, make_specs
from m2jax.layer_mixes import parse_mixes
from m2jax.mix import PrecisionMix
from m2jax.plan import DEFAULT_DISTANCE, LAYERS, MemoryPlan
from m2jax.planning import DEFAULT_CONTEXT, check_free, plan_for
from m2jax.store import Store, open_store
from m2jax.store.calibration import read_json_part
from m2jax.text import Tokenizer, load_tokenizer
from m2jax.units import parse_bytes

# Moves a fifth of what 25/25/50 does, for a KL of 0.00018 nats instead of 0.00003;
# at the bytes of 25/25/50 plain INT8 is better (docs/quality.md).
DEFAULT_MIX = "0/25/75"
ONLY_Q4_MIX = "0/0/100"

log = logging.getLogger("m2jax")


@dataclass(frozen=True)
class Prepared:
    """A store, how it is to run, and what lies where.

    mixes, specs: one a layer. lookahead: None where no predictor ranks. planes: kept
    ready beside those of the mix. dense: bits of the dense part's matrices. draft:
    what proposes; `other` is the model that does, where it is one of its own.
    """

    store: Store
    mixes: tuple[PrecisionMix, ...]
    specs: tuple[FfnSpec, ...]
    lookahead: int | None
    planes: tuple[str, ...]
    dense: int
    demand: Demand
    plan: MemoryPlan
    draft: str
    draft_tokens: int | None
    other: "Prepared | None"


def prepare(
    store: Store,
    *,
    hbm: str | int | None = None,
    dram: str | int | None = None,
    mix: str | PrecisionMix | Sequence[PrecisionMix] | None = None,
    scorer: str = "base",
    lookahead: int = 0,
    context: int | None = None,
    distance: int = DEFAULT_DISTANCE,
    planes: Sequence[str] = (),
    dense: int = 16,
    draft: str = AUTO,
    draft_tokens: int | None = None,
    in_place: bool | None = None,
    reads: str = LAYERS,
) -> Prepared:
    """Checks options and plans, of the draft model too where there is one.

    Args: see `loading.load`.

    Raises:
        ValueError: a wrong option. DoesNotFit: budgets too small, naming the smallest.
        StoreError: a file that had to be looked at is damaged.
    """
    config, layout = store.config, store.layout
    mixes = choose_mixes(store, mix, scorer=scorer)
    specs = make_specs(config, layout, mixes, scorer=scorer, planes=store.planes)
    planes = check_planes(store, planes)
    lookahead = as_integer(lookahead, name="--lookahead", high=1, want="0 or 1")
    predicted = any(spec.predicted for spec in specs)
    budgets = {
        "hbm": parse_bytes(hbm, name="--hbm"),
        "dram": parse_bytes(dram, name="--dram"),
    }
    dense = check_dense(dense)
    dense_bytes = stored_dense_bytes(store, dense) + (
        stored_predictor_bytes(store, lookahead) if predicted else 0
    )
    draft = check_reads(reads, draft)
    if draft == NONE and draft_tokens is not None:
        raise ValueError(
            f"--draft-tokens {draft_tokens}: with --draft none nothing is drafted; "
            "leave one of them out"
        )
    # Whole passes draft nothing, and must find the plan that they ask for.
    draft, other = NONE if planes and draft == AUTO else draft, None
    if draft not in (AUTO, NONE, BASE, NGRAM):
        other = _prepare_draft(Path(draft), hbm=budgets["hbm"], context=context)
    beside = other.plan.footprint.hbm if other else 0

    def plan_of(demand: Demand) -> MemoryPlan:
        return plan_for(
            config,
            layout,
            demand,
            dense_bytes=dense_bytes,
            **budgets,
            context=context,
            distance=distance,
            sequences=2 if planes else 1,
            beside=beside,
            in_place=in_place,
            reads=reads,
        )

    draft, demand, plan = plan_draft(plan_of, specs, planes=planes, draft=draft)
    return Prepared(
        store,
        mixes,
        specs,
        lookahead=lookahead if predicted else None,
        planes=planes,
        dense=dense,
        demand=demand,
        plan=plan,
        draft=draft,
        draft_tokens=check_draft_tokens(draft_tokens, plan.context, draft=draft),
        other=other,
    )


def _prepare_draft(folder: Path, *, hbm: int | None, context: int | None) -> Prepared:
    """The model that drafts, all of it on the device.

    Raises:
        DoesNotFit: it is not.
    """
    store = open_store(folder)
    most, wanted = store.config.context, DEFAULT_CONTEXT
    if context is not None:
        wanted = as_integer(context, name="--context", low=1, want=f"1 to {most}")
    other = prepare(store, hbm=hbm, context=min(wanted, most), draft=NONE)
    if not other.plan.placement.resident:
        raise DoesNotFit(
            f"--draft {folder}: must fit the HBM budget whole; want a smaller draft "
            "model, or more --hbm"
        )
    return other


def check_before_loading(prepared: Prepared) -> Tokenizer | None:
    """What stands in the way of loading it on this machine; reads tokenizers alone.

    Returns:
        The store's own tokenizer, None where it has none.

    Raises:
        DoesNotFit: less is free than the plan needs. ValueError: the draft model has
        another vocabulary, or a tokenizer does not fit its model.
    """
    # Of both: the plan's device bytes hold the draft model.
    check_free(prepared.plan)
    tokenizer, other = _tokenizer_of(prepared.store), prepared.other
    if other is not None:
        check_same_vocabulary(
            prepared.store.config,
            tokenizer,
            other.store.config,
            _tokenizer_of(other.store),
            where=Path(prepared.draft),
        )
    return tokenizer


def _tokenizer_of(store: Store) -> Tokenizer | None:
    folder = store.tokenizer_folder()
    if folder is None:
        return None
    return load_tokenizer(
        folder,
        vocab_size=store.config.vocab_size,
        bos_token_ids=store.config.bos_token_ids,
    )


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
