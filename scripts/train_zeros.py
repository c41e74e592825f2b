"""Shows the share of feed-forward activations that are exactly zero, layer by layer.

    python scripts/train_zeros.py FOLDER --text FILE

FOLDER is a Hugging Face folder of a plain LLaMA; the text is read in windows as
`m2jax perplexity` reads it, and the loss is said too, as a check.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from train_files import find_tokenizer, read_checkpoint
from train_model import apply, mean_loss
from train_text import read

from m2jax.config import ModelConfig


def zero_shares(folder: Path, text: str, *, length: int) -> dict[str, object]:
    """Shares [L] and their mean, over whole windows of `length` tokens, BOS included.

    Raises:
        ValueError: the text is shorter than a window.
    """
    _, config, weights = read_checkpoint(folder)
    tokenizer = find_tokenizer(folder)
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids, step = tokenizer.encode(text, add_bos=False), length - len(front)
    starts = range(0, len(ids) - step + 1, step)
    if not starts:
        raise ValueError(f"the text has {len(ids)} tokens: want at least {step}")

    windows = [np.array([front + ids[s : s + step]], np.int32) for s in starts]
    found = [_loss_and_shares(config, weights, window) for window in windows]
    shares = np.mean([np.asarray(shares) for _, shares in found], axis=0)
    return {
        "zero_share": float(shares.mean()),
        "zero_share_layers": [round(float(share), 4) for share in shares],
        "nll_per_token": float(np.mean([float(loss) for loss, _ in found])),
        "windows": len(found),
    }


@partial(jax.jit, static_argnums=0)
def _loss_and_shares(
    config: ModelConfig, weights: dict[str, Any], window: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of a window [1, T]. Weights are arguments: models of one config share it."""
    logits, shares = apply(config, weights, window)
    return mean_loss(logits[:, :-1], window[:, 1:]), shares


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    args = parser.parse_args()
    try:
        text = read(args.text)
        print(json.dumps(zero_shares(args.folder, text, length=args.context)))
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
