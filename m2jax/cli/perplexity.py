"""`m2jax perplexity`: how well a model predicts a text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from m2jax.choices import read_questions
from m2jax.cli.engines import open_engine
from m2jax.cli.options import (
    DEFAULT_DENSE,
    DEFAULT_DISTANCE,
    DEFAULT_LOOKAHEAD,
    DEFAULT_POLICY,
    DEFAULT_SCORER,
    AsJson,
    Debug,
    Dense,
    Dram,
    EngineOptions,
    Hbm,
    Lookahead,
    Mix,
    OptionalStore,
    Policy,
    Prefetch,
    Scorer,
)
from m2jax.cli.progress import Activity
from m2jax.cli.prompt import read_text_file
from m2jax.cli.session import Answer, Session
from m2jax.cli.tables import columns, number, share
from m2jax.layer_mixes import format_mixes
from m2jax.store.reader import read_store


def perplexity(
    ctx: typer.Context,
    store: OptionalStore = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="UTF-8 text to be scored.", show_default=False
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Multiple-choice questions instead of a text: JSON lines as in ARC, "
            "PIQA or BLiMP.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="QUESTIONS", help="Only so many of them.", show_default=False
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option(metavar="TOKENS", help="Length of the windows it is cut into."),
    ] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Read so many tokens of the text. Unset: all.",
            show_default=False,
        ),
    ] = None,
    kl: Annotated[
        bool | None,
        typer.Option(
            "--kl/--no-kl",
            help="Compare every token with the 16-bit model, in the same pass. Unset: "
            "where the store has the 16-bit plane.",
            show_default=False,
        ),
    ] = None,
    hbm: Hbm = None,
    dram: Dram = None,
    mix: Mix = None,
    dense: Dense = DEFAULT_DENSE,
    scorer: Scorer = DEFAULT_SCORER,
    lookahead: Lookahead = DEFAULT_LOOKAHEAD,
    policy: Policy = DEFAULT_POLICY,
    prefetch: Prefetch = DEFAULT_DISTANCE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Show how well a model predicts a text, or answers questions.

    In nats a token and bits a byte; beside the 16-bit model: KL divergence, how often
    both find the same token likeliest, and the tokens that suffer most.
    """
    session: Session = ctx.obj
    if (text is None) == (choices is None):
        raise ValueError(
            "give --text FILE or --choices FILE, one of them; "
            'see "m2jax perplexity --help"'
        )
    if choices is not None and kl:
        raise ValueError(
            "--kl compares tokens of a --text: leave it out with --choices"
        )
    words = None if text is None else read_text_file(text)
    questions = None if choices is None else read_questions(choices)
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
        planes=_planes(store, kl) if words is not None else (),
    )
    asked = {
        "text": None if text is None else str(text),
        "choices": None if choices is None else str(choices),
        "scorer": scorer,
    }
    with open_engine(session, store, options) as (engine, folder):
        from m2jax.choices import score_questions
        from m2jax.perplexity import perplexity as score

        asked |= {"store": str(folder), "mix": format_mixes(engine.mixes)}
        if questions is not None:
            with Activity(session.console, "choices", unit="questions") as activity:
                found = score_questions(
                    engine, questions, limit=limit, progress=activity.update
                )
            return Answer({**found, **asked}, columns(_choice_rows(found)))
        with Activity(session.console, "perplexity", unit="tokens") as activity:
            found = score(
                engine,
                words or "",
                context=context,
                max_tokens=max_tokens,
                progress=activity.update,
            )
    return Answer({**found, **asked}, columns(_text_rows(found)))


def _planes(store: Path | None, kl: bool | None) -> tuple[str, ...]:
    """The 16-bit plane, where it is to be compared with."""
    if kl is None:
        kl = store is None or "w16" in read_store(store).planes
    return ("w16",) if kl else ()


def _text_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("NLL", f"{number(found['nll_per_token'])} nats a token"),
        ("perplexity", number(found["perplexity"])),
        ("bits a byte", number(found["bits_per_byte"])),
        (
            "scored",
            f"{found['tokens']:,} tokens, {found['bytes']:,} bytes, "
            f"{found['windows']:,} windows of {found['context']} tokens",
        ),
    ]
    beside = found["divergence"]
    if beside is None:
        return rows
    tail = beside["kl_quantiles"]
    rows += [
        (
            "KL to 16 bits",
            f"{number(beside['kl_mean'], digits=6)} +- "
            f"{number(beside['kl_error'], digits=6)} nats a token; median "
            f"{number(tail['50'], digits=6)}, 99 % {number(tail['99'], digits=5)}, "
            f"most {number(beside['kl_max'])}",
        ),
        ("same top token", share(beside["same_top_share"])),
        (
            "16-bit NLL",
            f"{number(beside['reference_nll_per_token'])}; this one is "
            f"{number(beside['nll_ratio'], digits=5)} +- "
            f"{number(beside['nll_ratio_error'], digits=5)} above",
        ),
    ]
    for place, token in enumerate(beside["worst"]):
        rows.append(
            (
                "" if place else "worst tokens",
                f"{number(token['kl'])}  {token['before']!r} -> {token['text']!r}, "
                f"log p {number(token['logprob'], digits=2)}, at 16 bits "
                f"{number(token['reference_logprob'], digits=2)}",
            )
        )
    return rows


def _choice_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("questions", f"{found['questions']:,}, chance {share(found['chance'])}")]
    for name, field in (
        ("right, by bytes", "accuracy_per_byte"),
        ("right, by tokens", "accuracy_per_token"),
        ("right, by sum", "accuracy_by_sum"),
    ):
        rows.append(
            (name, f"{share(found[field])} +- {share(found[field + '_error'])}")
        )
    return rows
