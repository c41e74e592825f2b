"""Small checkpoints of random weights, read back without m2jax."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from m2jax.convert import convert
from m2jax.store import Store, TensorStoreChunks

DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
SCRIPT = Path(__file__).parents[1] / "scripts" / "make_checkpoint.py"

_spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
make_checkpoint, make_config = _module.make_checkpoint, _module.make_config

# Three chunks a layer of the shape below, the last one not full.
SMALL_CHUNK_TARGET_BYTES = 1 << 15
TOKENIZER = {
    "tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
    "chat_template.jinja": "{{ \N{SNOWMAN} }}".encode(),
    "generation_config.json": b'{"eos_token_id": 3}',
}


def small_checkpoint(path: Path, *, shards: int = 1, seed: int = 0, **shape) -> Path:
    """A checkpoint with a tokenizer, three chunks a layer."""
    config = make_config(**{"hidden": 64, "ffn": 300, "layers": 2, **shape})
    make_checkpoint(path, config, shards=shards, seed=seed)
    for name, data in TOKENIZER.items():
        (path / name).write_bytes(data)
    return path


def small_store(path: Path, **shape) -> Path:
    """The store of such a checkpoint, which lies beside it."""
    source = small_checkpoint(path.with_name(path.name + "-source"), **shape)
    return convert(source, path, group_size=32)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a checkpoint, in their own dtype."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, body = split_safetensors(path)
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                array = np.frombuffer(body[start:end], DTYPES[entry["dtype"]])
                tensors[name] = array.reshape(entry["shape"])
    return tensors


def split_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(path: Path, header: dict[str, Any] | str, body: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def edit_tensor(path: Path, name: str, index: int, value: float) -> None:
    """Sets one weight of a float16 checkpoint of one file."""
    header, _ = split_safetensors(path)
    with open(path, "r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start + header[name]["data_offsets"][0] + 2 * index)
        file.write(np.float16(value).tobytes())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file and folder."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_size,
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
    }


def signed(raw: dict[str, Any]) -> bytes:
    """A manifest with its own digest made right."""

    def canonical(value: Any) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    body = {key: value for key, value in raw.items() if key != "sha256"}
    digest = hashlib.sha256(canonical(body)).hexdigest()
    return canonical({**body, "sha256": digest})


def read_plane(store: Store, layer: int, plane: str) -> np.ndarray:
    layout = store.layout
    out = np.empty((layout.padded_neurons, layout.record_bytes(plane)), np.uint8)
    TensorStoreChunks(store).read(layer, plane, out)
    return out


def expected_rows(source: Path, layer: int, *, dtype: Any = None) -> np.ndarray:
    """[F, 3, D] in the source's dtype or another: gate row, up row, down column."""
    tensors = read_tensors(source)
    at = f"model.layers.{layer}.mlp."
    gate, up, down = (tensors[f"{at}{n}_proj.weight"] for n in ("gate", "up", "down"))
    rows = [gate, up, down.T]
    return np.stack([row.astype(dtype or row.dtype) for row in rows], axis=1)
