"""`m2jax plan`: what would lie where. Needs a config, no weights and no tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2jax.cli.errors import WithFacts
from m2jax.cli.models import Model, read_model, with_predictors
from m2jax.cli.options import (
    DEFAULT_DENSE,
    DEFAULT_DISTANCE,
    DEFAULT_DRAFT,
    DEFAULT_LOOKAHEAD,
    DEFAULT_READS,
    DEFAULT_SCORER,
    AsJson,
    Context,
    Debug,
    Dense,
    Dram,
    EmulateHbm,
    Hbm,
    Mix,
    PlannedDraft,
    Prefetch,
    Reads,
    Scorer,
)
from m2jax.cli.plan_draft import check_draft, draft_facts, draft_rows
from m2jax.cli.session import Answer
from m2jax.cli.tables import columns, size
from m2jax.errors import DoesNotFit
from m2jax.layer_mixes import format_mixes, parse_mixes
from m2jax.units import parse_bytes

if TYPE_CHECKING:
    from m2jax.plan import MemoryPlan


def plan(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Store, Hugging Face folder, or a config.json alone.",
        ),
    ],
    hbm: Hbm = None,
    dram: Dram = None,
    mix: Mix = None,
    dense: Dense = DEFAULT_DENSE,
    scorer: Scorer = DEFAULT_SCORER,
    context: Context = None,
    prefetch: Prefetch = DEFAULT_DISTANCE,
    draft: PlannedDraft = DEFAULT_DRAFT,
    reads: Reads = DEFAULT_READS,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="SSD,LINK,HBM",
            help="Bytes a second, as in 3GB,25GB,900GB: predicts tokens/s of a device "
            "with such a link; a CPU has none.",
            show_default=False,
        ),
    ] = None,
    emulate_hbm: EmulateHbm = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Show what would lie where, and what moves per token.

    Exit code 3 if it does not fit. Sizes in binary units.
    """
    hbm_bytes = parse_bytes(hbm, name="--hbm")
    dram_bytes = parse_bytes(dram, name="--dram")
    from m2jax.demand import Demand
    from m2jax.draft.setup import check_reads, plan_draft
    from m2jax.ffn_spec import make_specs
    from m2jax.planning import check_free, plan_for
    from m2jax.predict import Rates
    from m2jax.preparing import default_mix

    check_draft(draft)
    draft = check_reads(reads, draft)
    speeds = None if rates is None else Rates.parse(rates)

    found = read_model(model, dense=dense)
    named = mix or found.own_mix or default_mix(found.planes)
    mixes = parse_mixes(named, found.config.num_layers)
    specs = make_specs(
        found.config, found.layout, mixes, scorer=scorer, planes=found.planes
    )
    found = with_predictors(found, specs, DEFAULT_LOOKAHEAD)
    asked = {
        "model": found.to_json(),
        "mix": format_mixes(mixes),
        "dense": dense,
        "scorer": scorer,
        "prefetch": prefetch,
    }

    def plan_of(demand: Demand) -> "MemoryPlan":
        return plan_for(
            found.config,
            found.layout,
            demand,
            dense_bytes=found.dense_bytes,
            hbm=hbm_bytes,
            dram=dram_bytes,
            context=context,
            distance=prefetch,
            in_place=False if speeds or emulate_hbm else None,
            reads=reads,
        )

    try:
        kind, demand, made = plan_draft(plan_of, specs, planes=(), draft=draft)
    except DoesNotFit as error:
        raise WithFacts(
            {
                "fits": False,
                **asked,
                "tiers": {
                    "hbm": {"budget_bytes": hbm_bytes},
                    "dram": {"budget_bytes": dram_bytes},
                    "ssd": {"store_bytes": found.store_bytes},
                },
            }
        ) from error
    notes = list(found.notes)
    try:
        check_free(made)
    except DoesNotFit as error:
        notes.append(f"not on this machine as it is: {error}")
    facts = {"fits": True, **asked, **_plan_facts(made, found), "notes": notes}
    facts["slots"] = {
        plane: {
            "wanted_per_layer": max(wanted.get(plane, 0) for wanted in demand.wanted),
            "least_per_layer": min(made.placement.slots[plane]),
            "most_per_layer": max(made.placement.slots[plane]),
        }
        for plane in demand.planes
    }
    facts["draft"] = draft_facts(made, found.layout, kind=kind, rates=speeds)
    return Answer(facts, _plan_text(facts))


