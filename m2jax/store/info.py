"""What is in a store, as plain JSON values."""

from pathlib import Path
from typing import Any

from m2jax.config import config_to_json
from m2jax.params import dense_banks
from m2jax.store.calibration import calibration_index
from m2jax.store.manifest import FORMAT, QUANTISER, VERSION
from m2jax.store.paths import TOKENIZER_FOLDER
from m2jax.store.reader import open_store


def store_info(path: str | Path) -> dict[str, Any]:
    """Model, layout and bytes of every part; those of calibration are not in the sum.

    Raises:
        As `open_store`; and StoreError if the calibration's index is damaged.
    """
    store = open_store(path)
    config, layout = store.config, store.layout
    dense = {
        bank: sum(store.files[name].bytes for name in store.bank_files(bank))
        for bank in dense_banks(config, layout)
    }
    return {
        "path": str(store.path),
        "format": FORMAT,
        "version": VERSION,
        "source": dict(store.manifest.source),
        "model": config_to_json(config),
        "quantiser": {
            "kind": QUANTISER,
            "group": layout.group,
            "width": layout.width,
        },
        "planes": {
            plane: {
                "dtype": layout.original_dtype if plane == "w16" else "uint4",
                "record_bytes": layout.record_bytes(plane),
                "chunk_bytes": layout.chunk_bytes(plane),
                "chunks_per_layer": layout.num_chunks,
                "bytes": config.num_layers * layout.plane_bytes(plane),
            }
            for plane in store.planes
        },
        "dense": {"banks": dense, "bytes": sum(dense.values())},
        "calibration": {
            part: sum(entry.bytes for entry in files.values())
            for part, files in sorted(calibration_index(store).items())
        },
        "tokenizer": sorted(
            name.removeprefix(f"{TOKENIZER_FOLDER}/")
            for name in store.files
            if name.startswith(f"{TOKENIZER_FOLDER}/")
        ),
        "files": len(store.files),
        "bytes": sum(entry.bytes for entry in store.files.values()),
    }
