"""Where every file of a store lies and how long it is. Computed; touches no disk."""

import json
from typing import Any

from m2jax.config import ModelConfig
from m2jax.layout import Layout
from m2jax.params import layer_name

MANIFEST = "manifest.json"
# Holds lock, journal and half-written files while a conversion runs.
WORK_FOLDER = ".m2jax-convert"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
STORE_FOLDERS = (TOKENIZER_FOLDER, "dense", "neurons", "calibration")


def bank_path(bank: str) -> str:
    """Folder of one bank of the dense part."""
    return f"dense/{bank}"


def array_path(layer: int, plane: str, config: ModelConfig) -> str:
    """Folder of one layer's plane, a zarr array."""
    return f"neurons/{layer_name(layer, config)}/{plane}"


def chunk_path(array: str, chunk: int) -> str:
    """File of one chunk; its bytes are the records in order."""
    return f"{array}/c/{chunk}/0"


def array_metadata(layout: Layout, plane: str) -> dict[str, Any]:
    """zarr v3 metadata of one layer's plane: uint8 [padded_neurons, record_bytes]."""
    record = layout.record_bytes(plane)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [layout.padded_neurons, record],
        "data_type": "uint8",
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [layout.chunk_neurons, record]},
        },
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes"}],
        "fill_value": 0,
    }


def array_json(layout: Layout, plane: str) -> bytes:
    """Content of the array's zarr.json: ours, so that no library's version shows."""
    metadata = array_metadata(layout, plane)
    return json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()


def count_neuron_files(config: ModelConfig, layout: Layout) -> int:
    return config.num_layers * len(layout.planes) * (layout.num_chunks + 1)


def neuron_files(config: ModelConfig, layout: Layout) -> dict[str, int]:
    """Every file under `neurons/` and its size in bytes."""
    sizes = {}
    metadata_bytes = {plane: len(array_json(layout, plane)) for plane in layout.planes}
    for layer in range(config.num_layers):
        for plane in layout.planes:
            array = array_path(layer, plane, config)
            sizes[f"{array}/zarr.json"] = metadata_bytes[plane]
            for chunk in range(layout.num_chunks):
                sizes[chunk_path(array, chunk)] = layout.chunk_bytes(plane)
    return sizes
