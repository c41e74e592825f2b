"""The program as a process: start, signals, pipes and the bundled model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import m2jax
from m2jax.store import open_store
from tests.command_line import PROGRAM, Commands, end, start
from tests.small_checkpoints import small_checkpoint

# Enough that it cannot end before a signal comes.
MANY_LAYERS = 60
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
    # A page: every command with its line, none of them cut short.
    assert len(done.stdout.splitlines()) < 40
    assert "..." not in done.stdout


def test_the_version_is_that_of_the_package():
    done = end(start("--version"))
    assert (done.code, done.out, done.err) == (0, f"m2jax {m2jax.__version__}\n", "")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_an_interrupted_conversion_tells_how_to_resume_and_does(
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
    assert m2jax_command("info", store).code == 4
    assert m2jax_command("convert", source, store).code == 0
    assert open_store(store).config.num_layers == MANY_LAYERS


def test_work_in_c_that_no_exception_reaches_ends_all_the_same():
    code = (
        "import hashlib\n"
        "from m2jax.cli import signals\n"
        "signals.GRACE_S = 0.3\n"
        "with signals.interruptible(lambda error: print(type(error).__name__) or 143):\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert end(process, timeout_s=20)[:2] == (143, "Terminated\n")


def test_an_interrupted_generation_is_one_line(bundled_store: Path):
    process = start("generate", bundled_store, "-p", "x", "-n", "900", "--hbm", "20MiB")
    assert process.stdout is not None
    # The first character of the text, so that it is under way.
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    done = end(process)
    assert done.code == 130
    assert done.error == "interrupted"


def test_a_reader_that_leaves_is_no_error(bundled_store: Path):
    command = start("info", bundled_store, stdin=subprocess.DEVNULL)
    assert command.stdout is not None
    command.stdout.close()
    command.wait(60)
    assert command.stderr is not None
    assert command.stderr.read() == ""


def test_an_answer_that_cannot_be_written_is_exit_code_5(bundled_store: Path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROGRAM, "info", str(bundled_store)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 5
    assert done.stderr == "error: No space left on device\n"


def test_without_a_store_the_bundled_model_writes_and_keeps_what_it_compiled(
    tmp_path: Path,
):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "LC_ALL": "C"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    options = ("-n", "1", "--mix", "100/0/0", "--json")
    done = end(start("generate", "-p", "Once upon a", *options, env=environment))
    assert done.code == 0
    assert json.loads(done.out)["text"] == " time"
    compiled = tmp_path / "m2jax" / "xla"
    assert compiled.stat().st_mode & 0o777 == 0o700
    assert any(compiled.iterdir())
