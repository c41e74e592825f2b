"""Compiling kernels in little memory and room, and giving it up."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from m2jax import compiled_kernels
from m2jax.compiled_kernels import prepare_kernels
from m2jax.kernels import native, toolchain

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def first_load(monkeypatch, tmp_path):
    """As in a process that has no kernels yet, and has warned of nothing."""
    monkeypatch.setattr(native, "status", native.build.status.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled_kernels._warn.cache_clear()


@pytest.fixture
def slow_compiler(tmp_path) -> Path:
    """Notes when each run begins and ends."""
    compiler, noted = tmp_path / "compiler", tmp_path / "noted"
    compiler.write_text(
        f"#!/bin/sh\necho begun >> {noted}\nsleep 0.2\necho ended >> {noted}\n"
        'for made; do :; done\n: > "$made"\n'
    )
    compiler.chmod(0o755)
    return compiler


def compiled(compiler: Path) -> list[str]:
    """What was noted of three sources, the linker's last run apart."""
    sources = [compiler.parent / f"{name}.cc" for name in "abc"]
    target = compiler.parent / "kernels.so"
    toolchain.built(target, [str(compiler)], sources, [str(compiler)])
    target.unlink()
    return (compiler.parent / "noted").read_text().splitlines()[:-2]


def test_where_memory_holds_one_compiler_one_runs_at_a_time(slow_compiler, monkeypatch):
    monkeypatch.setattr(toolchain, "_CORES", 8)
    # Put back after the test.
    monkeypatch.setattr(toolchain, "_jobs", 8)
    toolchain.fit_memory(toolchain.JOB_BYTES * 2 - 1)
    assert compiled(slow_compiler) == ["begun", "ended"] * 3
    toolchain.fit_memory(0)
    assert toolchain._jobs == 1
    toolchain.fit_memory(toolchain.JOB_BYTES * 100)
    assert toolchain._jobs == 8


def is_running(pid: str) -> bool:
    """One that has ended may still wait for its parent to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_that_is_interrupted_leaves_no_compiler_behind(tmp_path):
    compiler, pids = tmp_path / "compiler", tmp_path / "pids"
    # A compiler driver waits for what it has started.
    compiler.write_text(f"#!/bin/sh\nsleep 60 &\necho $! >> {pids}\nwait\n")
    compiler.chmod(0o755)
    program = (
        "import signal\n"
        "from pathlib import Path\n"
        "from m2jax.kernels.toolchain import built\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"tool, sources = [{str(compiler)!r}], [Path('a.cc'), Path('b.cc')]\n"
        f"built(Path({str(tmp_path / 'kernels.so')!r}), tool, sources, tool)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    wanted = min(2, len(os.sched_getaffinity(0)))
    while not pids.exists() or len(pids.read_text().splitlines()) < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in run.communicate(timeout=30)[1]
    assert not any(map(is_running, pids.read_text().split()))
    assert not list(tmp_path.glob("kernels-*"))


def test_what_a_killed_run_left_goes_with_the_next(slow_compiler):
    old, new = (slow_compiler.parent / f"kernels-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "a.o").write_bytes(b"object")
    os.utime(old, (0, 0))
    compiled(slow_compiler)
    assert not old.exists()
    # Somebody may be at work there.
    assert new.exists()


def test_on_a_full_disk_nothing_is_compiled(slow_compiler, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 0))
    with pytest.raises(toolchain.NotBuilt, match="no room"):
        compiled(slow_compiler)
    assert not (slow_compiler.parent / "noted").exists()


@pytest.mark.usefixtures("first_load")
def test_kernels_that_could_not_be_compiled_are_one_warning(
    monkeypatch, tmp_path, caplog
):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nkill -9 $$\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "is_compiled", lambda: False)
    said = []
    prepare_kernels(lambda what, nbytes: said.append(what))
    prepare_kernels()
    assert said == ["compiling kernels, once on this machine"]
    (line,) = caplog.messages
    assert "no compiled kernels, slower ones serve: compiler failed: exit code" in line


@pytest.mark.usefixtures("first_load")
def test_where_there_is_no_compiler_one_warning_says_so(monkeypatch, caplog):
    """Though there is nothing to compile."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    prepare_kernels()
    prepare_kernels()
    (line,) = caplog.messages
    assert "slower ones serve: no C++ compiler here (looked for no-such-comp" in line


@pytest.mark.usefixtures("first_load")
def test_who_switches_the_kernels_off_is_not_warned(monkeypatch, caplog):
    monkeypatch.setenv("M2JAX_NATIVE", "0")
    prepare_kernels()
    assert caplog.messages == []
