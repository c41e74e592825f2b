"""`m2jax simulate`: a recorded trace under budgets, policies and rates of any machine.

Loads nothing: a plan, the engine's own directory, and bytes over bandwidths.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2jax.cli.models import Model, read_model, with_predictors
from m2jax.cli.options import (
    DEFAULT_DENSE,
    DEFAULT_DISTANCE,
    DEFAULT_DRAFT,
    DEFAULT_LOOKAHEAD,
    DEFAULT_POLICY,
    DEFAULT_READS,
    DEFAULT_SCORER,
    AsJson,
    Context,
    Debug,
    Dense,
    Dram,
    Hbm,
    Mix,
    PlannedDraft,
    Prefetch,
    Reads,
    Scorer,
    StoreFolder,
)
from m2jax.cli.plan_draft import check_draft, draft_facts, draft_rows
from m2jax.cli.progress import Activity
from m2jax.cli.rates import Link, Memory, Ssd, find_rates, rate_rows
from m2jax.cli.recorded import read_trace
from m2jax.cli.session import Answer, Session
from m2jax.cli.tables import columns, markdown, number, share, size
from m2jax.layer_mixes import format_mixes, parse_mixes
from m2jax.units import parse_bytes

if TYPE_CHECKING:
    from m2jax.plan import MemoryPlan
    from m2jax.predict import Rates
    from m2jax.replay import Replayed


def simulate(
    ctx: typer.Context,
    store: StoreFolder,
    trace: Annotated[
        Path | None,
        typer.Argument(
            metavar="TRACE",
            help="File made by m2jax trace; without it the one that calibrate kept.",
            show_default=False,
        ),
    ] = None,
    hbm: Hbm = None,
    dram: Dram = None,
    mix: Mix = None,
    dense: Dense = DEFAULT_DENSE,
    scorer: Scorer = DEFAULT_SCORER,
    context: Context = None,
    prefetch: Prefetch = DEFAULT_DISTANCE,
    draft: PlannedDraft = DEFAULT_DRAFT,
    reads: Reads = DEFAULT_READS,
    accepted: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS",
            help="Drafted tokens of a sweep that are right, as bench reports them. "
            "Unset: what follows from the chances that plan assumes.",
            show_default=False,
        ),
    ] = None,
    drafted: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS",
            help="With --accepted: drafted tokens of a sweep, as bench reports them. "
            "Unset: 3, 7, 15, 31 or 63, the least that holds those right.",
            show_default=False,
        ),
    ] = None,
    ssd: Ssd = None,
    link: Link = None,
    memory: Memory = None,
    seed: Annotated[
        int, typer.Option(metavar="INTEGER", help="Of the policy random.")
    ] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Replay a trace under any policy, budget and bandwidths.

    Beside Belady, which no policy beats. A replay loads what a run on an accelerator
    would, or one with --emulate-hbm; tokens/s are bytes over the slowest link.
    """
    from m2jax.preparing import default_mix

    session: Session = ctx.obj
    budgets = parse_bytes(hbm, name="--hbm"), parse_bytes(dram, name="--dram")
    check_draft(draft)
    if drafted is not None and accepted is None:
        raise ValueError(f"--drafted {drafted:g}: want --accepted too")
    found = read_model(store, dense=dense)
    recorded = read_trace(store, trace, neurons=found.config.intermediate_size)
    text = mix or recorded.mix or found.own_mix or default_mix(found.planes)
    rates, sources = find_rates(session, store, ssd=ssd, link=link, memory=memory)

    from m2jax.demand import Demand
    from m2jax.draft.setup import check_reads, plan_draft
    from m2jax.ffn_spec import make_specs
    from m2jax.planning import plan_for
    from m2jax.replay import REPLAYED, check_trace, replay

    draft = check_reads(reads, draft)
    mixes = parse_mixes(text, found.config.num_layers)
    specs = make_specs(
        found.config, found.layout, mixes, scorer=scorer, planes=found.planes
    )
    found = with_predictors(found, specs, DEFAULT_LOOKAHEAD)

    def plan_of(demand: Demand) -> "MemoryPlan":
        return plan_for(
            found.config,
            found.layout,
            demand,
            dense_bytes=found.dense_bytes,
            hbm=budgets[0],
            dram=budgets[1],
            context=context,
            distance=prefetch,
            in_place=False,
            reads=reads,
        )

    _, demand, made = plan_draft(plan_of, specs, planes=(), draft="none")
    tokens = check_trace(recorded.trace, demand)
    kind, _, drafting = plan_draft(plan_of, specs, planes=(), draft=draft)
    if accepted is not None and kind == "none":
        raise ValueError(
            f"--accepted {accepted:g}: nothing drafts at these budgets; leave it out, "
            "or give --draft base"
        )
    policies = []
    with Activity(session.console, "simulate", unit="policies") as activity:
        for done, policy in enumerate(REPLAYED):
            activity.update(done, len(REPLAYED))
            replayed = replay(
                recorded.trace,
                made.placement,
                demand,
                found.layout,
                policy=policy,
                seed=seed,
            )
            policies.append(_policy_facts(replayed, made, found, rates))
    drafts = draft_facts(
        drafting,
        found.layout,
        kind=kind,
        rates=rates,
        accepted=accepted,
        drafted=drafted,
    )
    # Without drafts as the engine runs by default, not with no record hit.
    drafts["plain_tokens_per_s"] = next(
        row["tokens_per_s"] for row in policies if row["policy"] == DEFAULT_POLICY
    )
    facts = {
        "model": found.to_json(),
        "trace": {"path": recorded.path, "tokens": tokens},
        "mix": format_mixes(mixes),
        "dense": dense,
        "scorer": scorer,
        "tiers": {
            "hbm": {
                "budget_bytes": made.hbm_budget_bytes,
                "need_bytes": made.footprint.hbm,
            },
            "dram": {
                "budget_bytes": made.dram_budget_bytes,
                "need_bytes": made.footprint.dram,
                "fixed_layers": made.placement.fixed,
                "ring_layers": made.placement.ring,
                "slots": sum(map(sum, made.placement.dram_slots.values())),
            },
        },
        "pools": _pools(made),
        "rates": sources,
        "policies": policies,
        "draft": drafts,
    }
    return Answer(facts, _text(facts))


