"""What one run of the command line carries along: how to answer, and where to print."""

import json
import math
import os
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TextIO

from rich.console import Console

from m2jax.cli.errors import CLOSED_PIPE_CODE, WithFacts, explain


@dataclass(frozen=True)
class Answer:
    """What a command found out.

    facts: JSON values. text: the same for people; "" where it is printed already.
    """

    facts: dict[str, Any]
    text: str = ""
    exit_code: int = 0


class _Stderr(Console):
    """Written as far as it can be: neither work nor answer hangs on it."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _forget(sys.stderr)


@dataclass
class Session:
    """One run.

    as_json: stdout gets one JSON object and nothing else. debug: show tracebacks.
    hint: what a person can do after an interrupt.
    """

    as_json: bool
    debug: bool
    hint: str = ""

    @cached_property
    def console(self) -> Console:
        """stderr, where all but the answer goes."""
        return _Stderr(stderr=True, highlight=False, markup=False, emoji=False)

    def note(self, line: str) -> None:
        """One line on stderr."""
        self.console.print(line, soft_wrap=True)

    def answer(self, answer: Answer) -> int:
        """Prints the answer and gives the exit code."""
        if self.as_json:
            write(to_json(answer.facts))
        elif answer.text:
            write(answer.text + "\n")
        return answer.exit_code

    def last_words(self, error: BaseException) -> int:
        """`fail`, called while the main thread still hangs."""
        self.console.show_cursor(True)
        return self.fail(error)

    def fail(self, error: BaseException) -> int:
        """Says what went wrong, once, and gives the exit code."""
        facts: dict[str, Any] = {}
        if isinstance(error, WithFacts) and error.__cause__ is not None:
            if error.text and not self.as_json:
                with suppress(OSError):
                    write(error.text + "\n")
            facts, error = error.facts, error.__cause__
        if isinstance(error, BrokenPipeError):
            return CLOSED_PIPE_CODE
        fault = explain(error, hint=self.hint)
        if self.debug:
            with suppress(OSError):
                traceback.print_exception(error, file=sys.stderr)
        self.note(f"error: {fault.message}")
        if self.as_json:
            with suppress(OSError):
                write(to_json({**facts, "error": fault.to_json()}))
        return fault.exit_code


def write(text: str) -> None:
    """Text to stdout, at once.

    Raises:
        OSError: it cannot be written, by name; nothing more will be.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _forget(sys.stdout)
        raise OSError(error.errno, error.strerror, "standard output") from error


def to_json(facts: dict[str, Any]) -> str:
    """One line of strict JSON; a number that is not finite becomes null."""
    return json.dumps(_finite(facts), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _forget(stream: TextIO) -> None:
    """Points it to nowhere, so that Python's own flush at exit cannot fail."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
