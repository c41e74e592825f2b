"""The bundled model's ReLU form, from the bundled weights and a small difference.

    .venv/bin/python scripts/relu_model.py OUT              writes a Hugging Face folder
    .venv/bin/python scripts/relu_model.py --pack TRAINED   makes the difference anew

The difference of every matrix is kept at 4 bits in groups of 64 (plane q4 of the
store's own quantiser), that of every norm as float16: 3.2 MB instead of 16. How it was
trained, and what the rounding costs: docs/training.md.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from m2jax.bundled import SOURCE
from m2jax.quant import (
    dequantise_base,
    quantise_rows,
    split_codes,
)

DELTA = Path(__file__).parent / "data" / "pystories8M-relu" / "delta.safetensors"
GROUP = 64
WEIGHTS = "model.safetensors"
# Frozen in training, and so the same.
EMBEDDING = "model.embed_tokens.weight"


def pack(trained: Path) -> None:
    """Writes the difference of a trained folder to the bundled model."""
    base, weights = load_file(SOURCE / WEIGHTS), load_file(trained / WEIGHTS)
    delta = {}
    for name, array in sorted(weights.items()):
        change = array.astype(np.float32) - base[name].astype(np.float32)
        if name == EMBEDDING:
            if np.any(change):
                raise ValueError(f"{trained}: the embedding differs; freeze it")
        elif array.ndim == 1:
            delta[name] = change.astype(np.float16)
        else:
            codes, scales, _ = quantise_rows(change, group=GROUP)
            delta[f"{name}.q4"], _ = split_codes(codes)
            delta[f"{name}.scales"] = scales
    DELTA.parent.mkdir(parents=True, exist_ok=True)
    save_file(delta, DELTA)


def write_relu_model(out: Path) -> None:
    """Writes the ReLU model as a Hugging Face folder; its config.json last.

    Raises:
        ValueError: the folder is not empty, or the difference is of other weights.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; give a new folder")
    base, delta = load_file(SOURCE / WEIGHTS), load_file(DELTA)
    weights = {EMBEDDING: base.pop(EMBEDDING)}
    for name, array in base.items():
        if name in delta:
            change = delta.pop(name).astype(np.float32)
        elif f"{name}.q4" in delta:
            change = dequantise_base(
                delta.pop(f"{name}.q4"), delta.pop(f"{name}.scales"), group=GROUP
            )
        else:
            raise ValueError(f"{DELTA}: has no difference of {name}")
        weights[name] = (array.astype(np.float32) + change).astype(np.float16)
    if delta:
        raise ValueError(f"{DELTA}: {min(delta)} is no weight of the bundled model")
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((SOURCE / "config.json").read_bytes())
    for path in SOURCE.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    scratch = out / "config.json.tmp"
    scratch.write_text(json.dumps({**config, "hidden_act": "relu"}, indent=2) + "\n")
    os.replace(scratch, out / "config.json")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--pack", type=Path, metavar="TRAINED")
    args = parser.parse_args()
    try:
        if args.pack:
            pack(args.pack)
        if args.out:
            write_relu_model(args.out)
        elif not args.pack:
            raise ValueError("give OUT or --pack TRAINED")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
