"""`m2jax perplexity` and `m2jax bench`: how good, and how fast."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2jax.cli.engines import open_engine
from m2jax.cli.options import (
    DEFAULT_DISTANCE,
    DEFAULT_MIX,
    DEFAULT_POLICY,
    DEFAULT_SCORER,
    AsJson,
    Debug,
    Dram,
    EngineOptions,
    Hbm,
    Mix,
    OptionalStore,
    Policy,
    Prefetch,
    Scorer,
    parse_integers,
)
from m2jax.cli.progress import Activity
from m2jax.cli.prompt import read_text_file
from m2jax.cli.session import Answer, Session
from m2jax.cli.tables import columns, markdown, size
from m2jax.config import ModelConfig
from m2jax.convert.names import tensor_shapes
from m2jax.store.reader import read_store

if TYPE_CHECKING:
    from m2jax.engine import Engine


def perplexity(
    ctx: typer.Context,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="UTF-8 text to be scored.")
    ],
    store: OptionalStore = None,
    context: Annotated[
        int,
        typer.Option(metavar="TOKENS", help="Length of the windows it is cut into."),
    ] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Score the first so many. Unset: all.",
            show_default=False,
        ),
    ] = None,
    hbm: Hbm = None,
    dram: Dram = None,
    mix: Mix = DEFAULT_MIX,
    scorer: Scorer = DEFAULT_SCORER,
    policy: Policy = DEFAULT_POLICY,
    prefetch: Prefetch = DEFAULT_DISTANCE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Show how well a model predicts a text.

    In nats a token and bits a byte."""
    session: Session = ctx.obj
    words = read_text_file(text)
    options = EngineOptions(
        hbm=hbm,
        dram=dram,
        mix=mix,
        scorer=scorer,
        policy=policy,
        context=context,
        distance=prefetch,
    )
    with open_engine(session, store, options) as (engine, folder):
        from m2jax.perplexity import perplexity as score

        with Activity(session.console, "perplexity", unit="tokens") as activity:
            found = score(
                engine,
                words,
                context=context,
                max_tokens=max_tokens,
                progress=activity.update,
            )
    facts = {"store": str(folder), "text": str(text), "mix": mix, "scorer": scorer}
    rows = [
        ("NLL", f"{found['nll_per_token']:.4f} nats a token"),
        ("perplexity", _number(found["perplexity"])),
        ("bits a byte", _number(found["bits_per_byte"])),
        (
            "scored",
            f"{found['tokens']} tokens of {found['bytes']} bytes, in "
            f"{found['windows']} windows of {found['context']}",
        ),
    ]
    return Answer({**found, **facts}, columns(rows))


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def bench(
    ctx: typer.Context,
    store: OptionalStore = None,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            "-p", "--prompt-tokens", metavar="TOKENS,..", help="Lengths of prompts."
        ),
    ] = "512",
    new_tokens: Annotated[
        str,
        typer.Option(
            "-n", "--new-tokens", metavar="TOKENS,..", help="Lengths of new texts."
        ),
    ] = "128",
    repeats: Annotated[
        int, typer.Option("-r", "--repeats", metavar="TIMES", help="Runs of each test.")
    ] = 5,
    hbm: Hbm = None,
    dram: Dram = None,
    mix: Mix = DEFAULT_MIX,
    scorer: Scorer = DEFAULT_SCORER,
    policy: Policy = DEFAULT_POLICY,
    prefetch: Prefetch = DEFAULT_DISTANCE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Measure tokens per second of prompts and of new text.

    pp512 is a prompt of 512 tokens, tg128 a text of 128: mean and sd over repeats."""
    session: Session = ctx.obj
    prompts = parse_integers(prompt_tokens, name="--prompt-tokens")
    texts = parse_integers(new_tokens, name="--new-tokens")
    options = EngineOptions(
        hbm=hbm,
        dram=dram,
        mix=mix,
        scorer=scorer,
        policy=policy,
        context=None,
        distance=prefetch,
    )
    with open_engine(session, store, options) as (engine, folder):
        from m2jax.bench import run_bench

        with Activity(session.console, "bench", unit="tests") as activity:
            found = run_bench(
                engine,
                prompt_tokens=prompts,
                new_tokens=texts,
                repeats=repeats,
                progress=lambda what: activity.add(what, 0),
            )
        about = _about(engine, folder, mix=mix)
    return Answer({**found, "model": about}, _bench_text(found, about))


def _about(engine: "Engine", folder: Path, *, mix: str) -> dict[str, Any]:
    return {
        "store": str(folder),
        "name": folder.resolve().name,
        "store_bytes": sum(entry.bytes for entry in read_store(folder).files.values()),
        "parameters": count_parameters(engine.config),
        "mix": mix,
        "hbm_budget_bytes": engine.plan.hbm_budget_bytes,
        "dram_budget_bytes": engine.plan.dram_budget_bytes,
    }


def count_parameters(config: ModelConfig) -> int:
    return sum(prod(shape) for shape in tensor_shapes(config).values())


def _bench_text(found: dict[str, Any], about: dict[str, Any]) -> str:
    header = ("model", "size", "params", "backend", "hbm", "dram", "mix", "test", "t/s")
    rows = [
        (
            about["name"],
            size(about["store_bytes"]),
            f"{about['parameters'] / 1e6:.2f} M",
            str(found["machine"].get("backend", "n/a")),
            size(about["hbm_budget_bytes"]),
            size(about["dram_budget_bytes"]),
            about["mix"],
            result["test"],
            " ± ".join(
                _rate(result[f"tokens_per_s_{figure}"]) for figure in ("mean", "sd")
            ),
        )
        for result in found["results"]
    ]
    return markdown(header, rows)


def _rate(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
