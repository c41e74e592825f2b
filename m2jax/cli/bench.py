"""`m2jax bench`: tokens per second, in the table that llama-bench made usual."""

from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2jax.cli.engines import open_engine
from m2jax.cli.errors import WithFacts
from m2jax.cli.figures import kernels_line
from m2jax.cli.new_file import check_out
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
    Draft,
    DraftTokens,
    Dram,
    EmulateHbm,
    EmulateSsd,
    EngineOptions,
    Hbm,
    Lookahead,
    Mix,
    OptionalStore,
    Policy,
    Prefetch,
    Reads,
    Scorer,
    parse_integers,
)
from m2jax.cli.progress import Activity
from m2jax.cli.session import Answer, Session
from m2jax.cli.tables import markdown, number, seconds, size
from m2jax.config import ModelConfig
from m2jax.convert.names import tensor_shapes
from m2jax.store.reader import read_store

if TYPE_CHECKING:
    from m2jax.engine import Engine
OVER = (
    "note: over 100 %: the rates are measured apart from the runs, and the disk was "
    "faster in these, or a CPU's caches gave what counts as memory's"
)


def bench(
    ctx: typer.Context,
    store: OptionalStore = None,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            "-p",
            "--prompt-tokens",
            metavar="TOKENS",
            help="Lengths of prompts to time, as in 128,512; 0: none.",
        ),
    ] = "512",
    new_tokens: Annotated[
        str,
        typer.Option(
            "-n",
            "--new-tokens",
            metavar="TOKENS",
            help="Lengths of new text to time, as in 32,128; 0: none.",
        ),
    ] = "128",
    repeats: Annotated[
        int,
        typer.Option("-r", "--repeats", metavar="TIMES", help="Runs of each test."),
    ] = 5,
    hbm: Hbm = None,
    dram: Dram = None,
    mix: Mix = None,
    dense: Dense = DEFAULT_DENSE,
    scorer: Scorer = DEFAULT_SCORER,
    lookahead: Lookahead = DEFAULT_LOOKAHEAD,
    policy: Policy = DEFAULT_POLICY,
    context: Context = None,
    prefetch: Prefetch = DEFAULT_DISTANCE,
    draft: Draft = DEFAULT_DRAFT,
    draft_tokens: DraftTokens = None,
    reads: Reads = DEFAULT_READS,
    emulate_ssd: EmulateSsd = None,
    emulate_hbm: EmulateHbm = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a Chrome trace of what the tiers did, for ui.perfetto.dev.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace that FILE.", show_default=False),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Measure tokens per second of prompts and of new text.

    pp512 is a prompt of 512 tokens, tg128 a text of 128: mean and sample sd. Beside
    them stands the roofline, the least time of a token by the machine's own rates of
    SSD, link and memory (arithmetic not counted, reads going on while tokens are
    drafted), how much of it was reached, and where the time went. Those rates are
    measured once, with a temporary file of 128 MiB beside the store, and again by
    doctor; the SSD's also beside every run that reads by O_DIRECT, from the store's own
    files.
    """
    session: Session = ctx.obj
    prompts = _lengths(prompt_tokens, name="--prompt-tokens")
    texts = _lengths(new_tokens, name="--new-tokens")
    if profile is not None:
        check_out(profile, overwrite=overwrite)
    options = EngineOptions(
        hbm=hbm,
        dram=dram,
        mix=mix,
        dense=dense,
        scorer=scorer,
        lookahead=lookahead,
        policy=policy,
        context=context,
        distance=prefetch,
        draft=draft,
        draft_tokens=draft_tokens,
        emulate_ssd=emulate_ssd,
        reads=reads,
        in_place=False if emulate_hbm else None,
    )
    with open_engine(session, store, options) as (engine, folder):
        from m2jax.bandwidths import kept
        from m2jax.bench import run_bench
        from m2jax.store import open_store, raw_rate
        from m2jax.timeline import Timeline

        timeline, ssd_rate = Timeline(), None
        if engine.ssd_reads == "direct" and engine.plan.ssd_bytes_per_token:
            opened = open_store(folder)
            ssd_rate = partial(raw_rate, opened, plane=_read_plane(engine))
        with Activity(session.console, "bench") as activity:
            found = run_bench(
                engine,
                prompt_tokens=prompts,
                new_tokens=texts,
                repeats=repeats,
                progress=lambda line: activity.add(line, 0),
                # A rate held down has nothing to do with this machine's.
                machine=None if emulate_ssd else kept(folder),
                ssd_rate=ssd_rate,
                timeline=timeline,
            )
        about = _about(engine.config, folder)
    facts = {**found, "model": about}
    text = _table(facts)
    if profile is not None:
        try:
            timeline.write(profile)
        except OSError as error:
            raise WithFacts(facts, text) from error
    return Answer(facts, text)


def _read_plane(engine: "Engine") -> str:
    """Of the planes that a token reads from SSD the one of most bytes: reads are mostly
    of its size."""
    tiers = engine.runner.tiers
    place = tiers.placement
    read = {plane for layer in place.dram_layers for plane in place.streamed(layer)}
    return max(read, key=lambda plane: (tiers.record_bytes[plane], plane))


def _lengths(text: str, *, name: str) -> list[int]:
    return [length for length in parse_integers(text, name=name) if length != 0]


def _about(config: ModelConfig, folder: Path) -> dict[str, Any]:
    files = read_store(folder).files.values()
    return {
        "name": folder.resolve().name,
        "store_bytes": sum(entry.bytes for entry in files),
        "parameters": sum(prod(shape) for shape in tensor_shapes(config).values()),
    }


def _table(facts: dict[str, Any]) -> str:
    header = (
        "model",
        "size",
        "params",
        "backend",
        "hbm",
        "dram",
        "mix",
        "dense",
        "draft",
        "test",
        "t/s",
    )
    about, settings = facts["model"], facts["settings"]
    rows = [
        (
            about["name"],
            size(about["store_bytes"]),
            f"{about['parameters'] / 1e6:.2f} M",
            facts["machine"]["backend"],
            size(settings["hbm_budget_bytes"]),
            size(settings["dram_budget_bytes"]),
            settings["mix"],
            str(settings["dense"]),
            settings["draft"],
            result["test"],
            f"{number(result['tokens_per_s_mean'], digits=2)} ± "
            f"{number(result['tokens_per_s_sd'], digits=2)}",
        )
        for result in facts["results"]
    ]
    lines = [markdown(header, rows), ""]
    how = settings["ssd_reads"]
    lines += [_details(result, how=how) for result in facts["results"]]
    rooflines = [result["roofline"] for result in facts["results"]]
    if any(reached and reached["percent"] > 100 for reached in rooflines):
        lines.append(OVER)
    if settings["ssd_why"]:
        lines.append(f"SSD: {how}, {settings['ssd_why']}")
    lines.append(f"kernels: {kernels_line(facts['kernels'])}")
    return "\n".join([*lines, f"peak memory {size(facts['peak_rss_bytes'])}"])


def _details(result: dict[str, Any], *, how: str) -> str:
    """Bytes a token, roofline, drafts, and where the time went, in one line.

    Args:
        how: by which SSD reads go.
    """
    moved, reached = result["bytes_per_token"], result["roofline"]
    drafts = result["drafts"]
    parts = [
        f"SSD ({how}) {size(round(moved['ssd_to_dram']))}, link "
        f"{size(round(moved['dram_to_hbm']))} a token"
    ]
    if result["ssd_retries"]:
        parts.append(f"{result['ssd_retries']:,} reads tried again")
    if reached is not None:
        percent = reached["percent"]
        parts.append(
            f"roofline {1e3 * reached['bound_s']:.3g} ms a token ({reached['bound']}), "
            f"{percent:.{0 if percent >= 10 else 1}f} % of it reached"
        )
    if drafts["drafted"]:
        parts.append(
            f"drafts: {drafts['accepted']:,} of {drafts['drafted']:,} right, "
            f"{drafts['accepted_per_sweep']:.1f} a sweep, step "
            f"{seconds(drafts['step_s'])}, sweep {seconds(drafts['sweep_s'])}"
        )
    parts.append(
        ", ".join(
            f"{name} {spent:.2f} ms"
            for name, spent in result["milliseconds_per_token"].items()
        )
    )
    return f"{result['test']}: {'; '.join(parts)}"
