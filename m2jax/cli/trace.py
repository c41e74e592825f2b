"""`m2jax trace`: the wanted sets of a model on text, into a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2jax.cli.engines import open_engine
from m2jax.cli.new_file import check_out
from m2jax.cli.options import (
    DEFAULT_DENSE,
    DEFAULT_DISTANCE,
    DEFAULT_LOOKAHEAD,
    DEFAULT_POLICY,
    DEFAULT_SCORER,
    AsJson,
    Context,
    Debug,
    Dense,
    Dram,
    EngineOptions,
    Hbm,
    Lookahead,
    Mix,
    Prefetch,
    Scorer,
    StoreFolder,
)
from m2jax.cli.progress import Activity
from m2jax.cli.prompt import read_text_file
from m2jax.cli.session import Answer, Session
from m2jax.cli.tables import columns, size
from m2jax.layer_mixes import format_mixes

if TYPE_CHECKING:
    from m2jax.cache.trace import Trace
    from m2jax.engine import Engine


def trace(
    ctx: typer.Context,
    store: StoreFolder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the trace goes.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--prompt",
            metavar="TEXT",
            help="Record the text that follows it; may be repeated.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Record a UTF-8 text as it stands, token by token.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            "-n",
            "--tokens",
            metavar="TOKENS",
            help="New tokens after each prompt, or tokens of the text.",
        ),
    ] = 256,
    window: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="Length of the windows that the text is cut into.",
        ),
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(metavar="NUMBER", help="After prompts; 0 takes the likeliest."),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(metavar="INTEGER", help="Of what is drawn after prompts.")
    ] = 0,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace FILE.", show_default=False),
    ] = False,
    hbm: Hbm = None,
    dram: Dram = None,
    mix: Mix = None,
    dense: Dense = DEFAULT_DENSE,
    scorer: Scorer = DEFAULT_SCORER,
    lookahead: Lookahead = DEFAULT_LOOKAHEAD,
    context: Context = None,
    prefetch: Prefetch = DEFAULT_DISTANCE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Record which neurons each token wants.

    Budgets and policies do not change what is recorded: simulate replays it under any.
    """
    session: Session = ctx.obj
    if bool(prompt) == (text is not None):
        raise ValueError("give --prompt TEXT (one or several) or --text FILE")
    if tokens < 2:
        raise ValueError(f"--tokens {tokens}: want 2 or more")
    from m2jax.sampling import Sampling

    # What is wrong with these is said before the model is loaded.
    Sampling(temperature=temperature, seed=seed)
    words = None if text is None else read_text_file(text)
    check_out(out, overwrite=overwrite)
    options = EngineOptions(
        hbm=hbm,
        dram=dram,
        mix=mix,
        dense=dense,
        scorer=scorer,
        lookahead=lookahead,
        policy=DEFAULT_POLICY,
        context=context if words is None else window,
        distance=prefetch,
    )
    with open_engine(session, store, options) as (engine, _):
        with Activity(session.console, "trace", unit="tokens") as activity:
            from m2jax.recording import record_generated

            if words is not None:
                found = _of_text(
                    engine, words, tokens=tokens, window=window, activity=activity
                )
            else:
                found = record_generated(
                    engine,
                    prompt or (),
                    new_tokens=tokens,
                    temperature=temperature,
                    seed=seed,
                    progress=activity.update,
                )
        mixes = format_mixes(engine.mixes)
    # What came while the model decoded is not replaced unasked, either.
    check_out(out, overwrite=overwrite)
    found.save(out)
    steps = 1 + max((entry.step for entry in found.entries()), default=-1)
    facts = {
        "trace": str(out),
        "bytes": out.stat().st_size,
        "tokens": steps,
        "wanted_sets": len(found),
        "mix": mixes,
        "scorer": scorer,
    }
    rows = [
        ("trace", f"{out}, {size(facts['bytes'])}"),
        ("tokens", f"{steps:,}, {len(found):,} wanted sets"),
        ("mix", f"{mixes}, scorer {scorer}"),
    ]
    return Answer(facts, columns(rows))


def _of_text(
    engine: "Engine", words: str, *, tokens: int, window: int, activity: Activity
) -> "Trace":
    from m2jax.calibrate.text import calibration_windows
    from m2jax.recording import record_text

    # A text shorter than one window is one.
    length = min(window, tokens)
    windows = calibration_windows(engine.tokenizer, words, length=length, tokens=tokens)
    return record_text(engine, windows, progress=activity.update)
