"""Tokens a second of llama.cpp, by its Python bindings; one JSON object on stdout.

    peers/llama/bin/python scripts/peer_llama.py MODEL.gguf -p 512 -n 128 -r 5

Runs in an environment of its own that has llama-cpp-python, without m2jax.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

START_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--new", type=int, default=128)
    parser.add_argument("-r", "--repeats", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=1)
    args = parser.parse_args()
    model = Llama(
        args.model,
        n_ctx=max(args.prompt, START_TOKENS + args.new) + 16,
        n_batch=512,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        n_gpu_layers=0,
        use_mmap=True,
        verbose=False,
    )
    ids = np.random.default_rng(0).integers(3, model.n_vocab(), 4096).tolist()
    prompt, new = [], []
    for _ in range(args.warm_up + args.repeats):
        if args.prompt:
            model.reset()
            start = time.perf_counter()
            model.eval(ids[: args.prompt])
            prompt.append(args.prompt / (time.perf_counter() - start))
        if args.new:
            model.reset()
            model.eval(ids[:START_TOKENS])
            start = time.perf_counter()
            # Given tokens, so that nothing hangs on how one is chosen.
            for token in ids[START_TOKENS : START_TOKENS + args.new]:
                model.eval([token])
            new.append(args.new / (time.perf_counter() - start))
    read = dict(
        line.split(": ") for line in Path("/proc/self/io").read_text().splitlines()
    )
    print(
        json.dumps(
            {
                "prompt_tokens_per_s": prompt[args.warm_up :],
                "new_tokens_per_s": new[args.warm_up :],
                "read_bytes": int(read["read_bytes"]),
            }
        )
    )


if __name__ == "__main__":
    main()
