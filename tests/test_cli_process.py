"""The program as a process: start, signals, pipes and the bundled model."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import m2jax
from m2jax.bundled import bundled_store as bundled_store_of_user
from m2jax.cli.app import _prepared as prepared
from m2jax.cli.compilation import keep_compiled
from m2jax.cli.errors import CLOSED_PIPE_CODE
from m2jax.cli.session import Session
from m2jax.kernels import native
from m2jax.store import open_store
from tests.command_line import Commands, end, start
from tests.conftest import CACHE
from tests.small_checkpoints import small_checkpoint

# Enough that it cannot end before a signal comes.
MANY_LAYERS = 30
EXIT_S = 5


def wait_for(path: Path, *, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_neither_help_nor_info_imports_jax():
    code = (
        "import sys, m2jax.cli; m2jax.cli.run(['--help']); "
        "m2jax.cli.run(['info', 'nosuch']); sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "no such folder" in done.stderr
    commands = done.stdout.partition("Commands:")[2].partition("Exit codes")[0]
    # A page: every command with its line, none of them cut short.
    assert len(done.stdout.splitlines()) < 40
    assert len(commands.split("\n  ")) > 8
    assert "..." not in commands


def test_the_version_is_that_of_the_package():
    done = end(start("--version"))
    assert (done.code, done.out, done.err) == (0, f"m2jax {m2jax.__version__}\n", "")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_an_interrupted_conversion_tells_how_to_resume(
    m2jax_command: Commands, tmp_path: Path, number: signal.Signals, code: int
):
    source = small_checkpoint(tmp_path / "source", layers=MANY_LAYERS)
    store = tmp_path / "store"
    process = start("convert", source, store, "--json")
    wait_for(store / "dense" / "layers" / "02")
    process.send_signal(number)
    sent_s = time.monotonic()
    done = end(process)
    assert time.monotonic() - sent_s < EXIT_S
    assert done.code == code
    assert "run the same command again to resume" in done.error
    assert done.facts["error"]["message"] == done.error
    unfinished = m2jax_command("info", store)
    assert unfinished.code == 4
    assert "incomplete" in unfinished.error


def test_work_in_c_that_no_exception_reaches_ends_all_the_same():
    code = (
        "import hashlib\n"
        "from m2jax.cli import signals\n"
        "signals.GRACE_S = 0.3\n"
        "say = lambda error: print(type(error).__name__) or 143\n"
        "with signals.interruptible(say):\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    # From here to the C code is one line of Python.
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert end(process, timeout_s=20)[:2] == (143, "Terminated\n")


SWALLOWED = {
    "a finalizer": (
        "class Last:\n    def __del__(self): send()\ndef swallow(): Last()\n"
    ),
    "a callback of the garbage collector": (
        "def swallow():\n"
        "    gc.callbacks.append(lambda phase, info: phase == 'stop' and send())\n"
        "    gc.collect()\n"
        "    gc.callbacks.pop()\n"
    ),
}


@pytest.mark.parametrize("where", SWALLOWED)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_swallows_comes_again(where: str, number: signal.Signals):
    code = (
        "import gc, os, signal, sys, time\n"
        "from m2jax.cli import signals\n"
        "def send():\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    for _ in range(10): pass\n"
        f"{SWALLOWED[where]}"
        "hook = sys.unraisablehook\n"
        "handler = signal.getsignal(signal.SIGTERM)\n"
        "try:\n"
        "    with signals.interruptible(lambda error: 1):\n"
        "        swallow()\n"
        "        print('swallowed', flush=True)\n"
        "        time.sleep(60)\n"
        "except BaseException as error:\n"
        "    print(type(error) is signals.ERRORS[" + str(int(number)) + "])\n"
        "print(sys.unraisablehook is hook)\n"
        "print(signal.getsignal(signal.SIGTERM) is handler)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.split() == ["swallowed", "True", "True", "True"]
    assert (done.returncode, done.stderr) == (0, "")


def test_what_else_python_ignores_is_told_as_before():
    code = (
        "from m2jax.cli import signals\n"
        "class Last:\n"
        "    def __del__(self): 1 / 0\n"
        "with signals.interruptible(lambda error: 1):\n"
        "    Last()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


def test_a_generation_that_is_interrupted_while_it_compiles_is_one_line(
    bundled_store: Path, tmp_path: Path
):
    # A cache of its own, in which nothing is compiled yet, and XLA's own products: they
    # take seconds to compile where calls of the C++ kernels take none.
    environment = {"XDG_CACHE_HOME": str(tmp_path), "M2JAX_NATIVE": "0"}
    process = start("generate", bundled_store, "-p", "x", environment=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("prompt: "):
            break
    process.send_signal(signal.SIGINT)
    sent_s = time.monotonic()
    done = end(process)
    assert time.monotonic() - sent_s < EXIT_S
    assert done.code == 130
    assert done.error == "interrupted"


def test_a_reader_that_leaves_is_no_error(bundled_store: Path):
    read, write = os.pipe()
    os.close(read)
    command = start("info", bundled_store, stdout=write)
    os.close(write)
    done = end(command)
    assert (done.code, done.err) == (CLOSED_PIPE_CODE, "")


def test_an_answer_that_cannot_be_written_is_exit_code_5(bundled_store: Path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = end(start("info", bundled_store, stdout=full))
    assert done.code == 5
    assert done.err == "error: standard output: No space left on device\n"


@pytest.mark.parametrize("broken", ["full", "closed"])
def test_an_error_that_stderr_does_not_take_is_on_stdout_all_the_same(broken: str):
    if broken == "full":
        if not os.path.exists("/dev/full"):
            pytest.skip("this system has no /dev/full")
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        read, stderr = os.pipe()
        os.close(read)
    process = start("info", "no-such-store", "--json", stderr=stderr)
    os.close(stderr)
    done = end(process)
    assert done.code == 2
    assert "no-such-store" in done.facts["error"]["message"]


def test_who_has_no_home_is_told_to_name_a_folder_or_goes_without(
    bundled_store: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    def no_home(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(Path, "expanduser", no_home)
    keep_compiled()
    assert not native.build.status.__wrapped__().ready
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        bundled_store_of_user()


def test_of_several_that_want_the_bundled_model_one_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: bundled_store_of_user(), range(3)))
    assert len(set(made)) == 1
    open_store(made[0])


def test_without_a_store_the_bundled_model_writes_and_keeps_what_it_compiled(
    tmp_path: Path,
):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    options = ("-n", "1", "--mix", "100/0/0", "--json")
    # All but the kernels, a minute of compiling that this process has behind it.
    assert native.status().ready
    (tmp_path / "m2jax").mkdir()
    (tmp_path / "m2jax" / "kernels").symlink_to(CACHE / "m2jax" / "kernels")
    done = end(
        start("generate", "-p", "Once upon a", *options, environment=environment),
        timeout_s=300,
    )
    assert done.code == 0
    assert json.loads(done.out)["text"] == " time"
    compiled = tmp_path / "m2jax" / "xla"
    assert compiled.stat().st_mode & 0o777 == 0o700
    assert any(compiled.iterdir())


def test_a_warning_is_one_line_whatever_handlers_libraries_install(caplog, capsys):
    """caplog is a handler of the root logger, as libraries give it one."""
    session = Session(as_json=True, debug=False)
    with prepared(session):
        logging.getLogger("m2jax").warning("slow")
    assert capsys.readouterr().err == "warning: slow\n"
    assert caplog.messages == []
    logging.getLogger("m2jax").warning("heard again")
    assert caplog.messages == ["heard again"]
