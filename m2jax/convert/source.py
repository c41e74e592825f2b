"""A Hugging Face folder, read and checked before anything is written."""

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2jax.config import ModelConfig
from m2jax.convert.names import is_ignorable, neuron_tensors, tensor_shapes
from m2jax.convert.safetensors_file import DTYPES, Tensor, read_header
from m2jax.hf_config import config_from_hf
from m2jax.layout import MATRICES
from m2jax.store.manifest import FORMAT
from m2jax.store.paths import MANIFEST, TOKENIZER_FILES
from m2jax.strict_json import canonical_json, read_json, show
from m2jax.text import load_tokenizer

log = logging.getLogger("m2jax")

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
MAX_TOKENIZER_BYTES = 256 << 20


@dataclass(frozen=True)
class Source:
    """A checkpoint whose names, shapes, dtypes and files are as its config wants them.

    tensors: those the model needs. tokenizer: files to be copied as they are.
    stamps: size and modification time (ns) of every file of weights.
    fingerprint: digest of names, sizes, times and headers: who the source is.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: dict[str, Path]
    stamps: dict[Path, tuple[int, int]]
    fingerprint: str

    def check_unchanged(self) -> None:
        """Raises ValueError if a file of weights was written since it was opened."""
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise ValueError(
                    f"{path}: changed while it was converted; run it again with "
                    "--overwrite when nothing writes there"
                )

    def dtypes(self) -> dict[str, int]:
        """How many tensors have each dtype."""
        names = (DTYPES[tensor.dtype].name for tensor in self.tensors.values())
        return dict(sorted(Counter(names).items()))

    def neuron_dtypes(self) -> set[str]:
        """The dtypes of all gate, up and down matrices."""
        return {
            DTYPES[self.tensors[neuron_tensors(layer)[matrix]].dtype].name
            for layer in range(self.config.num_layers)
            for matrix in MATRICES
        }


def open_source(path: str | Path) -> Source:
    """Reads and checks everything of a checkpoint but the weights themselves.

    Raises:
        ValueError: names the file, tensor or field that is not as it should be.
        NotImplementedError: a model that we do not compute.
    """
    folder = Path(path)
    _check_folder(folder)
    raw = read_json(folder / CONFIG)
    generation = None
    if (folder / GENERATION).exists():
        generation = read_json(folder / GENERATION)
    weights = _weight_files(folder)
    config = config_from_hf(raw, where=str(folder / CONFIG), generation=generation)
    files = sorted(set(weights.values()) if isinstance(weights, dict) else weights)
    stamps = {file: _stamp(file) for file in files}
    digests, found = _read_headers(folder, files)
    if isinstance(weights, dict):
        _check_index(folder, weights, found)
    tokenizer = _tokenizer_files(folder, config)
    return Source(
        path=folder,
        config=config,
        tensors=_needed(found, config, folder),
        tokenizer=tokenizer,
        stamps=stamps,
        fingerprint=_fingerprint(folder, digests, stamps, tokenizer),
    )


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _read_headers(
    folder: Path, files: list[Path]
) -> tuple[dict[Path, str], dict[str, Tensor]]:
    """Digest of every header, and all tensors of all files."""
    digests: dict[Path, str] = {}
    found: dict[str, Tensor] = {}
    for file in files:
        header, tensors = read_header(file)
        digests[file] = hashlib.sha256(header).hexdigest()
        for name, tensor in tensors.items():
            if name in found:
                raise ValueError(
                    f"{folder}: tensor {show(name)} lies both in "
                    f"{found[name].path.name} and in {file.name}; keep one"
                )
            found[name] = tensor
    return digests, found


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; want a Hugging Face checkpoint")
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: a file; want the folder of a Hugging Face checkpoint"
        )
    manifest = folder / MANIFEST
    if manifest.is_file() and FORMAT.encode() in manifest.read_bytes():
        raise ValueError(f"{folder}: is an m2jax store already; it needs no conversion")
    if not (folder / CONFIG).exists():
        why = "want a Hugging Face checkpoint"
        if any(folder.glob("*.gguf")):
            why = "GGUF files are not read; want the checkpoint they were made from"
        if (folder / ADAPTER).exists():
            why = f"{ADAPTER} is an adapter's (LoRA); merge it into its model first"
        raise ValueError(f"{folder}: no {CONFIG}; {why}")


def _weight_files(folder: Path) -> dict[str, Path] | list[Path]:
    """The one file, or the index's map of tensors to files."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return _read_index(folder / INDEX)
    pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
    if pickles:
        raise ValueError(
            f"{folder}: only pickled weights ({pickles[0]}), which can run code and "
            "are never opened; convert them to safetensors, or download that form"
        )
    raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX}; download the weights")


def _read_index(path: Path) -> dict[str, Path]:
    weight_map: Any = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path}: weight_map: want an object of names and files, "
            f"got {show(weight_map)}"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise ValueError(
                f"{path}: weight_map: {show(name)}: want the name of a file beside the "
                f"index, got {show(file)}"
            )
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{path.parent}: shard {missing[0]} is missing "
            f"({len(missing)} of {len(files)} shards are); download it"
        )
    return {name: path.parent / file for name, file in weight_map.items()}


def _is_plain_name(file: str) -> bool:
    return Path(file).name == file and file not in ("", "..") and "\0" not in file


def _check_index(
    folder: Path, index: dict[str, Path], found: dict[str, Tensor]
) -> None:
    for name, file in index.items():
        if name not in found or found[name].path != file:
            raise ValueError(
                f"{folder / INDEX}: tensor {show(name)} should lie in {file.name} and "
                "does not; download both again"
            )


def _needed(
    found: dict[str, Tensor], config: ModelConfig, folder: Path
) -> dict[str, Tensor]:
    """The model's tensors, their shapes and dtypes checked."""
    shapes = tensor_shapes(config)
    missing = [name for name in shapes if name not in found]
    if missing:
        raise ValueError(
            f"{folder}: tensor {missing[0]} is missing "
            f"({len(missing)} of {len(shapes)} that {CONFIG} implies are)"
        )
    for name, shape in shapes.items():
        tensor = found[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.path}: {name}: {CONFIG} implies shape {list(shape)}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{tensor.path}: {name}: want dtype {', '.join(DTYPES)}, "
                f"got {tensor.dtype}; take the 16-bit checkpoint"
            )
    extra = [
        name for name in found if name not in shapes and not is_ignorable(name, config)
    ]
    if extra:
        log.warning(
            "%s: %d tensors the model has no use for are left out: %s",
            folder,
            len(extra),
            ", ".join(show(name) for name in sorted(extra)[:5])
            + (", .." if len(extra) > 5 else ""),
        )
    return {name: found[name] for name in shapes}


def _tokenizer_files(folder: Path, config: ModelConfig) -> dict[str, Path]:
    """Raises ValueError for what no store could be used with."""
    files = {
        name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()
    }
    for path in files.values():
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise ValueError(
                f"{path}: {size:,} bytes; at most {MAX_TOKENIZER_BYTES:,} are copied"
            )
    load_tokenizer(
        folder, vocab_size=config.vocab_size, bos_token_ids=config.bos_token_ids
    )
    return files


def _fingerprint(
    folder: Path,
    digests: dict[Path, str],
    stamps: dict[Path, tuple[int, int]],
    tokenizer: dict[str, Path],
) -> str:
    files = {path.name: [*stamps[path], digests[path]] for path in digests}
    for path in (folder / CONFIG, *tokenizer.values()):
        files[path.name] = [hashlib.sha256(path.read_bytes()).hexdigest()]
    return hashlib.sha256(canonical_json(files)).hexdigest()
