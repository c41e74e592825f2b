"""`m2jax calibrate` and `m2jax search-mix`: a model measured on text, results kept."""

from pathlib import Path
from typing import Annotated

import typer

from m2jax.cli.compilation import keep_compiled
from m2jax.cli.errors import WithFacts
from m2jax.cli.options import (
    DEFAULT_SCORER,
    AsJson,
    Debug,
    Dram,
    Hbm,
    Mix,
    StoreFolder,
    parse_integers,
)
from m2jax.cli.progress import Stages
from m2jax.cli.prompt import read_text_file
from m2jax.cli.session import Answer, Session
from m2jax.cli.tables import columns, number, size
from m2jax.units import parse_bytes

Text = Annotated[
    Path,
    typer.Option(metavar="FILE", help="UTF-8 text of the kind the model will work on."),
]
Window = Annotated[
    int, typer.Option(metavar="TOKENS", help="Length of the windows it is cut into.")
]


def calibrate(
    ctx: typer.Context,
    store: StoreFolder,
    text: Text,
    tokens: Annotated[
        int, typer.Option(metavar="TOKENS", help="How much of the text is used.")
    ] = 16384,
    window: Window = 256,
    mix: Mix = None,
    lookahead: Annotated[
        str,
        typer.Option(
            metavar="LAYERS",
            help="Train predictors that see so many layers before, some of 0,1,2 (2 "
            "is measured, generate takes 0 and 1); none: train none.",
        ),
    ] = "0,1",
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of the predictors. Unset: an eighth of the hidden size.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(metavar="N", help="Of training, at most.")
    ] = 20,
    seed: Annotated[int, typer.Option(metavar="N", help="Of training.")] = 0,
    hbm: Hbm = None,
    dram: Dram = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Measure sparsity and train predictors of the wanted neurons.

    Results go into the store. Interrupted, the same command goes on.
    """
    session: Session = ctx.obj
    session.hint = "run the same command again to go on"
    words = read_text_file(text)
    ahead = (
        ()
        if lookahead == "none"
        else tuple(parse_integers(lookahead, name="--lookahead"))
    )
    if any(layers not in range(3) for layers in ahead):
        raise ValueError(f"--lookahead {lookahead}: want none or some of 0,1,2")
    with Stages(session.console) as stages:
        keep_compiled()
        from m2jax.calibrate.fit import FitOptions
        from m2jax.calibrate.report import report_text
        from m2jax.calibrate.run import calibrate as run

        facts = run(
            store,
            words,
            mix=mix,
            tokens=tokens,
            window=window,
            lookaheads=ahead,
            options=FitOptions(rank=rank, seed=seed, epochs=epochs),
            hbm=hbm,
            dram=dram,
            progress=stages.update,
        )
    return Answer({"store": str(store), **facts}, report_text(facts))


def search_mix(
    ctx: typer.Context,
    store: StoreFolder,
    text: Text,
    bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="Most bits a feed-forward weight has on average.",
            show_default=False,
        ),
    ] = None,
    bytes_per_token: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Most that moves to the device a token where nothing is hit and the "
            "4-bit plane is resident, as in 2MiB.",
            show_default=False,
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            metavar="kl|entropy",
            help="Least KL to the 16-bit model, layer by layer; or least entropy of "
            "the model's own text, as the paper has it.",
        ),
    ] = "kl",
    scorer: Annotated[
        str,
        typer.Option(metavar="base|gate|lowrank", help="What ranks the neurons."),
    ] = DEFAULT_SCORER,
    skip: Annotated[
        bool,
        typer.Option("--skip", help="Neurons may be left out.", show_default=False),
    ] = False,
    tokens: Annotated[
        int, typer.Option(metavar="TOKENS", help="How much of the text is used.")
    ] = 4096,
    window: Window = 256,
    hbm: Hbm = None,
    dram: Dram = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Find the precision mix for a budget; later runs use it.

    It becomes the store's own: what a run without --mix takes.
    """
    session: Session = ctx.obj
    words = read_text_file(text)
    with Stages(session.console) as stages:
        keep_compiled()
        from m2jax.calibrate.search_mix import NotKept
        from m2jax.calibrate.search_mix import search_mix as run

        try:
            facts = run(
                store,
                words,
                bits=bits,
                bytes_per_token=parse_bytes(bytes_per_token, name="--bytes-per-token"),
                objective=objective,
                scorer=scorer,
                allow_skip=skip,
                tokens=tokens,
                window=window,
                hbm=hbm,
                dram=dram,
                progress=stages.update,
            )
        except NotKept as error:
            raise WithFacts({"store": str(store), **error.facts}) from error
    unit = facts["unit"]

    def cost(value: float) -> str:
        return f"{value:.3g} {unit}" if bits else f"{size(value)} a token"

    rows = [
        ("mix", facts["mix"]),
        ("costs", f"{cost(facts['cost'])} of {cost(facts['budget'])}"),
    ]
    if objective == "kl":
        same = facts["uniform"]
        rows += [
            ("KL to 16 bits", f"{number(facts['kl'], digits=6)} nats a token"),
            (
                "one mix for all",
                f"{same['mix']} at best: {number(same['kl'], digits=6)}",
            ),
        ]
    else:
        rows.append(("entropy", f"{number(facts['entropy'])} nats a token"))
    if scorer != DEFAULT_SCORER:
        rows.append(("ranked by", f"{scorer}: use it with --scorer {scorer}"))
    rows.append(("measured", f"{len(facts['measured'])} mixes; kept in {store}"))
    return Answer({"store": str(store), **facts}, columns(rows))
