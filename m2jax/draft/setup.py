"""Which draft an engine has: what was asked, or what its plan says pays."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from m2jax.arguments import as_integer, shown
from m2jax.config import ModelConfig
from m2jax.demand import Demand, make_demand
from m2jax.draft.drafters import BaseDrafter, ModelDrafter, NgramDrafter
from m2jax.draft.loop import Speculation
from m2jax.draft.pace import MOST_ROWS, Pace
from m2jax.errors import DoesNotFit
from m2jax.ffn_spec import FfnSpec
from m2jax.plan import LAYERS, RECORDS, MemoryPlan
from m2jax.runner import Runner
from m2jax.text import Tokenizer

log = logging.getLogger("m2jax")

MOST_ASKED = MOST_ROWS - 1
AUTO, NONE, BASE, NGRAM = "auto", "none", "base", "ngram"
# Steps of plain decoding that are timed first, where a cache of neurons may make them
# cheaper than a sweep.
PROBES = 4


def plan_draft(
    plan: Callable[[Demand], MemoryPlan],
    specs: Sequence[FfnSpec],
    *,
    planes: Sequence[str],
    draft: str,
) -> tuple[str, Demand, MemoryPlan]:
    """The draft, the demand with it, and the plan.

    "auto" becomes "base" where plane q4 fits the device whole and something else of
    what the mix wants does not; else "none".

    Args:
        plan: makes a plan of a demand.
        planes: see `make_demand`, passing.

    Raises:
        DoesNotFit: "base" was asked for, and plane q4 does not fit the device.
        ValueError: "base" was asked for, and it is the target itself.
    """
    plain = make_demand(specs, passing=planes)
    if draft not in (AUTO, BASE):
        return draft, plain, plan(plain)
    if all(set(spec.wanted) <= {"q4"} for spec in specs):
        if draft == BASE:
            raise ValueError(
                "--draft base: the mix computes all neurons at 4 bits, which is what "
                "would draft; want another mix, or --draft none"
            )
        return NONE, plain, plan(plain)
    demand = make_demand(specs, passing=planes, drafting=("q4",))
    if draft == BASE:
        try:
            return BASE, demand, plan(demand)
        except DoesNotFit as error:
            raise DoesNotFit(
                f"--draft base wants plane q4 whole in HBM: {error}; --draft ngram "
                "wants nothing"
            ) from error
    alone = plan(plain)
    if not alone.placement.resident:
        with suppress(DoesNotFit):
            return BASE, demand, plan(demand)
    return NONE, plain, alone


def check_reads(reads: str, draft: str) -> str:
    """The draft that goes with what a token reads: none where that is records, since a
    sweep over a draft wants most of them.

    Raises:
        ValueError: no such way to read, or a draft was asked for by name.
    """
    if reads not in (LAYERS, RECORDS):
        raise ValueError(f"--reads {shown(reads)}: want {LAYERS} or {RECORDS}")
    if reads == LAYERS:
        return draft
    if draft not in (AUTO, NONE):
        raise ValueError(
            f"--reads {RECORDS}: a sweep over a draft wants whole layers; want "
            f"--draft none, or --reads {LAYERS} with --draft {draft}"
        )
    return NONE


def check_draft_tokens(count: int | None, context: int, *, draft: str) -> int | None:
    """The number of drafted tokens as an int, if it can be; None stays None. Says so
    where it is of no use: whether "auto" drafts hangs on the machine, so that this is
    no error."""
    if count is None:
        return None
    most = min(MOST_ASKED, context - 1)
    want = (
        f"1 to {most} (the context holds {context}, a sweep {MOST_ASKED} drafted "
        "tokens); unset, as many as pay"
    )
    count = as_integer(count, name="--draft-tokens", low=1, high=most, want=want)
    if draft == NONE:
        log.warning("--draft-tokens %d: --draft auto makes no drafts here", count)
    return count


def check_same_vocabulary(
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    others_config: ModelConfig,
    others_tokenizer: Tokenizer | None,
    *,
    where: Path,
) -> None:
    """Refuses a draft whose tokens are not the target's.

    Raises:
        ValueError: names the first token that differs.
    """
    size, given = config.vocab_size, others_config.vocab_size
    if size != given:
        raise ValueError(
            f"--draft {where}: has {given:,} tokens, the model has {size:,}; want a "
            "draft model of the same vocabulary"
        )
    if tokenizer is None or others_tokenizer is None:
        return
    for token in range(size):
        own = tokenizer.token_bytes(token)
        if own != others_tokenizer.token_bytes(token):
            raise ValueError(
                f"--draft {where}: token {token} is "
                f"{others_tokenizer.token_bytes(token)!r}, the model's is {own!r}; "
                "want a draft model of the same vocabulary"
            )


def make_speculation(
    kind: str, runner: Runner, *, other: Runner | None, count: int | None
) -> Speculation | None:
    """The draft of an engine; None where there is none.

    Args:
        kind: "none", "base", "ngram", or a folder whose model is `other`.
        count: tokens to draft each time; None: as many as pay.
    """
    if kind == NONE:
        return None
    if other is not None:
        drafter = ModelDrafter(other)
    else:
        drafter = BaseDrafter(runner) if kind == BASE else NgramDrafter()
    place = runner.plan.placement
    pools = any(
        0 < slots < place.whole for counts in place.slots.values() for slots in counts
    )
    probes = PROBES if pools or place.resident else 0
    return Speculation(runner, drafter, Pace(fixed=count, probes=probes), kind=kind)
