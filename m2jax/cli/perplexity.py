"""`m2jax perplexity`: how well a model predicts a text."""

from pathlib import Path
from typing import Annotated

import typer

from m2jax.cli.engines import open_engine
from m2jax.cli.options import (
    DEFAULT_DISTANCE,
    DEFAULT_LOOKAHEAD,
    DEFAULT_POLICY,
    DEFAULT_SCORER,
    AsJson,
    Debug,
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
from m2jax.cli.tables import columns, number


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
            help="Read so many tokens of the text. Unset: all.",
            show_default=False,
        ),
    ] = None,
    hbm: Hbm = None,
    dram: Dram = None,
    mix: Mix = None,
    scorer: Scorer = DEFAULT_SCORER,
    lookahead: Lookahead = DEFAULT_LOOKAHEAD,
    policy: Policy = DEFAULT_POLICY,
    prefetch: Prefetch = DEFAULT_DISTANCE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Show how well a model predicts a text.

    In nats a token and bits a byte.
    """
    session: Session = ctx.obj
    words = read_text_file(text)
    options = EngineOptions(
        hbm=hbm,
        dram=dram,
        mix=mix,
        scorer=scorer,
        lookahead=lookahead,
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
    asked = {"store": str(folder), "text": str(text), "mix": mix, "scorer": scorer}
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
    return Answer({**found, **asked}, columns(rows))
