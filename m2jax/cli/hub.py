"""Checkpoints from the Hugging Face hub, where huggingface_hub is installed."""

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
# Folders hold other formats; consolidated files hold the same weights once more.
OTHERS = ["*/*", "consolidated*"]


def local_source(source: str) -> Path:
    """The checkpoint's folder: `source` itself, or its download if it is a hub id.

    The library's own progress bars show the download, on stderr.

    Raises:
        ValueError: no folder, and no model of the hub either. OSError: no network.
    """
    path = Path(source)
    if path.exists() or not HUB_ID.fullmatch(source):
        return path
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ValueError(
            f"{source}: no such folder; to download it from the Hugging Face hub, run "
            "pip install -e '.[hub]' in m2jax's folder"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            source, allow_patterns=FILES, ignore_patterns=OTHERS
        )
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(
            f"{source}: no such folder, and no such model on the Hugging Face hub (or "
            f"no access to it): {_first_line(error)}"
        ) from error
    # Whatever else library and HTTP client raise is the network's or the disk's.
    except Exception as error:
        raise OSError(
            f"{source}: no such folder, and the download from the Hugging Face hub "
            f"failed: {_first_line(error)}"
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
