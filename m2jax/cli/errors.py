"""Exceptions to one line and an exit code. Prints nothing; imports no jax."""

import os
from dataclasses import dataclass
from typing import Any

import typer

from m2jax.cli.signals import Terminated
from m2jax.errors import is_memory_error

# Newer typers bring a click of their own, so the class is asked for by its heir.
UsageError = typer.BadParameter.__mro__[1]

MAX_MESSAGE_CHARS = 2000
CLOSED_PIPE_CODE = 141


class OutOfMemory(OSError):
    """The machine's memory ran out under a plan that should have fitted."""


class WithFacts(Exception):
    """Its cause is the error, after work that is not lost.

    facts: stand beside the error in the JSON answer. text: the same for people.
    """

    def __init__(self, facts: dict[str, Any], text: str = ""):
        super().__init__()
        self.facts, self.text = facts, text


@dataclass(frozen=True)
class Fault:
    """What is said of an error.

    kind: the exception's class. path: the file or folder it is about, if one is known.
    """

    exit_code: int
    kind: str
    message: str
    path: str | None

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "message": self.message, "path": self.path}


def explain(error: BaseException, *, hint: str = "") -> Fault:
    """The exit code of an error, and one line about it.

    Args:
        hint: what a person can do after an interrupt.
    """
    exit_code, message = _code_and_message(error)
    if isinstance(error, KeyboardInterrupt | Terminated) and hint:
        message = f"{message}; {hint}"
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    return Fault(
        exit_code=exit_code,
        kind=type(error).__name__,
        message=_one_line(message),
        path=None if path is None else os.fsdecode(path),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, or XLA's (whose class needs jax, and so is not named)."""
    if hasattr(error, "exit_code"):
        return False
    # A library that finds no room is an ImportError to Python.
    said = ("RESOURCE_EXHAUSTED", "failed to map segment", "annot allocate memory")
    return is_memory_error(error) or any(part in str(error) for part in said)


def _code_and_message(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, Terminated):
        return 143, "terminated"
    if isinstance(error, UsageError):
        return 2, _usage(error)
    if isinstance(error, typer.Abort):
        return 130, "aborted"
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code, str(error)
    if is_out_of_memory(error):
        return 5, f"out of memory: {error}"
    if isinstance(error, ValueError | NotImplementedError):
        return 2, str(error)
    if isinstance(error, OSError):
        return 5, _os_error(error)
    return 1, (
        f"{type(error).__name__}: {error}; this is a bug in m2jax; run again with "
        "--debug and report what it prints"
    )


def _usage(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "m2jax"
    return f'{error.format_message().rstrip(".")}; see "{command} --help"'


def _os_error(error: OSError) -> str:
    if not error.strerror:
        return str(error) or type(error).__name__
    name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{name}{error.strerror}"


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    if len(line) > MAX_MESSAGE_CHARS:
        line = line[:MAX_MESSAGE_CHARS] + " .."
    return line
