"""`convert`: a Hugging Face folder to a store; streamed, resumable, one writer only.

Two threads read, quantise, hash and write chunks while the main one saves dense banks.
"""

from concurrent.futures import Future, ThreadPoolExecutor
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

THREADS = 2
# What Orbax adds to an array: metadata, index, markers; each a small file.
ORBAX_FILES_PER_ARRAY = 4
MANIFEST_BYTES_PER_FILE = 200


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    group_size: int = 64,
    dtype: str | None = None,
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
    job = make_job(source, group_size=group_size, dtype=dtype)
    _check_target(job, target, overwrite=overwrite)
    with claim(target):
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
    _write_bank(job, "embed", {}, output)
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="m2jax-convert")
    try:
        _write_layers(job, output, pool)
    finally:
        # On an interrupt too, no thread writes on after we have returned.
        pool.shutdown(wait=True, cancel_futures=True)
    _write_bank(job, "head", {}, output)


class _Layer(NamedTuple):
    """A layer whose chunks are being made, and what its bank gets from them."""

    bank: str
    chunks: list[Future]
    arrays: dict[str, np.ndarray]


def _write_layers(job: Job, output: Output, pool: ThreadPoolExecutor) -> None:
    """Chunks of one layer are made while the bank of the one before is saved."""
    before: _Layer | None = None
    for layer in range(job.source.config.num_layers):
        started = _start_layer(job, layer, output, pool)
        if before is not None:
            _finish_layer(job, before, output)
        before = started
    if before is not None:
        _finish_layer(job, before, output)


def _start_layer(
    job: Job, layer: int, output: Output, pool: ThreadPoolExecutor
) -> _Layer | None:
    """Hands a layer's chunks to the pool; None if the layer is finished."""
    config = job.source.config
    bank = f"layers/{layer_name(layer, config)}"
    folders = [array_path(layer, plane, config) for plane in PLANES]
    chunks = range(job.layout.num_chunks)
    paths = [chunk_path(folder, chunk) for folder in folders for chunk in chunks]
    if output.has_bank(bank) and all(output.has(path) for path in paths):
        return None
    for folder, plane in zip(folders, PLANES, strict=True):
        output.file(f"{folder}/zarr.json", array_json(job.layout, plane))
    arrays = job.neuron_arrays()
    down = job.source.tensors[neuron_tensors(layer)["down"]].read()
    futures = [
        pool.submit(_write_chunk, job, layer, chunk, down, arrays, output)
        for chunk in chunks
    ]
    return _Layer(bank, futures, arrays)


def _write_chunk(
    job: Job,
    layer: int,
    chunk: int,
    down: np.ndarray,
    arrays: dict[str, np.ndarray],
    output: Output,
) -> None:
    records = chunk_records(job.source, layer, chunk, down, layout=job.layout)
    start = chunk * job.layout.chunk_neurons
    rows = slice(start, start + job.layout.chunk_neurons)
    arrays["scales"][rows] = records.scales
    arrays["down_norm"][rows] = records.down_norm
    for plane, data in records.planes.items():
        folder = array_path(layer, plane, job.source.config)
        output.file(chunk_path(folder, chunk), data.data)


def _finish_layer(job: Job, layer: _Layer, output: Output) -> None:
    for chunk in layer.chunks:
        chunk.result()
    _write_bank(job, layer.bank, layer.arrays, output)


def _write_bank(
    job: Job, bank: str, extra: dict[str, np.ndarray], output: Output
) -> None:
    """Saves a bank: its own tensors, and what the neurons add to it."""
    if output.has_bank(bank):
        return
    arrays = {
        name: dense_array(
            [job.source.tensors[tensor] for tensor in tensors], dtype=job.dtype
        )
        for name, tensors in dense_tensors(job.source.config)[bank].items()
    }
    output.bank(bank, {**arrays, **extra})