def _plan_facts(made: "MemoryPlan", model: Model) -> dict[str, Any]:
    foot, placement = made.footprint, made.placement
    return {
        "context": made.context,
        "device": "cpu" if placement.in_place else "accelerator",
        "resident": placement.resident,
        "tiers": {
            "hbm": {
                "budget_bytes": made.hbm_budget_bytes,
                "need_bytes": foot.hbm,
                "dense_bytes": foot.dense,
                "kv_bytes": foot.kv,
                "record_bytes": foot.records,
                "staging_bytes": foot.staging,
            },
            "dram": {
                "budget_bytes": made.dram_budget_bytes,
                "need_bytes": foot.dram,
                "fixed_bytes": foot.dram_fixed,
                "ring_bytes": foot.dram_ring,
                "fixed_layers": placement.fixed,
                "ring_layers": placement.ring,
                "record_bytes": foot.dram_records,
                "slots": sum(map(sum, placement.dram_slots.values())),
            },
            "ssd": {"store_bytes": model.store_bytes},
        },
        "bytes_per_token": {
            "ssd_to_dram": made.ssd_bytes_per_token,
            "dram_to_hbm_at_most": made.link_bytes_per_token,
        },
    }


def _plan_text(facts: dict[str, Any]) -> str:
    model, tiers, moved = facts["model"], facts["tiers"], facts["bytes_per_token"]
    hbm, dram = tiers["hbm"], tiers["dram"]
    slots = ", ".join(
        f"{plane} {count['least_per_layer']}"
        + (
            ""
            if count["least_per_layer"] == count["most_per_layer"]
            else f" to {count['most_per_layer']}"
        )
        + f" (wanted {count['wanted_per_layer']})"
        for plane, count in facts["slots"].items()
    )
    most = "at most " if dram["slots"] else ""
    rows = [
        (
            "model",
            f"{model['source']}: {model['model_type']}, {model['original_dtype']}, "
            f"{model['num_layers']} layers of {model['neurons_per_layer']} neurons",
        ),
        (
            "mix",
            f"{facts['mix']}, scorer {facts['scorer']}, dense part at "
            f"{facts['dense']} bits",
        ),
        ("context", f"{facts['context']} tokens"),
        (
            "device",
            "this CPU: uses rows in place in DRAM (--emulate-hbm: an accelerator)"
            if facts["device"] == "cpu"
            else "an accelerator with memory of its own",
        ),
        ("HBM", f"{size(hbm['need_bytes'])} of {size(hbm['budget_bytes'])}"),
        ("  dense part", size(hbm["dense_bytes"])),
        ("  KV cache", size(hbm["kv_bytes"])),
        ("  records", size(hbm["record_bytes"])),
        ("  in transit", size(hbm["staging_bytes"])),
        ("  slots a layer", slots or "none"),
        ("DRAM", f"{size(dram['need_bytes'])} of {size(dram['budget_bytes'])}"),
        ("  fixed area", f"{size(dram['fixed_bytes'])}, {dram['fixed_layers']} layers"),
        ("  ring", f"{size(dram['ring_bytes'])}, {dram['ring_layers']} layers"),
        ("  records", f"{size(dram['record_bytes'])}, {dram['slots']:,} slots"),
        ("SSD", f"{size(tiers['ssd']['store_bytes'])} store"),
        ("SSD to DRAM", f"{most}{size(moved['ssd_to_dram'])} a token"),
        ("DRAM to HBM", f"at most {size(moved['dram_to_hbm_at_most'])} a token"),
        *draft_rows(facts["draft"]),
    ]
    lines = [columns(rows), "fits" + (", all resident" if facts["resident"] else "")]
    return "\n".join([*lines, *(f"note: {note}" for note in facts["notes"])])
