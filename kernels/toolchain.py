"""What compiling kernels takes on any device: a compiler, and a private folder."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

TIMEOUT_S = 300


class NotBuilt(Exception):
    """In one line why there are no compiled kernels."""


def library_path(
    compiler: str, sources: Sequence[Path], flags: Sequence[str], about: Sequence[str]
) -> Path:
    """Where the library of these sources, by this compiler, with these flags lies.

    Args:
        sources: headers too. about: what else it hangs on.

    Raises:
        NotBuilt: the folder is another user's, or the compiler does not run.
    """
    said = [*run([compiler, "--version"]).splitlines(), *flags, jax.__version__]
    digest = hashlib.sha256("\n".join([*said, *about, *map(str, sources)]).encode())
    for file in sources:
        digest.update(file.read_bytes())
    return _folder() / f"kernels-{digest.hexdigest()[:16]}.so"


def built(
    target: Path, command: Sequence[str], sources: Sequence[Path], link: Sequence[str]
) -> Path:
    """The library, compiled if that was not done yet: sources at the same time.

    Args:
        command: compiler and flags for one source. link: for all objects.
    """
    if target.exists():
        return target
    with (
        one_at_a_time(target.with_suffix(".lock")),
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
    ):
        # Whoever was first has made it while the others waited.
        if target.exists():
            return target

        def compiled(source: Path) -> str:
            made = str(Path(folder) / f"{source.stem}.o")
            run(
                [
                    *command,
                    "-isystem",
                    jax.ffi.include_dir(),
                    "-c",
                    str(source),
                    "-o",
                    made,
                ]
            )
            return made

        with ThreadPoolExecutor(len(sources)) as pool:
            objects = list(pool.map(compiled, sources))
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
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            # Compilers speak the user's language, in any encoding.
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise NotBuilt(f"{command[0]} took over {TIMEOUT_S} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line]
        reason = said[0] if said else f"exit code {done.returncode}"
        raise NotBuilt(f"{Path(command[0]).name} failed: {reason}")
    return done.stdout


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
