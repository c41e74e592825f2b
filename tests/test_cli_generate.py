"""`m2jax generate`: what reaches stdout, what stderr, and how prompts come in."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import m2jax
from m2jax.bundled import SOURCE
from m2jax.cli.app import app
from m2jax.cli.options import EngineOptions
from m2jax.cli.session import to_json
from m2jax.engine import Engine
from m2jax.kernels.choice import report
from m2jax.stream import Generation
from tests.budgets import smallest
from tests.command_line import Commands
from tests.small_checkpoints import make_checkpoint, make_config

PROMPT = "Once upon a time"
# Greedy, as every run below that sets no temperature.
NEW_TOKENS = "12"
# One plane, and no program for many tokens at once: little to compile.
MIX = "100/0/0"
VOCAB = 8192
FIELDS = {
    "text": str,
    "token_ids": list,
    "prompt_tokens": int,
    "finish_reason": str,
    "seed": int,
    "timings": {
        "load_s": float,
        "ttft_s": float,
        "tpot_s": float,
        "tokens_per_s": float,
    },
    "tiers": {
        "ssd": {"how": str, "read_bytes": int, "waited_s": float, "retries": int},
        "dram": {"held_bytes": int, "budget_bytes": int, "hit_ratio": float},
        "hbm": {
            "held_bytes": int,
            "budget_bytes": int,
            "load_bytes": int,
            "hit_ratio": float,
        },
    },
    "bytes_per_token": {"ssd_to_dram": float, "dram_to_hbm": float},
    "kernels": {"compiled": bool, "ops": {"linear": dict, "sparse_swiglu": dict}},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's tokenizer and random weights; every token ends a text."""
    folder = tmp_path_factory.mktemp("generate")
    config = make_config(hidden=64, ffn=300, layers=4, vocab=VOCAB, tied=True)
    config["eos_token_id"] = list(range(VOCAB))
    make_checkpoint(folder / "source", config)
    for file in SOURCE.glob("*token*.json"):
        shutil.copy(file, folder / "source")
    return m2jax.convert(folder / "source", folder / "store")


def budgets(store: Path) -> dict[str, Any]:
    """HBM for a third of the records, and DRAM for the layers in use alone."""
    with m2jax.load(store, mix=MIX) as engine:
        whole = engine.plan.footprint
    hbm = whole.hbm - whole.records * 2 // 3
    dram = smallest(lambda: m2jax.load(store, mix=MIX, hbm=hbm, dram=1))
    return {"hbm": f"{hbm}B", "dram": f"{dram}B"}


@pytest.fixture(scope="module")
def tight(store: Path) -> dict[str, Any]:
    return budgets(store)


@pytest.fixture(scope="module")
def engine(store: Path, tight: dict[str, Any]) -> Engine:
    return m2jax.load(store, mix=MIX, **tight)


@pytest.fixture
def generate(m2jax_command: Commands, store: Path, tight: dict[str, Any]):
    """Runs generate on that store within those budgets."""
    always = ("-n", NEW_TOKENS, "--ignore-eos", "--mix", MIX, *words(tight))

    def run(*options: str, stdin: bytes = b""):
        return m2jax_command("generate", store, *always, *options, stdin=stdin)

    return run


def text_after(engine: Engine, prompt: str | list[int], **options: Any) -> Generation:
    """What the library gives for the same."""
    return engine.generate(
        prompt, max_new_tokens=int(NEW_TOKENS), ignore_eos=True, **options
    )


def words(options: dict[str, Any]) -> list[str]:
    """Options as they are written."""
    pairs = [(f"--{name.replace('_', '-')}", str(options[name])) for name in options]
    return [word for pair in pairs for word in pair]


