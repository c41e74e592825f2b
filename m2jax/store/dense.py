"""The dense part as Orbax v1 checkpoints, one a bank. The only module that knows Orbax.

Saved without compression and OCDBT; what Orbax writes of times and paths is taken out,
so that the same arrays give the same bytes anywhere.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.store.machine_errors import machine_error

_COMMITTED = b"Checkpoint commit was successful\n"


def save_bank(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a new checkpoint folder and syncs it.

    Raises:
        OSError: the machine failed.
    """
    with _quiet_orbax() as ocp:
        try:
            ocp.save(path, dict(arrays))
        # TensorStore reports a full disk or an I/O error as ValueError.
        except Exception as error:
            raise machine_error(error) from error
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
        try:
            return {name: np.asarray(array) for name, array in ocp.load(path).items()}
        except Exception as error:
            raise machine_error(error) from error


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[Any]:
    """Orbax with our settings, its log switched off: what matters is raised."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        # Takes two seconds, so only who needs it pays.
        from orbax.checkpoint import v1 as ocp

        context = ocp.Context()
        context.array.saving.use_compression = False
        context.array.saving.use_ocdbt = False
        context.array.saving.use_zarr3 = True
        with context:
            yield ocp
    finally:
        log.setLevel(level)


def bank_files(path: Path) -> list[Path]:
    """Every file of a checkpoint folder, sorted."""
    return sorted(
        Path(folder, name) for folder, _, files in os.walk(path) for name in files
    )
