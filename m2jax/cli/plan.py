"""`m2jax plan`: what would lie where. Needs a config, no weights and no tokenizer."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2jax.cli.errors import WithFacts
from m2jax.cli.options import (
    DEFAULT_DISTANCE,
    DEFAULT_DRAFT,
    DEFAULT_SCORER,
    AsJson,
    Context,
    Debug,
    Dram,
    Hbm,
    Mix,
    Prefetch,
    Scorer,
)
from m2jax.cli.session import Answer
from m2jax.cli.tables import columns, number, share, size
from m2jax.config import ModelConfig
from m2jax.errors import DoesNotFit
from m2jax.hf_config import config_from_hf
from m2jax.layer_mixes import format_mixes, parse_mixes
from m2jax.layout import ORIGINAL_DTYPES, PLANES, Layout, make_layout
from m2jax.store import open_store
from m2jax.store.calibration import read_json_part
from m2jax.strict_json import read_json, show
from m2jax.units import parse_bytes

if TYPE_CHECKING:
    from m2jax.plan import MemoryPlan
    from m2jax.predict import Rates

CONFIG = "config.json"
MANIFEST = "manifest.json"
GENERATION = "generation_config.json"
GROUP_SIZE = 64
# Chances that a drafted token is right, for which a plan says what follows.
ACCEPTANCES = (0.9, 0.95, 0.98)
# The widest, so that a plan never promises too much.
ASSUMED_DTYPE = "float32"


@dataclass(frozen=True)
class Model:
    """What a plan needs of a model.

    store_bytes: of its store on SSD. planes: those of the store. own_mix: found by
    search-mix. notes: what was assumed.
    """

    source: str
    config: ModelConfig
    layout: Layout
    dense_bytes: int
    store_bytes: int
    planes: tuple[str, ...] = PLANES
    own_mix: str | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "model_type": self.config.model_type,
            "num_layers": self.config.num_layers,
            "hidden_size": self.config.hidden_size,
            "neurons_per_layer": self.config.intermediate_size,
            "context": self.config.context,
            "original_dtype": self.layout.original_dtype,
            "group": self.layout.group,
        }


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
    scorer: Scorer = DEFAULT_SCORER,
    context: Context = None,
    prefetch: Prefetch = DEFAULT_DISTANCE,
    draft: Annotated[
        str,
        typer.Option(
            metavar="auto|base|ngram|none",
            help="What proposes tokens for one sweep to verify. auto: the 4-bit plane, "
            "where not all fits HBM.",
        ),
    ] = DEFAULT_DRAFT,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="SSD,LINK,HBM",
            help="Bytes a second, as in 3GB,25GB,900GB: predicts tokens/s.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Show what would lie where, and what moves per token.

    Exit code 3 if it does not fit. Sizes in binary units.
    """
    hbm_bytes = parse_bytes(hbm, name="--hbm")
    dram_bytes = parse_bytes(dram, name="--dram")
    from m2jax.draft.setup import plan_draft
    from m2jax.ffn_spec import make_specs
    from m2jax.loading import DEFAULT_MIX, check_free, plan_for
    from m2jax.plan import Demand
    from m2jax.predict import Rates

    if draft not in ("auto", "base", "ngram", "none"):
        raise ValueError(f"--draft {draft}: want auto, base, ngram or none in a plan")
    speeds = None if rates is None else Rates.parse(rates)

    found = read_model(model)
    mixes = parse_mixes(mix or found.own_mix or DEFAULT_MIX, found.config.num_layers)
    specs = make_specs(
        found.config, found.layout, mixes, scorer=scorer, planes=found.planes
    )
    asked = {
        "model": found.to_json(),
        "mix": format_mixes(mixes),
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
        )

    try:
        kind, demand, made = plan_draft(
            plan_of, specs, found.layout, planes=(), draft=draft
        )
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
    notes = [*found.notes, *made.notes]
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
    facts["draft"] = _draft_facts(made, found.layout, kind=kind, rates=speeds)
    return Answer(facts, _plan_text(facts))


def read_model(path: Path) -> Model:
    """A model's shapes from its store, its folder or its config.json.

    Raises:
        ValueError, NotImplementedError: it is none of these, or its config is refused.
        StoreError: the store is damaged.
    """
    from m2jax.dense_part import shaped_dense_bytes, stored_dense_bytes

    if path.is_dir() and ((path / MANIFEST).exists() or not (path / CONFIG).exists()):
        store = open_store(path)
        own = read_json_part(store, "mix")
        return Model(
            source=str(path),
            config=store.config,
            layout=store.layout,
            dense_bytes=stored_dense_bytes(store),
            store_bytes=sum(entry.bytes for entry in store.files.values()),
            planes=store.planes,
            own_mix=None if own is None else str(own["mix"]),
        )
    file = path / CONFIG if path.is_dir() else path
    raw = read_json(file)
    beside = file.parent / GENERATION
    config = config_from_hf(
        raw,
        where=str(file),
        generation=read_json(beside) if beside.is_file() else None,
    )
    named = _dtype(raw, where=str(file))
    dtype = named or ASSUMED_DTYPE
    layout = make_layout(config, original_dtype=dtype, group_size=GROUP_SIZE)
    dense_bytes = shaped_dense_bytes(config, layout, item_bytes=ORIGINAL_DTYPES[dtype])
    planes_bytes = sum(layout.plane_bytes(plane) for plane in PLANES)
    return Model(
        source=str(path),
        config=config,
        layout=layout,
        dense_bytes=dense_bytes,
        store_bytes=dense_bytes + config.num_layers * planes_bytes,
        notes=() if named else (f"{file} names no dtype: {dtype} is assumed",),
    )


