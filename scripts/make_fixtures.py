"""Makes the parity fixtures: tiny random models, and the logits of transformers.

Knows nothing of m2jax. Run by hand, in an environment of its own, for torch and
transformers are never dependencies of m2jax (last run: Python 3.11, torch 2.13.0+cpu,
transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6):

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    ENV/bin/python scripts/make_fixtures.py --out tests/fixtures/parity

Each folder holds config.json (what transformers writes or, for cases with `old`, what
its version 4 wrote), the weights, and expected.npz: ids_0, logits_0, ids_1, logits_1,
the logits in float32 by eager attention from the stored weights widened to float32.

A fixture that cannot tell a right engine from a wrong one is refused: configs that a
case calls `blind` must change its logits, and config.json must read back as the model
that was meant.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from parity_cases import CASES, SHARED, Case
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

PROMPT_LENGTHS = (24, 19)
LOGIT_STD = (1.0, 10.0)
VISIBLE = 0.05


def make_config(case: Case, **changes):
    fields = {**SHARED, **case.config, **changes}
    return AutoConfig.for_model(case.model_type, **fields)


def random_weights(model, *, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Weights that keep activations near 1 and give logits of some units."""
    weights = {}
    # Parameters and not the state dict: there, tied matrices come twice.
    for name, value in sorted(model.named_parameters()):
        noise = rng.standard_normal(tuple(value.shape))
        if name.endswith("norm.weight"):
            weight = 1 + 0.25 * noise
        elif name.endswith("bias") or "embed_tokens" in name:
            weight = 0.5 * noise
        else:
            weight = (3 if "lm_head" in name else 1.5) * noise / value.shape[1] ** 0.5
        weights[name] = torch.from_numpy(weight.astype(np.float32))
    return weights


def build(config, *, state: dict):
    """A float32 model of given weights; those the config has no use for are ignored."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict(state, strict=False)
    return model


def logits_of(model, ids: np.ndarray) -> np.ndarray:
    """Float32 logits [T, V] of one prompt."""
    if model.config._attn_implementation != "eager":
        raise SystemExit(f"attention is {model.config._attn_implementation}, not eager")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)[None]).logits[0].numpy()


def old_form(case: Case, written: dict) -> dict:
    """The config.json that transformers 4 wrote for the same model."""
    rope = dict(written.pop("rope_parameters"))
    kind = rope["rope_type"]
    old = {**written, "rope_theta": rope.pop("rope_theta")}
    old["rope_scaling"] = None if kind == "default" else rope
    old["torch_dtype"] = old.pop("dtype")
    old["transformers_version"] = "4.46.0"
    for name, value in case.old.items():
        if value is None and name != "sliding_window":
            old.pop(name, None)
        else:
            old[name] = value
    return dict(sorted(old.items()))


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def make_fixture(case: Case, folder: Path, *, seed: int) -> str:
    """Writes one folder and returns a line about it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    config = make_config(case)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(random_weights(model, rng=rng), strict=False)
    model.tie_weights()
    model.to(getattr(torch, case.dtype))
    model.save_pretrained(folder, max_shard_size=case.shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.old is not None:
        path = folder / "config.json"
        write_json(path, old_form(case, json.loads(path.read_text("utf-8"))))

    prompts = [rng.integers(0, config.vocab_size, length) for length in PROMPT_LENGTHS]
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    logits = [logits_of(loaded, ids) for ids in prompts]
    state = {name: value.float() for name, value in model.state_dict().items()}
    for ids, wanted in zip(prompts, logits):
        given = logits_of(build(make_config(case), state=state), ids)
        if not np.array_equal(given, wanted):
            raise SystemExit(f"{case.name}: config.json reads back as another model")
    for change in case.blind:
        changed = build(make_config(case, **change), state=state)
        moved = np.abs(logits_of(changed, prompts[0]) - logits[0]).max()
        if moved < VISIBLE:
            raise SystemExit(f"{case.name}: {change} moves logits by {moved:.2g} only")
    spread = float(np.std(logits[0]))
    if not LOGIT_STD[0] < spread < LOGIT_STD[1]:
        raise SystemExit(f"{case.name}: logits have a spread of {spread:.2g}")
    arrays = {f"ids_{i}": ids.astype(np.int32) for i, ids in enumerate(prompts)}
    arrays |= {f"logits_{i}": value for i, value in enumerate(logits)}
    np.savez_compressed(folder / "expected.npz", **arrays)
    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{case.name:22}{case.dtype:10}logits {spread:5.2f}  {size:7,} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/parity"))
    parser.add_argument("--only", metavar="NAME", help="make this fixture alone")
    options = parser.parse_args()
    disable_progress_bar()
    for seed, case in enumerate(CASES):
        if options.only in (None, case.name):
            print(make_fixture(case, options.out / case.name, seed=seed), flush=True)


if __name__ == "__main__":
    main()
