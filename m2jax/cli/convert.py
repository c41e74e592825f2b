"""`m2jax convert`: a checkpoint to a store."""

import logging
import time
from pathlib import Path
from typing import Annotated

import typer

from m2jax.cli.hub import local_source
from m2jax.cli.options import AsJson, Debug
from m2jax.cli.progress import Activity
from m2jax.cli.session import Answer, Session
from m2jax.convert import convert as convert_checkpoint
from m2jax.layout import PLANES
from m2jax.store.reader import read_store
from m2jax.units import format_bytes


def convert(
    context: typer.Context,
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder with config.json and *.safetensors, or a hub id (org/name).",
        ),
    ],
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="Folder to write; new or empty.")
    ],
    group_size: Annotated[
        int,
        typer.Option(
            metavar="WEIGHTS", help="Weights that share a scale: 16, 32, 64 or 128."
        ),
    ] = 64,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="keep|float16|bfloat16|float32",
            help="Of the 16-bit plane and the dense part; keep: the checkpoint's.",
        ),
    ] = "keep",
    planes: Annotated[
        str,
        typer.Option(
            metavar="q4,r4,w16",
            help="What to keep of every neuron: q4, and r4 (for 8 bits) or w16 (the "
            "original weights, two thirds of the store) or both.",
        ),
    ] = ",".join(PLANES),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store, finished or not.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Turn a Hugging Face checkpoint into a store.

    Killed at any point, the same command goes on where it stopped.
    """
    session: Session = context.obj
    session.hint = "run the same command again to resume"
    logging.getLogger("m2jax").setLevel(logging.INFO)
    start_s = time.monotonic()
    source = local_source(src)
    with Activity(session.console, "convert") as activity:
        convert_checkpoint(
            source,
            store,
            group_size=group_size,
            dtype=None if dtype == "keep" else dtype,
            planes=[plane.strip() for plane in planes.split(",")],
            overwrite=overwrite,
            progress=activity.update,
        )
    elapsed_s = time.monotonic() - start_s
    files = read_store(store).files.values()
    size_bytes = sum(entry.bytes for entry in files)
    return Answer(
        {
            "store": str(store),
            "bytes": size_bytes,
            "files": len(files),
            "elapsed_s": elapsed_s,
        },
        f"{store}: {format_bytes(size_bytes)} in {len(files)} files, {elapsed_s:.1f} s",
    )
