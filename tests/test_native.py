"""The C++ kernels as other CPUs would have them, and what becomes of failed builds."""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from m2jax.kernels import native
from m2jax.kernels.toolchain import built
from tests.kernel_cases import ROUNDING, WORD_ROUNDING

ROOT = Path(__file__).parent.parent
VECTORS = native.build._vectors()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize(
    ("flags", "blocks"),
    [
        pytest.param(
            "-march=x86-64-v3",
            "words",
            marks=pytest.mark.skipif(
                VECTORS == "AVX2", reason="all other tests run it"
            ),
        ),
        ("-march=x86-64", ""),
        pytest.param(
            "-march=x86-64-v4",
            "words",
            marks=pytest.mark.skipif(
                "AVX-512" not in VECTORS, reason="no AVX-512 here"
            ),
        ),
    ],
)
def test_other_vectors_give_the_same(flags, blocks, tmp_path):
    """AVX2 without VNNI, plain vectors of 128 bits, AVX-512 without VNNI or tiles."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compare_kernels", flags],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["blocks"] == blocks
    assert found["of a few"] < ROUNDING
    # The whole block is three products in a row.
    assert found["of a block"] < (3 * WORD_ROUNDING if blocks else ROUNDING)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("M2JAX_NATIVE", "0", "switched off"),
        ("CXX", "no-such-compiler", "no C++ compiler here"),
        ("CXX", "false", "failed"),
    ],
)
def test_without_a_compiler_xla_serves(monkeypatch, tmp_path, setting, value, said):
    monkeypatch.setenv(setting, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = native.build.status.__wrapped__()
    assert not found.ready
    assert said in found.about
    assert "\n" not in found.about


@pytest.mark.parametrize("version", ["--version", "-O3"])
def test_a_compiler_that_says_what_is_no_utf8_is_as_good_as_none(
    monkeypatch, tmp_path, version
):
    """Of its version, or of the error."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = {version} ] && printf "\\377\\376 error \\374\\n" >&2 && exit 1\n'
        'printf "\\377\\376\\n"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = native.build.status.__wrapped__()
    assert not found.ready
    assert "error" in found.about


def test_of_several_that_want_a_library_one_compiles_it(tmp_path):
    calls, compiler = tmp_path / "calls", tmp_path / "compiler"
    # The last argument is what it makes.
    compiler.write_text(
        f"#!/bin/sh\necho made >> {calls}\nsleep 0.3\n"
        'for made; do :; done\n: > "$made"\n'
    )
    compiler.chmod(0o755)
    wanted = tmp_path / "kernels.so", [str(compiler)], [tmp_path / "a.cc"]
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: built(*wanted, [str(compiler)]), range(3)))
    assert made == [wanted[0]] * 3
    assert calls.read_text().splitlines() == ["made"] * 2
