"""Trains a LLaMA from text, or goes on with one, for example with ReLU.

    .venv/bin/python scripts/train.py OUT --text FILE_OR_FOLDER .. --tokenizer FOLDER
    .venv/bin/python scripts/train.py OUT --text .. --from FOLDER --hidden-act relu

OUT becomes a Hugging Face folder that `m2jax convert` takes. Killed at any time, the
same command goes on from its last checkpoint and ends in the same weights.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file, save_file
from train_model import Decoder, mean_loss, weight_name
from train_text import batch, documents, token_streams

from m2jax.store.dense import load_bank, save_bank
from m2jax.store.files import put
from m2jax.store.paths import TOKENIZER_FILES
from m2jax.text import Tokenizer, load_tokenizer

WORK = ".train"
END_RATE = 0.05
VALID_BATCHES = 4
# What may differ when a run is resumed.
FREE = ("out", "checkpoint_every")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path)
    add("--text", type=Path, nargs="+", required=True)
    add("--exclude-overlap", type=Path, nargs="*", default=[], help="held-out texts")
    add("--from", dest="start", type=Path, help="Hugging Face folder to go on with")
    add("--tokenizer", type=Path, help="folder; default: that of --from")
    add("--hidden-act", choices=["silu", "relu"], help="default: silu, or --from's")
    for name, default in (("hidden", 256), ("ffn", 704), ("layers", 8), ("heads", 4)):
        add(f"--{name}", type=int, default=default)
    add("--kv-heads", type=int, default=2)
    add("--context", type=int, default=512, help="tokens of a window")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=8, help="windows of a step")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--warmup", type=int, default=50, help="steps")
    add("--weight-decay", type=float, default=0.1)
    add("--freeze-embedding", action="store_true")
    add("--seed", type=int, default=0)
    add("--checkpoint-every", type=int, default=200, help="steps")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="products")
    return parser.parse_args(argv)


def model_config(args: argparse.Namespace, tokenizer_folder: Path) -> dict[str, Any]:
    """config.json of the model to be: that of --from, or one made of the options."""
    if args.start:
        config = json.loads((args.start / "config.json").read_bytes())
        wrong = [
            field
            for field, wanted in (
                ("model_type", "llama"),
                ("tie_word_embeddings", True),
                ("rope_scaling", None),
                ("attention_bias", False),
            )
            if config.get(field, wanted) != wanted
        ]
        if wrong:
            raise ValueError(
                f"{args.start}: {wrong[0]} {config[wrong[0]]!r} is not taken"
            )
        config["rope_theta"] = _theta(config)
        if args.hidden_act:
            config["hidden_act"] = args.hidden_act
        return config
    facts = json.loads((tokenizer_folder / "tokenizer.json").read_bytes())
    vocab = 1 + max(
        [*facts["model"]["vocab"].values(), *(t["id"] for t in facts["added_tokens"])]
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": args.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": args.hidden_act or "silu",
        "tie_word_embeddings": True,
        "bos_token_id": args.bos_id,
        "eos_token_id": args.eos_id,
        "torch_dtype": "float16",
    }


def _theta(config: dict[str, Any]) -> float:
    inner = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or inner.get("rope_theta", 10000.0))


class Training:
    """Model, optimiser and step; everything else is a function of the options."""

    def __init__(self, args: argparse.Namespace, config: dict[str, Any]):
        dtype = jnp.dtype(args.dtype)
        model = Decoder(config, nnx.Rngs(args.seed), dtype)
        graph, params = nnx.split(model, nnx.Param)
        flat = dict(nnx.to_flat_state(params))
        self.names = {path: weight_name(path) for path in flat}
        if args.start:
            stored = load_file(args.start / "model.safetensors")
            for path, name in self.names.items():
                flat[path].set_value(jnp.asarray(stored[name], jnp.float32))
        self.params = {name: flat[path][...] for path, name in self.names.items()}
        self.step = 0
        warmup = min(args.warmup, args.steps)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, args.lr, warmup, max(args.steps, warmup + 1), END_RATE * args.lr
        )
        frozen = {
            name: args.freeze_embedding and name.endswith("embed_tokens.weight")
            for name in self.params
        }
        decayed = {name: array.ndim > 1 for name, array in self.params.items()}
        self.optimiser = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                rate, b1=0.9, b2=0.95, weight_decay=args.weight_decay, mask=decayed
            ),
            optax.masked(optax.set_to_zero(), frozen),
        )
        self.moments = self.optimiser.init(self.params)

        def loss_of(params: dict[str, Any], ids: Any) -> Any:
            state = nnx.from_flat_state(
                [
                    (path, flat[path].replace(params[n]))
                    for path, n in self.names.items()
                ]
            )
            logits = nnx.merge(graph, state)(ids[:, :-1])
            return mean_loss(logits, ids[:, 1:])

        def advance(params: Any, moments: Any, ids: Any) -> Any:
            loss, slopes = jax.value_and_grad(loss_of)(params, ids)
            moves, moments = self.optimiser.update(slopes, moments, params)
            return optax.apply_updates(params, moves), moments, loss

        self._loss = jax.jit(loss_of)
        self._advance = jax.jit(advance, donate_argnums=(0, 1))

    def advance(self, ids: np.ndarray) -> float:
        self.params, self.moments, loss = self._advance(self.params, self.moments, ids)
        self.step += 1
        return float(loss)

    def loss(self, batches: list[np.ndarray]) -> float:
        return float(np.mean([self._loss(self.params, ids) for ids in batches]))

    def save(self, folder: Path) -> None:
        leaves = jax.tree.leaves((self.params, self.moments))
        arrays = {f"{n:05d}": np.asarray(leaf) for n, leaf in enumerate(leaves)}
        step = np.array([self.step], np.int32)
        put(
            folder / "checkpoint",
            lambda path: save_bank(path, {**arrays, "step": step}),
            scratch=folder / "half-written",
        )

    def restore(self, folder: Path) -> None:
        arrays = load_bank(folder / "checkpoint")
        self.step = int(arrays.pop("step")[0])
        shape = jax.tree.structure((self.params, self.moments))
        leaves = [jnp.array(arrays[name], copy=True) for name in sorted(arrays)]
        self.params, self.moments = jax.tree.unflatten(shape, leaves)


def train(args: argparse.Namespace) -> None:
    folder = args.tokenizer or args.start
    if folder is None:
        raise ValueError("give --tokenizer FOLDER, or --from FOLDER")
    tokenizer = load_tokenizer(folder, vocab_size=1 << 22, bos_token_ids=())
    if tokenizer is None:
        raise ValueError(f"{folder}: has no tokenizer.json or tokenizer.model")
    args.bos_id, args.eos_id = tokenizer.bos_id, end_id(folder, args.start, tokenizer)
    config = model_config(args, folder)
    work = args.out / WORK
    claim(args, work)
    texts = documents(args.text, without=args.exclude_overlap)
    ids, held = token_streams(texts, tokenizer, eos_id=args.eos_id)
    sizes = {"size": args.batch, "length": args.context, "seed": args.seed}
    batch(ids, 0, **sizes)
    say(f"{len(ids):,} tokens to train on, {len(held):,} held out")
    many = min(VALID_BATCHES, (len(held) - 1) // args.context // args.batch)
    checks = [batch(held, n, **sizes) for n in range(many)]
    training = Training(args, config)
    if (work / "checkpoint").exists():
        training.restore(work)
        say(f"goes on at step {training.step}")
    if checks:
        say(f"held-out loss {training.loss(checks):.4f}")
    started, first = time.monotonic(), training.step
    while training.step < args.steps:
        loss = training.advance(batch(ids, training.step, **sizes))
        if not np.isfinite(loss):
            raise ValueError(
                f"step {training.step}: loss is {loss}; try a smaller --lr"
            )
        done, step = training.step - first, training.step
        if done % 10 == 0 or step == args.steps:
            rate = done / (time.monotonic() - started)
            say(
                f"step {step}/{args.steps}  loss {loss:.4f}  "
                f"{rate * args.batch * args.context:,.0f} tokens/s  "
                f"{(args.steps - step) / rate / 60:.1f} min left"
            )
        if step % args.checkpoint_every == 0 and step < args.steps:
            training.save(work)
    if checks:
        say(f"held-out loss {training.loss(checks):.4f}")
    export(args, training, config, folder)


def end_id(folder: Path, start: Path | None, tokenizer: Tokenizer) -> int:
    """The id that ends a document: of --from's config, else </s>, else BOS."""
    if start:
        found = json.loads((start / "config.json").read_bytes())["eos_token_id"]
        return found if isinstance(found, int) else found[0]
    facts = json.loads((folder / "tokenizer.json").read_bytes())
    for token in facts["added_tokens"]:
        if token["content"] in ("</s>", "<|endoftext|>", "<|end_of_text|>"):
            return token["id"]
    if tokenizer.bos_id is None:
        raise ValueError(f"{folder}: no token that ends a text")
    return tokenizer.bos_id


