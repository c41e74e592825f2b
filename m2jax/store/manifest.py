"""The manifest: what a store is and the sha256 of every byte in it. Opens no file.

A manifest is believed only where it agrees with what its own model config implies:
names and sizes under `neurons/` are computed, never taken from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from m2jax.config import ModelConfig, config_from_json, config_to_json
from m2jax.errors import StoreError
from m2jax.layout import ORIGINAL_DTYPES, PLANES, Layout, make_layout
from m2jax.params import dense_banks
from m2jax.quant import GROUP_SIZES
from m2jax.store.entries import (
    FileEntry,
    digest_of,
    entries_to_json,
    entry_from_json,
    want_keys,
    want_object,
)
from m2jax.store.paths import (
    MANIFEST,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    bank_path,
    count_neuron_files,
    neuron_files,
)
from m2jax.strict_json import canonical_json, parse_json, show

FORMAT = "m2jax-store"
# 2: scales carry the sign of a group's largest weight.
VERSION = 2
QUANTISER = "nested, signed scale"
MAX_MANIFEST_BYTES = 256 << 20
_FIELDS = {
    *("format", "version", "model", "source", "quantiser", "planes", "shard"),
    *("banks", "files", "sha256"),
}


@dataclass(frozen=True)
class Manifest:
    """A store's content.

    source: where it came from: {"name": folder name, "dtypes": {dtype: tensors}}.
    files: every file but the manifest, by its path relative to the store.
    """

    config: ModelConfig
    layout: Layout
    source: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) that the manifest's bytes carry of themselves."""
        return digest_of(_body(self))


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """Canonical JSON, its own digest included."""
    return canonical_json({**_body(manifest), "sha256": manifest.digest})


def _body(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": config_to_json(manifest.config),
        "source": dict(manifest.source),
        **_implied(manifest.config, manifest.layout),
        "files": entries_to_json(manifest.files),
    }


def bytes_to_manifest(data: bytes) -> Manifest:
    """The strict inverse of `manifest_to_bytes`.

    Raises:
        StoreError: names the field, what was wanted and what came.
    """
    try:
        raw = parse_json(data)
        return _checked(raw, data)
    except ValueError as error:
        raise StoreError(
            f"{MANIFEST}: {error}; the store is damaged: convert it again",
            path=MANIFEST,
        ) from None


def _checked(raw: Any, data: bytes) -> Manifest:
    want_object(raw, "the manifest")
    if raw.get("format") != FORMAT:
        raise ValueError(f"format: want {FORMAT!r}, got {show(raw.get('format'))}")
    if type(raw.get("version")) is not int:
        raise ValueError(f"version: want an integer, got {show(raw.get('version'))}")
    if raw["version"] != VERSION:
        raise StoreError(
            f"{MANIFEST}: version: this m2jax reads {VERSION}, got {raw['version']}; "
            "convert the checkpoint again"
            + (", or update m2jax" if raw["version"] > VERSION else ""),
            path=MANIFEST,
        )
    want_keys(raw, _FIELDS, "the manifest")
    config = config_from_json(raw["model"], where="model")
    # Bounds whatever is built from the count below by what the file really holds.
    if type(raw["banks"]) is not list or len(raw["banks"]) != config.num_layers:
        raise ValueError(f"banks: want {config.num_layers} layers")
    layout = _layout(raw, config)
    for field, wanted in _implied(config, layout).items():
        if not _same(raw[field], wanted):
            raise ValueError(
                f"{field}: the model implies {show(wanted)}, got {show(raw[field])}"
            )
    want_object(raw["source"], "source")
    files = _files(raw["files"], config, layout)
    digest = raw.pop("sha256")
    if digest != digest_of(raw) or data != canonical_json({**raw, "sha256": digest}):
        raise ValueError("sha256: the manifest's own checksum does not match")
    return Manifest(config, layout, raw["source"], files)


def _layout(raw: dict[str, Any], config: ModelConfig) -> Layout:
    planes = want_object(raw["planes"], "planes")
    if not planes.keys() <= set(PLANES) or "q4" not in planes:
        raise ValueError(
            f"planes: want q4, r4 and w16, or some with q4, got {show(sorted(planes))}"
        )
    quantiser = want_object(raw["quantiser"], "quantiser")
    if "w16" in planes:
        where, dtype = "planes.w16.dtype", want_object(planes["w16"], "planes.w16")
        dtype = dtype.get("dtype")
    else:
        where, dtype = "quantiser.of", quantiser.get("of")
    if not isinstance(dtype, str) or dtype not in ORIGINAL_DTYPES:
        raise ValueError(
            f"{where}: want one of {list(ORIGINAL_DTYPES)}, got {show(dtype)}"
        )
    group = quantiser.get("group")
    if type(group) is not int or group not in GROUP_SIZES:
        raise ValueError(
            f"quantiser.group: want one of {GROUP_SIZES}, got {show(group)}"
        )
    return make_layout(config, original_dtype=dtype, group_size=group, planes=planes)


def _implied(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Fields that follow from config and layout.

    Without `w16`, whose dtype tells what was quantised, the quantiser does: `of`.
    """
    return {
        "quantiser": {
            "kind": QUANTISER,
            "group": layout.group,
            "width": layout.width,
            "nibbles": "halves",
            "scales": "float16",
            **({} if "w16" in layout.planes else {"of": layout.original_dtype}),
        },
        "planes": {
            plane: {
                "record_bytes": layout.record_bytes(plane),
                "chunk_neurons": layout.chunk_neurons,
                "num_chunks": layout.num_chunks,
                "dtype": layout.original_dtype if plane == "w16" else "uint4",
            }
            for plane in layout.planes
        },
        "shard": {"shard_id": 0, "num_shards": 1},
        "banks": list(range(config.num_layers)),
    }


def _files(raw: Any, config: ModelConfig, layout: Layout) -> dict[str, FileEntry]:
    want_object(raw, "files")
    if count_neuron_files(config, layout) > len(raw):
        raise ValueError(
            f"files: the model has {count_neuron_files(config, layout)} files under "
            f"neurons/ alone, the table {len(raw)}"
        )
    files = {
        path: entry_from_json(entry, where=f"files.{show(path)}")
        for path, entry in raw.items()
    }
    neurons = {path for path in files if path.startswith("neurons/")}
    wanted = neuron_files(config, layout)
    for path, size in wanted.items():
        if path not in files:
            raise ValueError(f"files: {path} is not listed")
        if files[path].bytes != size:
            raise ValueError(
                f"files.{path}.bytes: the model implies {size}, got {files[path].bytes}"
            )
    banks = {bank_path(bank) for bank in dense_banks(config, layout)}
    tokenizer = {f"{TOKENIZER_FOLDER}/{name}" for name in TOKENIZER_FILES}
    others = files.keys() - neurons
    stray = (neurons - wanted.keys()) | {
        path
        for path in others
        if path not in tokenizer and _bank_of(path, banks) is None
    }
    if stray:
        raise ValueError(f"files: {show(min(stray))} is no file of this model")
    empty = banks - {_bank_of(path, banks) for path in others}
    if empty:
        raise ValueError(f"files: nothing listed under {min(empty)}")
    return files


def _bank_of(path: str, banks: set[str]) -> str | None:
    """The bank a path lies in, or None; a path with odd parts lies in none."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        return None
    for depth in (2, 3):
        folder = "/".join(parts[:depth])
        if len(parts) > depth and folder in banks:
            return folder
    return None


def _same(value: Any, wanted: Any) -> bool:
    """Equality in which 1, 1.0 and true differ."""
    return canonical_json(value) == canonical_json(wanted)
