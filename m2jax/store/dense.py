"""The dense part as Orbax v1 checkpoints, one a bank. The only module that knows Orbax.

Saved without compression and OCDBT; what Orbax writes of times and paths is taken out,
so that the same arrays give the same bytes anywhere.
"""

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.errors import is_memory_error
from m2jax.store.machine_errors import machine_error

_COMMITTED = b"Checkpoint commit was successful\n"


def save_bank(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a new checkpoint folder and syncs it.

    Raises:
        OSError: the machine failed.
    """
    with _quiet_orbax() as ocp:
        ocp.save(path, dict(arrays))
    metadata = path / "_CHECKPOINT_METADATA"
    fields = json.loads(metadata.read_bytes())
    fields["init_timestamp_nsecs"] = fields["commit_timestamp_nsecs"] = 0
    metadata.write_text(json.dumps(fields, sort_keys=True))
    (path / "commit_success.txt").write_bytes(_COMMITTED)


def load_bank(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint folder, in host memory.

    Raises:
        OSError: it cannot be read.
    """
    with _quiet_orbax() as ocp:
        return {name: np.asarray(array) for name, array in ocp.load(path).items()}


class _Hush:
    """Orbax's log off while any thread is within: it belongs to the process, so the
    first of several sets it and the last puts it back."""

    def __init__(self) -> None:
        self._lock, self._threads, self._failed = threading.Lock(), 0, False
        self._log, self._level = logging.getLogger("absl"), logging.NOTSET
        self._say = sys.unraisablehook

    def __enter__(self) -> None:
        with self._lock:
            self._threads += 1
            if self._threads > 1:
                return
            self._level, self._say = self._log.level, sys.unraisablehook
            self._failed = False
            self._log.setLevel(logging.CRITICAL + 1)
            sys.unraisablehook = _without_late_ends(self._say)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self._threads -= 1
            self._failed |= kind is not None
            if self._threads:
                return
            self._log.setLevel(self._level)
            if not self._failed:
                sys.unraisablehook = self._say


_hush = _Hush()


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[Any]:
    """Orbax with our settings, its log switched off: what matters is raised.

    Raises:
        OSError: for whatever Orbax raises but for want of memory.
    """
    # Takes two seconds, so only who needs it pays.
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = True
    try:
        with _hush, context:
            yield ocp
    # TensorStore reports a full disk or an I/O error as ValueError.
    except Exception as error:
        if is_memory_error(error):
            raise
        raise machine_error(error) from error


def _without_late_ends(say: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook for what cannot be raised, silent on what ends after a failed call.

    Orbax has closed its event loop by then; so the hook stays in place after a failure.
    """

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            say(unraisable)

    return hook
