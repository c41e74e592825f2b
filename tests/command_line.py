"""Runs the command line in this process, or as the program it is."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest

from m2jax.cli import run

PROGRAM = (sys.executable, "-m", "m2jax")


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        """The one JSON object that stdout must be, in one line."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of stderr that tells the error; progress may stand before."""
        lines = self.err.splitlines()
        assert "Traceback" not in self.err
        assert sum(line.startswith("error: ") for line in lines) == 1
        return lines[-1].removeprefix("error: ")


class Commands:
    """m2jax in this process, its output caught."""

    def __init__(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *args: object, stdin: bytes = b"") -> Done:
        self._capsys.readouterr()
        self._monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run([str(arg) for arg in args])
        caught = self._capsys.readouterr()
        return Done(code, str(caught.out), str(caught.err))


def start(
    *args: object,
    stdout: int | IO[str] = subprocess.PIPE,
    stderr: int | IO[str] = subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """m2jax as a process of its own, its output piped.

    Args:
        environment: what to set beside this process's own.
    """
    variables = {**os.environ, **(environment or {})}
    # Output must not depend on it: who runs the tests may have set it.
    variables.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen(
        [*PROGRAM, *map(str, args)],
        stdout=stdout,
        stderr=stderr,
        text=True,
        env=variables,
    )


def end(process: subprocess.Popen[str], *, timeout_s: float = 60) -> Done:
    out, err = process.communicate(timeout=timeout_s)
    return Done(process.returncode, out, err)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