def _policy_facts(
    replayed: "Replayed", made: "MemoryPlan", found: Model, rates: "Rates"
) -> dict[str, Any]:
    from m2jax.predict import passes_of

    plain = passes_of(
        *(made, found.layout),
        kind="none",
        link_bytes=replayed.link_bytes_per_token,
        ssd_bytes=replayed.ssd_bytes_per_token,
    ).plain
    return {
        "policy": replayed.policy,
        "hit_ratio": replayed.hit_ratio,
        "accesses": replayed.accesses,
        "hits": replayed.hits,
        "loads": replayed.loads,
        "link_bytes": replayed.link_bytes,
        "bytes_per_token": {
            "ssd_to_dram": plain.ssd,
            "dram_to_hbm": plain.link,
        },
        "tokens_per_s": 1 / plain.seconds(rates),
        "bound": plain.bound(rates),
    }


def _pools(made: "MemoryPlan") -> dict[str, dict[str, int]]:
    """Of each plane: layers that are whole on the device, layers with a slot pool, and
    the slots of all pools."""
    place = made.placement
    return {
        plane: {
            "whole_layers": counts.count(place.whole),
            "pooled_layers": sum(0 < count < place.whole for count in counts),
            "slots": sum(count for count in counts if count < place.whole),
        }
        for plane, counts in place.slots.items()
    }


def _text(facts: dict[str, Any]) -> str:
    model, tiers, recorded = facts["model"], facts["tiers"], facts["trace"]
    hbm, dram = tiers["hbm"], tiers["dram"]
    layers = model["num_layers"]
    pools = "; ".join(
        f"{plane} whole in {of['whole_layers']} of {layers} layers"
        + (f", {of['slots']:,} slots in {of['pooled_layers']}" if of["slots"] else "")
        for plane, of in facts["pools"].items()
    )
    rows = [
        ("trace", f"{recorded['path']}, {recorded['tokens']:,} tokens"),
        (
            "mix",
            f"{facts['mix']}, scorer {facts['scorer']}, dense part at "
            f"{facts['dense']} bits",
        ),
        ("HBM", f"{size(hbm['need_bytes'])} of {size(hbm['budget_bytes'])}"),
        ("  planes", pools),
        (
            "DRAM",
            f"{size(dram['need_bytes'])} of {size(dram['budget_bytes'])}: "
            f"{dram['fixed_layers']} layers pinned, a ring of {dram['ring_layers']}"
            + (f", {dram['slots']:,} slots for records" if dram["slots"] else ""),
        ),
        *rate_rows(facts["rates"]),
    ]
    header = (
        *("policy", "hit ratio", "loads a token", "link a token", "SSD a token"),
        *("tokens/s", "bound by"),
    )
    table = [
        (
            row["policy"],
            share(row["hit_ratio"]),
            f"{row['loads'] / recorded['tokens']:,.1f}",
            size(row["bytes_per_token"]["dram_to_hbm"]),
            size(round(row["bytes_per_token"]["ssd_to_dram"])),
            number(row["tokens_per_s"], digits=2),
            row["bound"],
        )
        for row in facts["policies"]
    ]
    lines = [columns(rows), "", markdown(header, table)]
    lines += ["", columns(draft_rows(facts["draft"]))]
    pooled = any(of["pooled_layers"] for of in facts["pools"].values())
    if not pooled and not dram["slots"]:
        lines.append("note: no layer has a slot pool: all policies do the same")
    if dram["slots"]:
        lines.append(
            "note: the SSD's rate is that of whole chunks; single records are slower"
        )
    return "\n".join(lines)