def _dtype(raw: dict[str, Any], *, where: str) -> str | None:
    """The checkpoint's dtype as both generations of config.json give it."""
    for field in ("dtype", "torch_dtype"):
        value = raw.get(field)
        if value is None:
            continue
        if not isinstance(value, str) or value not in ORIGINAL_DTYPES:
            raise ValueError(
                f"{where}: {field}: want one of {', '.join(ORIGINAL_DTYPES)}, "
                f"got {show(value)}"
            )
        return value
    return None


def _plan_facts(made: "MemoryPlan", model: Model) -> dict[str, Any]:
    foot, placement = made.footprint, made.placement
    return {
        "context": made.context,
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
            },
            "ssd": {"store_bytes": model.store_bytes},
        },
        "bytes_per_token": {
            "ssd_to_dram": made.ssd_bytes_per_token,
            "dram_to_hbm_at_most": made.link_bytes_per_token,
        },
    }


def _draft_facts(
    made: "MemoryPlan", layout: Layout, *, kind: str, rates: "Rates | None"
) -> dict[str, Any]:
    """What a draft would give, by how often it is right."""
    from m2jax.predict import expect, passes_of

    passes = passes_of(made, layout, kind=kind)
    facts: dict[str, Any] = {
        "kind": kind,
        "plain_tokens_per_s": None
        if rates is None
        else 1 / passes.plain.seconds(rates),
    }
    if kind != "none":
        facts["sweep_bytes"] = {
            "ssd_to_dram": passes.sweep.ssd,
            "dram_to_hbm": passes.sweep.link,
        }
        facts["expected"] = [
            asdict(expect(passes, acceptance, rates=rates))
            for acceptance in ACCEPTANCES
        ]
    return facts


def _draft_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows, plain = [("draft", facts["kind"])], facts["plain_tokens_per_s"]
    if plain is not None:
        rows.append(("  without", f"{number(plain, digits=2)} tokens/s predicted"))
    for found in facts.get("expected", ()):
        rate = found["tokens_per_s"]
        rows.append(
            (
                f"  if {share(found['acceptance'])} is right",
                f"{found['drafted']} drafted, {found['tokens_per_sweep']:.1f} tokens a "
                f"sweep; a token moves {size(int(found['ssd_bytes_per_token']))} from "
                f"SSD, {size(int(found['link_bytes_per_token']))} to HBM"
                + ("" if rate is None else f"; {number(rate, digits=2)} tokens/s"),
            )
        )
    return rows


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
    rows = [
        (
            "model",
            f"{model['source']}: {model['model_type']}, {model['original_dtype']}, "
            f"{model['num_layers']} layers of {model['neurons_per_layer']} neurons",
        ),
        ("mix", f"{facts['mix']}, scorer {facts['scorer']}"),
        ("context", f"{facts['context']} tokens"),
        ("HBM", f"{size(hbm['need_bytes'])} of {size(hbm['budget_bytes'])}"),
        ("  dense part", size(hbm["dense_bytes"])),
        ("  KV cache", size(hbm["kv_bytes"])),
        ("  records", size(hbm["record_bytes"])),
        ("  in transit", size(hbm["staging_bytes"])),
        ("  slots a layer", slots or "none"),
        ("DRAM", f"{size(dram['need_bytes'])} of {size(dram['budget_bytes'])}"),
        ("  fixed area", f"{size(dram['fixed_bytes'])}, {dram['fixed_layers']} layers"),
        ("  ring", f"{size(dram['ring_bytes'])}, {dram['ring_layers']} layers"),
        ("SSD", f"{size(tiers['ssd']['store_bytes'])} store"),
        ("SSD to DRAM", f"{size(moved['ssd_to_dram'])} a token"),
        ("DRAM to HBM", f"at most {size(moved['dram_to_hbm_at_most'])} a token"),
        *_draft_rows(facts["draft"]),
    ]
    lines = [columns(rows), "fits" + (", all resident" if facts["resident"] else "")]
    return "\n".join([*lines, *(f"note: {note}" for note in facts["notes"])])
