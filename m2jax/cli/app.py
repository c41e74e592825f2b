"""The application: its commands, and how a run of one begins and ends."""

import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated

import typer
from typer.main import get_command

from m2jax.cli.bench import bench
from m2jax.cli.calibrate import calibrate, search_mix
from m2jax.cli.convert import convert
from m2jax.cli.doctor import doctor
from m2jax.cli.generate import generate
from m2jax.cli.perplexity import perplexity
from m2jax.cli.plan import plan
from m2jax.cli.session import Answer, Session, write
from m2jax.cli.signals import interruptible
from m2jax.cli.simulate import simulate
from m2jax.cli.stores import info, verify
from m2jax.cli.trace import trace

INTERRUPTED = (130, 143)

app = typer.Typer(
    name="m2jax",
    help="Runs LLaMA-family models that do not fit the accelerator, from SSD, DRAM and "
    "a mixed-precision HBM cache.",
    epilog="Exit codes: 2 wrong input, 3 does not fit, 4 damaged store or NaN in its "
    "numbers, 5 machine failed, 1 a bug of ours.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)
for command in (
    *(convert, info, verify, plan, generate),
    *(calibrate, search_mix, perplexity, trace, simulate, bench, doctor),
):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        import m2jax

        write(f"m2jax {m2jax.__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        write(context.get_help() + "\n")


def main() -> int:
    """The program: runs the process's own arguments, and gives its exit code."""
    code = run(sys.argv[1:])
    if code in INTERRUPTED:
        # Threads of libraries may still read or write for what was cut off, and crash
        # (SIGSEGV, seen with Orbax) when the interpreter goes away under them.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    return code


def run(argv: Sequence[str]) -> int:
    """Runs one command in this process.

    Args:
        argv: arguments without the program's name.

    Returns:
        The exit code.
    """
    args = list(argv)
    session = Session(as_json="--json" in args, debug="--debug" in args)
    try:
        with _prepared(session), interruptible(session.last_words):
            return _invoke(session, args)
    # Signals raise wherever the run is, in the two lines above too.
    except BaseException as error:
        return session.fail(error)


def _invoke(session: Session, args: list[str]) -> int:
    try:
        command = get_command(app)
        with command.make_context("m2jax", args, obj=session) as context:
            answer = command.invoke(context)
        return session.answer(answer) if isinstance(answer, Answer) else 0
    except typer.Exit as end:
        return end.exit_code


@contextmanager
def _prepared(session: Session) -> Iterator[None]:
    """UTF-8 on both streams; our log on stderr, a line each; no libraries' chatter."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if not session.debug:
        # Read by XLA when it is imported: its C++ log, on loading a compiled program.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    handler = _Notes(session)
    log, tasks = logging.getLogger("m2jax"), logging.getLogger("asyncio")
    levels, propagated = (log.level, tasks.level), log.propagate
    log.addHandler(handler)
    # Libraries give the root logger a handler, which would say it all again.
    log.propagate = False
    log.setLevel(logging.WARNING)
    # Of Orbax's tasks that an interrupt cuts off, each would be reported as an error.
    tasks.setLevel(logging.DEBUG if session.debug else logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagated
        log.setLevel(levels[0])
        tasks.setLevel(levels[1])


class _Notes(logging.Handler):
    """Log records as notes of a session."""

    def __init__(self, session: Session):
        super().__init__()
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        warns = record.levelno >= logging.WARNING
        prefix = "warning: " if warns else ""
        self._session.note(prefix + record.getMessage())