def check_fields(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, kind in wanted.items():
        if isinstance(kind, dict):
            check_fields(found[name], kind)
        else:
            assert isinstance(found[name], kind), name


def option_defaults(command: str) -> dict[str, Any]:
    found = next(
        entry.callback
        for entry in app.registered_commands
        if entry.callback is not None and entry.callback.__name__ == command
    )
    parameters = inspect.signature(found).parameters.values()
    return {each.name: each.default for each in parameters}


def test_the_defaults_of_the_options_are_those_of_the_library():
    options = option_defaults("generate")
    load = inspect.signature(m2jax.load).parameters
    options["distance"] = options.pop("prefetch")
    options["planes"] = EngineOptions.planes
    options["in_place"] = EngineOptions.in_place
    for name in EngineOptions.__dataclass_fields__:
        assert options[name] == load[name].default, name
    for name, parameter in inspect.signature(Engine.generate).parameters.items():
        if name not in ("self", "prompt", "stop"):
            assert options[name] == parameter.default, name


def test_json_is_one_object_with_text_figures_and_the_seed(generate, engine: Engine):
    done = generate("-p", PROMPT, "--json")
    assert done.code == 0
    facts = done.facts
    check_fields(facts, FIELDS)
    assert len(facts["token_ids"]) == int(NEW_TOKENS)
    tiers = facts["tiers"]
    assert tiers["hbm"]["budget_bytes"] == engine.plan.hbm_budget_bytes
    assert tiers["dram"]["budget_bytes"] == engine.plan.dram_budget_bytes
    for tier in ("hbm", "dram"):
        assert 0 < tiers[tier]["held_bytes"] <= tiers[tier]["budget_bytes"]
    assert facts["bytes_per_token"]["ssd_to_dram"] > 0


def test_stdout_is_the_librarys_text_and_stderr_the_figures(generate, engine: Engine):
    wanted = text_after(engine, PROMPT)
    done = generate("-p", PROMPT)
    assert (done.code, done.out) == (0, f"{wanted.text}\n")
    for word in ("TTFT", "TPOT", "tokens/s", "HBM", "DRAM", "SSD", "held", "hit ratio"):
        assert word in done.err, word
    about = report()["about"]
    (line,) = [line for line in done.err.splitlines() if line.startswith("kernels ")]
    assert "linear" in line
    assert about is None or f" {about})" in line


def test_a_prompt_is_the_same_from_file_stdin_and_token_ids(
    generate, engine: Engine, tmp_path: Path
):
    prompt = "def naïve(x):\r\n\t"
    wanted = text_after(engine, prompt)
    assert wanted.text is not None
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    ids = ",".join(map(str, engine.encode(prompt)))
    for done in (
        generate("--prompt-file", str(tmp_path / "prompt.txt")),
        generate("-p", "-", stdin=prompt.encode()),
        generate("--token-ids", ids),
    ):
        assert (done.code, done.out) == (0, f"{wanted.text}\n")


def test_bytes_that_are_no_utf8_are_refused_with_their_offset(generate, tmp_path: Path):
    (tmp_path / "prompt.txt").write_bytes(b"abc\xff")
    from_file = generate("--prompt-file", str(tmp_path / "prompt.txt"))
    from_stdin = generate("-p", "-", stdin=b"ab\xc3")
    assert from_file.code == from_stdin.code == 2
    assert "not UTF-8 at byte 3" in from_file.error
    assert "stdin: not UTF-8 at byte 2" in from_stdin.error


def test_chat_is_the_template_around_the_prompt(generate, engine: Engine):
    assert engine.tokenizer is not None
    text = f"<s><|user|>\n{PROMPT}\n<|assistant|>\n"
    ids = engine.tokenizer.encode(text, add_bos=False, parse_special=True)
    wanted = text_after(engine, ids)
    done = generate("-p", PROMPT, "--chat", "--json")
    assert done.facts["prompt_tokens"] == len(ids)
    assert done.facts["token_ids"] == wanted.token_ids
    assert "warning" not in done.err
    assert "special tokens" in generate("-p", "</s>", "--chat", "--json").err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("top_k", 20),
        ("top_p", 0.01),
        ("min_p", 1.0),
        ("repetition_penalty", 2.0),
        ("seed", 8),
    ],
)
def test_a_sampling_option_does_what_it_does_in_the_library(
    generate, engine: Engine, name: str, value: float
):
    options = {"temperature": 1.5, "top_k": 5, "seed": 7}
    changed = {**options, name: value}
    wanted = text_after(engine, PROMPT, **changed).token_ids
    assert wanted != text_after(engine, PROMPT, **options).token_ids
    facts = generate("-p", PROMPT, "--json", *words(changed)).facts
    assert facts["token_ids"] == wanted
    assert facts["seed"] == changed["seed"]


def test_the_earliest_of_several_stop_strings_ends_the_text(generate):
    plain = generate("-p", PROMPT, "--json").facts["text"]
    late, early = plain[12:16], plain[5:9]
    cut = generate("-p", PROMPT, "--stop", late, "--stop", early, "--json").facts
    assert cut["text"] == plain[:5]
    assert cut["finish_reason"] == "stop"


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(generate):
    done = generate("--token-ids", ",".join(["5"] * 40), "--context", "32")
    assert done.code == 2
    assert "40 tokens" in done.error
    assert "32" in done.error


def test_a_store_without_tokenizer_takes_and_prints_token_ids(
    m2jax_command: Commands, tiny_store: Path
):
    options = ("-n", "5", "--mix", MIX, *words(budgets(tiny_store)))
    command = ("generate", tiny_store, *options, "--token-ids", "1,2,3")
    facts = m2jax_command(*command, "--json").facts
    assert facts["text"] is None
    printed = m2jax_command(*command)
    assert printed.out == ",".join(map(str, facts["token_ids"])) + "\n"
    for options in (["-p", "x"], ["--token-ids", "1", "--stop", "x"]):
        refused = m2jax_command("generate", tiny_store, *options)
        assert refused.code == 2
        assert "tokenizer" in refused.error


def test_an_end_of_text_token_ends_the_text_unless_it_is_ignored(
    m2jax_command: Commands, store: Path
):
    command = ("generate", store, "--mix", MIX, "-p", PROMPT, "-n", "1", "--json")
    assert m2jax_command(*command).facts["finish_reason"] == "stop"
    ignored = m2jax_command(*command, "--ignore-eos").facts
    assert ignored["finish_reason"] == "length"


def test_a_figure_that_was_not_counted_is_not_zero(
    m2jax_command: Commands, store: Path
):
    # Everything resident: nothing passes through DRAM. One token: no time between two.
    done = m2jax_command("generate", store, "--mix", MIX, "-p", PROMPT, "-n", "1")
    assert done.code == 0
    assert "TPOT n/a, n/a tokens/s;" in done.err
    assert "hit ratio n/a" in done.err


def test_json_never_holds_a_number_that_json_has_not():
    text = to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "\u2028é"})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": "\u2028é"}
