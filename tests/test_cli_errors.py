"""Wrong command lines and wrong input: an exit code, one line, and nothing else."""

import errno
from pathlib import Path
from typing import Any

import jax
import pytest
import typer

from m2jax.cli.errors import OutOfMemory, explain, is_out_of_memory
from m2jax.cli.signals import Terminated
from m2jax.errors import DoesNotFit, NumericalError, StoreError, TierFailed
from m2jax.runner import Runner
from tests.command_line import Commands


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2),
        (NotImplementedError("x"), 2),
        (typer.BadParameter("x"), 2),
        (DoesNotFit("x"), 3),
        (StoreError("x", path="a/b"), 4),
        (TierFailed("x"), 5),
        (PermissionError(errno.EACCES, "x", "a/b"), 5),
        (OutOfMemory("x"), 5),
        (MemoryError("x"), 5),
        (RuntimeError("RESOURCE_EXHAUSTED: x"), 5),
        (NumericalError("x"), 4),
        (KeyError("x"), 1),
        (AssertionError("x"), 1),
        (KeyboardInterrupt(), 130),
        (Terminated(), 143),
    ],
)
def test_every_kind_of_error_has_its_exit_code(error: BaseException, code: int):
    assert explain(error).exit_code == code


def test_only_an_unknown_error_is_called_a_bug():
    assert "bug in m2jax" in explain(ZeroDivisionError("x")).message
    for error in (ValueError("x"), NumericalError("x"), StoreError("x"), OSError("x")):
        assert "bug" not in explain(error).message


def test_only_memory_that_ran_out_is_called_so():
    assert is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert is_out_of_memory(
        ImportError("x.so: failed to map segment from shared object")
    )
    assert is_out_of_memory(RuntimeError("can't start new thread"))
    # TensorStore's word for too many open files.
    assert not is_out_of_memory(TierFailed("RESOURCE_EXHAUSTED: EMFILE"))
    assert not is_out_of_memory(RuntimeError("INTERNAL: x"))


def test_an_error_of_the_system_names_its_path_and_reason():
    fault = explain(PermissionError(errno.EACCES, "Permission denied", "a/b"))
    assert fault.message == "a/b: Permission denied"
    assert fault.path == "a/b"


def test_a_message_of_many_lines_becomes_one():
    assert explain(ValueError("one\n  two\n\nthree")).message == "one two three"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["nosuch"], "nosuch"),
        (["info"], "STORE"),
        (["info", "--nosuch", "x"], "--nosuch"),
        (["generate", "-n", "many", "-p", "x"], "-n"),
        (["generate", "-p"], "-p"),
        (["perplexity"], "--text"),
        (["verify", "a", "b"], "b"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_word(
    m2jax_command: Commands, args: list[str], told: str
):
    done = m2jax_command(*args)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert told in done.error
    assert "--help" in done.error


def test_a_wrong_option_with_json_is_an_object_on_stdout(m2jax_command: Commands):
    done = m2jax_command("generate", "--json", "--nosuch")
    assert done.code == 2
    error = done.facts["error"]
    assert error["message"] == done.error
    assert error["type"] == "NoSuchOption"
    assert error["path"] is None


@pytest.mark.parametrize(
    "args", [("info", "nosuch"), ("verify", "nosuch"), ("plan", "nosuch")]
)
def test_a_missing_store_is_wrong_input(
    m2jax_command: Commands,
    args: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    done = m2jax_command(*args)
    assert done.code == 2
    assert done.error.startswith("nosuch: no such f")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "no prompts"),
        (["-p", "x", "--token-ids", "1"], "2 prompts"),
        (["-p", ""], "empty"),
        (["--token-ids", ""], "empty"),
        (["--token-ids", "1,x"], "entry 1 is 'x'"),
        (["-p", "x", "--temperature", "nan"], "temperature nan"),
        (["-p", "x", "--top-p", "1.1"], "top_p 1.1"),
        (["-p", "x", "--seed", "-1"], "seed -1"),
        (["-p", "x", "-n", "-1"], "-1"),
        (["--token-ids", "1", "--chat"], "--chat"),
        (["--prompt-file", "nosuch.txt"], "nosuch.txt: no such file"),
        (["--prompt-file", "."], "a folder"),
        (["-p", "a\udcffb"], "--prompt: not UTF-8 at byte 1"),
    ],
)
def test_a_refused_prompt_or_number_is_told_before_anything_is_loaded(
    m2jax_command: Commands, options: list[str], told: str
):
    done = m2jax_command("generate", "nosuch-store", *options)
    assert done.code == 2
    assert told in done.error


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--hbm", "8"], 2, "--hbm '8'"),
        (["--hbm", "8GiBB"], 2, "8GiBB"),
        (["--dram", "0B"], 2, "--dram"),
        (["--dram", "9" * 400 + "GiB"], 2, "--dram '999"),
        (["--emulate-ssd", "9" * 400 + "GB"], 2, "--emulate-ssd '999"),
        (["--lookahead", "7"], 2, "--lookahead 7: want 0 or 1"),
        (["--hbm", "1MiB"], 3, "the smallest that works is"),
        (
            ["--hbm", "20MiB", "--dram", "1KiB", "--mix", "25/25/50"],
            3,
            "the smallest that works is",
        ),
        (["--mix", "50/50/50"], 2, "mix 50/50/50"),
        (["--scorer", "nosuch"], 2, "scorer 'nosuch'"),
        (["--policy", "belady"], 2, "policy 'belady'"),
        (["--context", "1025"], 2, "--context 1025"),
        (["--prefetch", "-1"], 2, "--prefetch -1"),
    ],
)
def test_a_refused_budget_or_choice_names_the_option(
    m2jax_command: Commands,
    bundled_store: Path,
    options: list[str],
    code: int,
    told: str,
):
    done = m2jax_command("generate", bundled_store, "-p", "x", *options)
    assert done.code == code
    assert told in done.error


def test_only_debug_shows_the_traceback(m2jax_command: Commands):
    quiet = m2jax_command("info", "nosuch")
    loud = m2jax_command("info", "nosuch", "--debug")
    assert loud.code == quiet.code == 2
    assert "Traceback (most recent call last)" in loud.err
    assert loud.err.endswith(quiet.err)


def test_memory_that_runs_out_gives_budget_need_and_a_smaller_setting(
    m2jax_command: Commands, bundled_store: Path, monkeypatch: pytest.MonkeyPatch
):
    def exhausted(*args: Any, **options: Any) -> None:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.\nBuffers:\n .."
        )

    # What a GPU raises when a program does not fit; the CPU has no such limit.
    monkeypatch.setattr(Runner, "prefill", exhausted)
    done = m2jax_command(
        "generate", bundled_store, "-p", "x", "--hbm", "24MiB", "--json"
    )
    assert done.code == 5
    message = done.facts["error"]["message"]
    assert done.error == message
    assert "123456 bytes" in message
    assert "budget 24.0 MiB" in message
    assert "try --hbm" in message
    assert "Buffers" not in message
