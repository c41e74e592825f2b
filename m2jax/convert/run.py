"""`convert`: a Hugging Face folder to a store; streamed, resumable, one writer only.

Threads read, quantise, hash and write chunks while one more saves dense banks.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2jax.convert.job import Job, make_job
from m2jax.convert.journal import claim
from m2jax.convert.names import dense_tensors, neuron_tensors
from m2jax.convert.output import Output, Progress, clear, remove_work
from m2jax.convert.rows import chunk_records, dense_array
from m2jax.convert.source import open_source
from m2jax.convert.target import check_space, check_target, target_state
from m2jax.cores import cores
from m2jax.errors import TierFailed
from m2jax.layout import PLANES
from m2jax.params import layer_name
from m2jax.store.files import list_files
from m2jax.store.paths import (
    TOKENIZER_FOLDER,
    WORK_FOLDER,
    array_json,
    array_path,
    chunk_path,
)
from m2jax.store.unfinished import read_journal

# Each holds a chunk of every plane; two, so that one reads while the other computes.
LEAST_THREADS, MOST_THREADS = 2, 8
# What Orbax adds to an array: metadata, index, markers; each a small file.
ORBAX_FILES_PER_ARRAY = 4
MANIFEST_BYTES_PER_FILE = 200


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    group_size: int = 64,
    dtype: str | None = None,
    planes: Iterable[str] = PLANES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a store of a checkpoint, or goes on where an earlier try was stopped.

    Killed at any moment, the same call again ends in the same bytes.

    Args:
        src: folder with config.json and safetensors.
        dst: folder of the store: new, empty, or an unfinished conversion of `src`.
        group_size: weights that share a scale: 128, 64, 32 or 16; a smaller one is
            taken where it does not divide the row.
        dtype: of plane `w16` and the dense part: "float16", "bfloat16" or "float32";
            None keeps that of the checkpoint.
        planes: those to write: "q4", and "r4" or "w16" or both. Without "w16" the
            original weights are not in the store: a third of the bytes, no 16 bits.
        overwrite: removes a store, finished or not, that is at `dst`.
        progress: called with bytes done, bytes in all and what was written.

    Returns:
        `dst`.

    Raises:
        ValueError, NotImplementedError: the source, the target or an option is refused.
        DoesNotFit: the disk is too small; nothing was written.
        TierFailed: the disk failed or filled up; what is finished is kept.
    """
    source, target = open_source(src), Path(dst)
    job = make_job(source, group_size=group_size, dtype=dtype, planes=planes)
    _check_target(job, target, overwrite=overwrite)
    with _naming(target), claim(target):
        # Another process may have finished it since.
        if not overwrite and target_state(target) == "complete":
            remove_work(target)
        check_target(target, source.path, overwrite=overwrite)
        if overwrite or read_journal(target).header is None:
            clear(target)
        output = Output(target, job.header(), progress=progress)
        try:
            _write(job, output)
            source.check_unchanged()
            output.finish(job.manifest)
        finally:
            output.close()
    return target


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """An error of the system that names no file, as of a write, names the target."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise TierFailed(
            f"{target}: {error.strerror}; what is finished is kept: run the same "
            "conversion again to resume",
            path=target,
        ) from error


def _check_target(job: Job, target: Path, *, overwrite: bool) -> None:
    """All that can be refused before anything is written."""
    state = target_state(target)
    if state == "complete" and not overwrite and (target / WORK_FOLDER).is_dir():
        # Left by a conversion that was killed just after it had finished.
        with claim(target):
            remove_work(target)
    check_target(target, job.source.path, overwrite=overwrite)
    sizes = job.sizes()
    extra = [1] * (ORBAX_FILES_PER_ARRAY * len(job.dense_sizes()))
    manifest = MANIFEST_BYTES_PER_FILE * (len(sizes) + len(extra))
    present = () if state == "empty" else list_files(target).values()
    check_space(target, [*sizes, *extra, manifest], present=present)


def _write(job: Job, output: Output) -> None:
    for name, path in job.source.tokenizer.items():
        output.file(f"{TOKENIZER_FOLDER}/{name}", path.read_bytes())
    threads = min(max(LEAST_THREADS, cores()), MOST_THREADS)
    chunks = ThreadPoolExecutor(threads, thread_name_prefix="m2jax-convert")
    # Orbax runs an event loop: an interrupt must not land in the midst of it.
    banks = ThreadPoolExecutor(1, thread_name_prefix="m2jax-convert")
    try:
        work = _Work(job, output, chunks, banks)
        work.write_bank("embed", {})
        work.write_layers()
        work.write_bank("head", {})
    finally:
        # On an interrupt too, no thread writes on after we have returned.
        for pool in (chunks, banks):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (chunks, banks):
            pool.shutdown(wait=True)


class _Layer(NamedTuple):
    """A layer whose chunks are being made, and what its bank gets from them."""

    bank: str
    chunks: list[Future]
    arrays: dict[str, np.ndarray]


class _Work(NamedTuple):
    """What is done in which threads; the caller's own one only waits."""

    job: Job
    output: Output
    chunks: ThreadPoolExecutor
    banks: ThreadPoolExecutor

    def write_layers(self) -> None:
        """Chunks of one layer are made while the bank of the one before is saved."""
        before: _Layer | None = None
        for layer in range(self.job.source.config.num_layers):
            started = self.start_layer(layer)
            if before is not None:
                self.finish_layer(before)
            before = started
        if before is not None:
            self.finish_layer(before)

    def start_layer(self, layer: int) -> _Layer | None:
        """Hands a layer's chunks to the pool; None if the layer is finished."""
        config, layout = self.job.source.config, self.job.layout
        bank = f"layers/{layer_name(layer, config)}"
        folders = {plane: array_path(layer, plane, config) for plane in layout.planes}
        paths = [
            chunk_path(folder, chunk)
            for folder in folders.values()
            for chunk in range(layout.num_chunks)
        ]
        if self.output.has_bank(bank) and all(map(self.output.has, paths)):
            return None
        for plane, folder in folders.items():
            self.output.file(f"{folder}/zarr.json", array_json(layout, plane))
        arrays = self.job.neuron_arrays()
        down = self.job.source.tensors[neuron_tensors(layer)["down"]].read()
        futures = [
            self.chunks.submit(self.write_chunk, layer, chunk, down, arrays)
            for chunk in range(layout.num_chunks)
        ]
        return _Layer(bank, futures, arrays)

    def write_chunk(
        self, layer: int, chunk: int, down: np.ndarray, arrays: dict[str, np.ndarray]
    ) -> None:
        """Writes a chunk of every plane kept and fills its rows of `arrays`."""
        layout = self.job.layout
        records = chunk_records(self.job.source, layer, chunk, down, layout=layout)
        start = chunk * layout.chunk_neurons
        rows = slice(start, start + layout.chunk_neurons)
        arrays["scales"][rows] = records.scales
        arrays["down_norm"][rows] = records.down_norm
        arrays["noise"][rows] = records.noise
        for plane, data in records.planes.items():
            folder = array_path(layer, plane, self.job.source.config)
            self.output.file(chunk_path(folder, chunk), data.data)

    def finish_layer(self, layer: _Layer) -> None:
        for chunk in layer.chunks:
            chunk.result()
        self.write_bank(layer.bank, layer.arrays)

    def write_bank(self, bank: str, extra: dict[str, np.ndarray]) -> None:
        """Saves a bank: its own tensors, and what the neurons add to it."""
        if not self.output.has_bank(bank):
            self.banks.submit(self._save_bank, bank, extra).result()

    def _save_bank(self, bank: str, extra: dict[str, np.ndarray]) -> None:
        source = self.job.source
        arrays = {
            name: dense_array(
                [source.tensors[tensor] for tensor in tensors], dtype=self.job.dtype
            )
            for name, tensors in dense_tensors(source.config)[bank].items()
        }
        self.output.bank(bank, {**arrays, **extra})
