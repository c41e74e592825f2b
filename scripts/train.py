"""Trains a LLaMA from text, or goes on with one, for example with ReLU.

    python scripts/train.py OUT --text FILE_OR_FOLDER .. --tokenizer FOLDER
    python scripts/train.py OUT --text .. --from FOLDER --hidden-act relu

OUT becomes a Hugging Face folder that `m2jax convert` takes. Killed at any time, the
same command goes on from its last checkpoint and ends in the same weights.
"""

import argparse
import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from train_files import (
    end_id,
    find_tokenizer,
    made_config,
    read_checkpoint,
    read_config,
    write_folder,
)
from train_model import init_weights
from train_run import Recipe, Run, State, restore, save
from train_text import batch, documents, held_out_batches, parse_source, token_streams

from m2jax.errors import NumericalError
from m2jax.store.files import write_synced
from m2jax.strict_json import canonical_json, read_json

WORK = ".train"
OPTIONS = "options.json"
HELD_OUT_BATCHES = 4
SAY_EVERY_STEPS = 10
# What may differ when a run is resumed.
FREE = ("out", "checkpoint_every")
SIZES = {"hidden": 256, "ffn": 704, "layers": 8, "heads": 4, "kv_heads": 2}
RUN = {"context": 512, "batch": 8, "steps": 1000, "warmup": 50, "checkpoint_every": 200}
TOY_SIZES = {"hidden": 64, "ffn": 96, "layers": 2, "heads": 4, "kv_heads": 2}
TOY_RUN = {"context": 32, "batch": 4, "steps": 20, "warmup": 4, "checkpoint_every": 8}


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options, with their defaults; exits with 2 as argparse does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path)
    add("--text", nargs="+", required=True, help="PATH, or PATH=MB for a part of it")
    add("--exclude-overlap", type=Path, nargs="*", default=[], help="held-out texts")
    add("--from", dest="start", type=Path, help="Hugging Face folder to go on with")
    add("--tokenizer", type=Path, help="folder; default: that of --from")
    add("--hidden-act", choices=["silu", "relu"], help="default: silu, or --from's")
    add("--untied", action="store_true", help="an output matrix of its own")
    for name, size in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=_count, help=f"default: {size}")
    for name, size in RUN.items():
        add(f"--{name.replace('_', '-')}", type=_count, help=f"default: {size}")
    add("--tokens", type=_count, help="instead of --steps")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.1)
    add("--freeze-embedding", action="store_true")
    add("--seed", type=int, default=0)
    add("--dtype", choices=["float32", "bfloat16"], help="of products; GPU: bfloat16")
    add("--toy", action="store_true", help="small default sizes")
    args = parser.parse_args(argv)
    if args.start and (args.untied or any(getattr(args, name) for name in SIZES)):
        parser.error("sizes are those of --from: leave out " + _flags(SIZES))
    if args.tokens and args.steps:
        parser.error("give --steps or --tokens")
    if not (args.start or args.tokenizer):
        parser.error("give --tokenizer FOLDER, or --from FOLDER")
    for name, size in ({**TOY_SIZES, **TOY_RUN} if args.toy else SIZES | RUN).items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    if args.tokens:
        args.steps = math.ceil(args.tokens / (args.batch * args.context))
    if not args.dtype:
        on_gpu = jax.default_backend() == "gpu"
        args.dtype = "bfloat16" if on_gpu else "float32"
    return args


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _flags(names: Any) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in (*names, "untied"))


