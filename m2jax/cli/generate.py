"""`m2jax generate`: text after a prompt, then figures of what moved where."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2jax.cli.engines import open_engine
from m2jax.cli.figures import figures
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
)
from m2jax.cli.progress import Activity
from m2jax.cli.prompt import read_prompt
from m2jax.cli.session import Answer, Session, write

if TYPE_CHECKING:
    from m2jax.engine import Engine
    from m2jax.stream import Generation, Stream

TOKENIZER_FOLDER = "tokenizer"


def generate(
    ctx: typer.Context,
    store: OptionalStore = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p", "--prompt", metavar="TEXT", help="The prompt; - reads it from stdin."
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The prompt, from a UTF-8 file.")
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="The prompt as token ids.")
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "-n", "--max-new-tokens", metavar="TOKENS", help="Most new tokens."
        ),
    ] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="NUMBER", help="0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(metavar="TOKENS", help="Only the likeliest so many; 0: all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Only the likeliest of this sum; 1: all."),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Only from this share of the best; 0: all."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="NUMBER", help="Above 1 avoids repeats; 1: off.")
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER",
            help="Same seed, same text. Unset: drawn, and reported.",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Ends the text and is not shown; may be repeated.",
            show_default=False,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")
    ] = False,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Wrap the prompt in the store's chat template."),
    ] = False,
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Write the text after a prompt, then figures on stderr.

    The prompt itself is not repeated. Times in seconds, sizes in binary units.
    """
    session: Session = ctx.obj
    if chat and token_ids is not None:
        raise ValueError("--chat wraps text: give --prompt or --prompt-file with it")
    given = read_prompt(prompt, prompt_file, token_ids)
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
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    _check(sampling, max_new_tokens=max_new_tokens)
    with open_engine(session, store, options) as (engine, folder):
        ids = (
            _in_chat(session, engine, folder, str(given))
            if chat
            else engine.encode(given)
        )
        with Activity(session.console, "prompt", unit="layers") as activity:
            stream = engine.stream(
                ids,
                max_new_tokens=max_new_tokens,
                **sampling,
                stop=stop or (),
                ignore_eos=ignore_eos,
                progress=activity.update,
            )
            first = next(stream, "")
        _show(session, first, stream)
        result = stream.result()
    if not session.as_json:
        _finish_text(result)
        session.note(figures(result))
    return Answer(_facts(result))


def _check(sampling: dict[str, Any], *, max_new_tokens: int) -> None:
    """What can be refused before the seconds that loading takes."""
    from m2jax.sampling import Sampling

    Sampling(**sampling)
    if max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: want 0 or more")


def _in_chat(
    session: Session, engine: "Engine", folder: Path, prompt: str
) -> list[int]:
    """The prompt as one turn of the user, in the words of the store's template."""
    from m2jax.text import chat_template, render_chat, special_strings

    files = folder / TOKENIZER_FOLDER
    template = chat_template(files) if files.is_dir() else None
    tokenizer = engine.tokenizer
    if template is None or tokenizer is None:
        raise ValueError(f"{folder}: has no chat template; leave --chat out")
    if tokenizer.encode(prompt) != tokenizer.encode(prompt, parse_special=True):
        session.note(
            "warning: the prompt holds names of special tokens, which --chat reads as "
            "such"
        )
    special = special_strings(files)
    text = render_chat(
        template,
        [{"role": "user", "content": prompt}],
        bos_token=special.get("bos_token", ""),
        eos_token=special.get("eos_token", ""),
    )
    # The template writes the BOS itself where the model wants one.
    ids = tokenizer.encode(text, add_bos=False, parse_special=True)
    return engine.encode(ids)


def _show(session: Session, first: str, stream: "Stream") -> None:
    """Prints the pieces as they come; with --json only counts them."""
    if not session.as_json:
        write(first)
        for piece in stream:
            write(piece)
        return
    with Activity(session.console, "text", unit="characters") as activity:
        activity.add("", len(first))
        for piece in stream:
            activity.add("", len(piece))


def _finish_text(result: "Generation") -> None:
    if result.text is None:
        write(",".join(str(token) for token in result.token_ids))
    write("\n")


def _facts(result: "Generation") -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        **result.stats.to_json(),
    }
