"""What all tests share: JAX on the CPU, strict and compiled once; stores made once."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import settings

import m2jax
from m2jax import loading
from m2jax.bundled import SOURCE
from m2jax.cache import reading
from tests.command_line import Commands

# Of all processes of a run: what one has compiled, none compiles again.
if "M2JAX_TESTS_CACHE" not in os.environ:
    os.environ["M2JAX_TESTS_CACHE"] = tempfile.mkdtemp(prefix="m2jax-tests-")
    atexit.register(shutil.rmtree, os.environ["M2JAX_TESTS_CACHE"], ignore_errors=True)
CACHE = Path(os.environ["M2JAX_TESTS_CACHE"])
# Times of examples say little where processes share the cores.
settings.register_profile("m2jax", deadline=None)
settings.load_profile("m2jax")
# For the processes that tests start, too.
os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "m2jax" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

TINY = Path(__file__).parent / "fixtures" / "parity" / "smollm2"


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """Engines of the same model and mix share their compiled steps, which take most
    of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "Steps", functools.cache(loading.Steps))
        yield


@pytest.fixture(scope="session")
def bundled_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return m2jax.convert(SOURCE, tmp_path_factory.mktemp("bundled") / "store")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of 88 neurons (128 with padding), rows of 48 bfloat16 weights."""
    return m2jax.convert(TINY, tmp_path_factory.mktemp("tiny") / "store")


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch):
    """Reads that fail are made again at once."""
    monkeypatch.setattr(reading, "BACK_OFF_S", 0.001)


@pytest.fixture
def m2jax_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Commands:
    """Runs a command line in this process: `m2jax_command("info", store)`."""
    return Commands(capsys, monkeypatch)