def claim(args: argparse.Namespace, work: Path) -> None:
    """Notes the options of a new run, or compares them with those of the old one."""
    options = {k: str(v) for k, v in sorted(vars(args).items()) if k not in FREE}
    noted = work / "options.json"
    if noted.exists():
        before = json.loads(noted.read_bytes())
        for name in options:
            if before.get(name) != options[name]:
                raise ValueError(
                    f"{args.out}: was begun with {name} {before.get(name)}, now "
                    f"{options[name]}; give the same options, or another folder"
                )
        return
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out}: is not empty; give a new folder")
    work.mkdir(parents=True)
    noted.write_text(json.dumps(options))


def export(
    args: argparse.Namespace, training: Training, config: dict[str, Any], folder: Path
) -> None:
    """Writes the Hugging Face folder; config.json last."""
    config = {**config, "torch_dtype": "float16"}
    weights = {n: np.asarray(a, np.float16) for n, a in training.params.items()}
    scratch = args.out / WORK / "model.safetensors"
    save_file(weights, scratch, metadata={"format": "pt"})
    os.replace(scratch, args.out / "model.safetensors")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, args.out / name)
    scratch = args.out / WORK / "config.json"
    scratch.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(scratch, args.out / "config.json")
    shutil.rmtree(args.out / WORK)
    say(f"wrote {args.out}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    try:
        train(arguments(sys.argv[1:]))
    except (ValueError, FileNotFoundError) as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
