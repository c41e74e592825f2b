"""What compiling kernels takes on any device: a compiler, and a private folder. Knows
no JAX: its headers and version are what a caller gives."""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

TIMEOUT_S = 300
# Of one compiler run: 310 to 350 MB were seen.
JOB_BYTES = 400 << 20
# Objects and library.
LEAST_FREE_BYTES = 16 << 20

# Set to 0, nothing is compiled and no compiled kernel used.
SWITCH = "M2JAX_NATIVE"
# Of C++, the first that is there.
COMPILERS = ("c++", "g++", "clang++")

_CORES = len(os.sched_getaffinity(0))
_jobs = _CORES
_children: set[subprocess.Popen[str]] = set()


class NotBuilt(Exception):
    """In one line why there are no compiled kernels."""


def cpp_compiler() -> str:
    """The C++ compiler: what CXX names, else the first that is here.

    Raises:
        NotBuilt: there is none.
    """
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    wanted = chosen or ", ".join(COMPILERS)
    raise NotBuilt(f"no C++ compiler here (looked for {wanted})")


def library_path(
    compiler: str, sources: Sequence[Path], flags: Sequence[str], about: Sequence[str]
) -> Path:
    """Where the library of these sources, by this compiler, with these flags lies.

    Args:
        sources: headers too. about: what else it hangs on.

    Raises:
        NotBuilt: the folder is another user's, or the compiler does not run.
    """
    said = [*run([compiler, "--version"]).splitlines(), *flags, *about]
    digest = hashlib.sha256("\n".join([*said, *map(str, sources)]).encode())
    for file in sources:
        digest.update(file.read_bytes())
    return _folder() / f"kernels-{digest.hexdigest()[:16]}.so"


def is_switched_off() -> bool:
    """Whether the user wants no compiled kernels."""
    return os.environ.get(SWITCH) == "0"


def fit_memory(free_bytes: int) -> None:
    """Runs no more compilers at the same time than so many bytes hold."""
    global _jobs
    _jobs = max(1, min(_CORES, free_bytes // JOB_BYTES))


def built(
    target: Path, command: Sequence[str], sources: Sequence[Path], link: Sequence[str]
) -> Path:
    """The library, compiled if that was not done yet: several sources at a time.

    Args:
        command: compiler and flags for one source. link: for all objects.

    Raises:
        NotBuilt: it cannot be compiled, or there is no room for it.
    """
    if target.exists():
        return target
    with (
        one_at_a_time(target.with_suffix(".lock")),
        _scratch(target) as folder,
    ):
        # Whoever was first has made it while the others waited.
        if target.exists():
            return target
        # Half a minute of compiling is lost where nothing can be written.
        free = shutil.disk_usage(target.parent).free
        if free < LEAST_FREE_BYTES:
            raise NotBuilt(f"{target.parent}: {free} bytes free, no room for them")

        def compiled(source: Path) -> str:
            made = str(Path(folder) / f"{source.stem}.o")
            run([*command, "-c", str(source), "-o", made])
            return made

        with ThreadPoolExecutor(min(_jobs, len(sources))) as pool:
            try:
                objects = list(pool.map(compiled, sources))
            except BaseException:
                # An interrupted run leaves no compilers behind.
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(_children):
                    _kill(child)
                raise
        linked = Path(folder) / target.name
        run([*link, *objects, "-o", str(linked)])
        os.replace(linked, target)
    return target


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Of several processes; all of them at once where files cannot be locked."""
    with open(path, "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str]) -> str:
    """What the command prints.

    Raises:
        NotBuilt: it fails, or takes too long.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Compilers speak the user's language, in any encoding.
        errors="replace",
        # With the processes that a compiler starts itself: killed as one.
        start_new_session=True,
    ) as child:
        _children.add(child)
        try:
            out, messages = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise NotBuilt(f"{command[0]} took over {TIMEOUT_S} s") from error
        finally:
            _children.discard(child)
            _kill(child)
    if child.returncode:
        said = [line for line in messages.splitlines() if "error" in line]
        reason = said[0] if said else f"exit code {child.returncode}"
        raise NotBuilt(f"{Path(command[0]).name} failed: {reason}")
    return out


def _kill(child: subprocess.Popen[str]) -> None:
    """A compiler and all that it started, if they still run."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def _scratch(target: Path) -> Iterator[str]:
    """A folder for objects. Those that killed runs have left go with it."""
    for left in target.parent.glob(f"{target.stem}-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > TIMEOUT_S:
                shutil.rmtree(left)
    prefix = f"{target.stem}-"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
        yield folder


def _folder() -> Path:
    """Where only this user writes: what lies there is run."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(base).expanduser() / "m2jax" / "kernels"
    except RuntimeError:
        raise NotBuilt("no home folder for them: set XDG_CACHE_HOME") from None
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NotBuilt(f"{folder}: belongs to another user")
    folder.chmod(0o700)
    return folder
