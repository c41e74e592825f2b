"""Seconds a token of transformers with accelerate's disk offload; JSON on stdout.

    peers/hf/bin/python scripts/peer_accelerate.py HF_FOLDER -n 2

Runs in an environment of its own that has torch, transformers and accelerate. Every
layer's weights stay on disk and are read again for each token.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from accelerate import (  # pyright: ignore[reportMissingImports]
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from transformers import (  # pyright: ignore[reportMissingImports]
    AutoConfig,
    AutoModelForCausalLM,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("-n", "--new", type=int, default=2)
    args = parser.parse_args()
    with init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(args.folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    layers = {f"model.layers.{n}": "disk" for n in range(config.num_hidden_layers)}
    others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    with tempfile.TemporaryDirectory(dir=Path(args.folder).parent) as offload:
        model = load_checkpoint_and_dispatch(
            model,
            args.folder,
            device_map={**layers, **dict.fromkeys(others, "cpu")},
            offload_folder=offload,
            dtype=torch.float16,
        )
        ids = torch.arange(3, 11)[None]
        times = []
        for count in (1, 1 + args.new):
            start = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
            )
            times.append(time.perf_counter() - start)
    seconds = (times[1] - times[0]) / args.new
    print(json.dumps({"new_tokens_per_s": [1 / seconds]}))


if __name__ == "__main__":
    main()