def train(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Trains as the options say, from the last checkpoint if there is one.

    Raises:
        ValueError: options, text or folders do not do. NumericalError: the loss is
            not a number; checkpoints stay.
    """
    folder = args.tokenizer or args.start
    tokenizer = find_tokenizer(folder)
    if args.start:
        raw, config, weights = read_checkpoint(args.start)
        raw, eos_id = dict(raw), config.eos_token_ids[0]
        if args.hidden_act:
            raw["hidden_act"] = args.hidden_act
    else:
        sizes = {name: getattr(args, name) for name in (*SIZES, "context")}
        act, eos_id = args.hidden_act or "silu", end_id(tokenizer)
        raw = made_config(tokenizer, sizes=sizes, act=act, tied=not args.untied)
    config = read_config(raw, where="config.json")
    if tokenizer.vocab_size > config.vocab_size or args.context > config.context:
        raise ValueError(
            f"{args.start}: has {config.vocab_size} ids and a context of "
            f"{config.context}, asked are {tokenizer.vocab_size} and {args.context}"
        )
    sources = [parse_source(text) for text in args.text]
    texts = documents(sources, without=args.exclude_overlap)
    ids, held = token_streams(texts, tokenizer, eos_id=eos_id)
    data = {"size": args.batch, "length": args.context}
    batch(ids, 0, **data, seed=args.seed)
    work = args.out / WORK
    claim(args, work, digest=hashlib.sha256(ids.tobytes()).hexdigest())
    recipe = Recipe(
        steps=args.steps,
        rate=args.lr,
        warmup_steps=args.warmup,
        weight_decay=args.weight_decay,
        freeze_embedding=args.freeze_embedding,
        dtype=args.dtype,
    )
    run = Run(config, recipe)
    first = weights if args.start else init_weights(config, seed=args.seed)
    count = sum(array.size for array in first.values())
    say(f"{count:,} parameters, products in {args.dtype} on {jax.default_backend()}")
    say(f"{len(ids):,} tokens to train on, {len(held):,} held out")
    state = restore(run.begin(first), work)
    checks = held_out_batches(held, **data, most=HELD_OUT_BATCHES)
    if checks:
        say(f"step {state.step}  held-out loss {run.loss(state, checks):.4f}")

    def windows(step: int) -> np.ndarray:
        return batch(ids, step, **data, seed=args.seed)

    state = all_steps(run, state, windows, args, say)
    if checks:
        say(f"step {state.step}  held-out loss {run.loss(state, checks):.4f}")
    write_folder(
        args.out, raw, state.weights, tokenizer_folder=folder, scratch=work / "export"
    )
    shutil.rmtree(work)
    say(f"wrote {args.out}")


def all_steps(
    run: Run,
    state: State,
    windows: Callable[[int], np.ndarray],
    args: argparse.Namespace,
    say: Callable[[str], None],
) -> State:
    """The steps that are left, with checkpoints on the way.

    A loss is read while the next step runs, so that the device need not wait.
    """
    begun, start = state.step, time.monotonic()
    waiting: list[tuple[int, jax.Array]] = []

    def settle(most: int) -> None:
        while len(waiting) > most:
            step, array = waiting.pop(0)
            loss = float(array)
            if not math.isfinite(loss):
                raise NumericalError(f"step {step}: the loss is {loss}; lower --lr")
            if step % SAY_EVERY_STEPS == 0 or step == args.steps:
                rate = (step - begun) / (time.monotonic() - start)
                say(
                    f"step {step}/{args.steps}  loss {loss:.4f}  "
                    f"{rate * args.batch * args.context:,.0f} tokens/s  "
                    f"eta {(args.steps - step) / rate / 60:.1f} min"
                )

    while state.step < args.steps:
        state, loss = run.advance(state, windows(state.step))
        waiting.append((state.step, loss))
        settle(1)
        if state.step % args.checkpoint_every == 0 and state.step < args.steps:
            settle(0)
            save(state, args.out / WORK)
    settle(0)
    return state


def claim(args: argparse.Namespace, work: Path, *, digest: str) -> None:
    """Notes the options of a new run, or compares them with those of the old one."""
    options = {k: str(v) for k, v in sorted(vars(args).items()) if k not in FREE}
    options["text's digest"] = digest
    noted = work / OPTIONS
    if noted.exists():
        before = read_json(noted)
        for name in options:
            if before.get(name) != options[name]:
                raise ValueError(
                    f"{args.out}: begun with {name} {before.get(name)}, now "
                    f"{options[name]}; give the same, or another folder"
                )
        return
    if args.out.exists() and any(p.name != WORK for p in args.out.iterdir()):
        raise ValueError(f"{args.out}: is not empty; give a new folder")
    work.mkdir(parents=True, exist_ok=True)
    half_written = work / "options.half"
    half_written.unlink(missing_ok=True)
    write_synced(half_written, canonical_json(options))
    os.rename(half_written, noted)


def main(argv: list[str] | None = None) -> int:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    args = arguments(sys.argv[1:] if argv is None else argv)
    try:
        train(args, say)
    except (ValueError, NotImplementedError) as error:
        say(f"error: {error}")
        return 2
    except NumericalError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
