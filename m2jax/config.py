"""What a model is: one frozen record of static facts. Knows no arrays and no files.

`validate` is the one place that says which facts are possible; the JSON form is what a
store's manifest keeps.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from m2jax.strict_json import check_flag, check_integer, check_number, show

ModelType = Literal["llama", "mistral", "qwen2", "qwen3"]
Activation = Literal["silu", "relu", "gelu"]
RopeKind = Literal["linear", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies other than the plain ones.

    kind: "linear" (positions divided by factor) or "llama3" (Llama 3.1's ramp between
    wavelengths of original_context / high_freq_factor and / low_freq_factor).
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A LLaMA-family decoder.

    windows: per layer, how many positions a query sees (itself included); 0 = all.
    qkv_bias, o_bias: biases in attention. qk_norm: RMSNorm on each head's q and k.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    hidden_act: Activation
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    bos_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]


MAX_LAYERS = 1024
MAX_CONTEXT = 1 << 24

# Smallest and largest value of every number. The largest stand well above any published
# model: a count that lies is refused before something is allocated by it.
LIMITS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 1 << 22),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 20),
    "num_layers": (1, MAX_LAYERS),
    "num_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (2, 1024),
    "context": (1, MAX_CONTEXT),
    "rms_norm_eps": (1e-12, 1.0),
    "rope_theta": (1.0, 1e12),
    "rope_scaling.factor": (1.0, 1e6),
    "rope_scaling.low_freq_factor": (1e-3, 1e6),
    "rope_scaling.high_freq_factor": (1e-3, 1e6),
    "rope_scaling.original_context": (1, MAX_CONTEXT),
}
FLAGS = ("tie_embeddings", "qkv_bias", "o_bias", "qk_norm")
LISTS = ("windows", "bos_token_ids", "eos_token_ids")


def check_limits(
    name: str, value: object, *, where: str, field: str | None = None
) -> Any:
    """The value, if it lies in the range LIMITS has under `name`.

    Args:
        field: what the file calls it, for the message.
    """
    low, high = LIMITS[name]
    field = name if field is None else field
    if isinstance(low, int) and isinstance(high, int):
        return check_integer(value, low=low, high=high, field=field, where=where)
    return check_number(value, low=low, high=high, field=field, where=where)


def validate(
    config: ModelConfig, *, where: str, names: Mapping[str, str] | None = None
) -> None:
    """Checks every field, and the fields against each other.

    Args:
        where: the file the config came from, for the message.
        names: what that file calls our fields, where it differs.

    Raises:
        ValueError: names the first field that no model can have.
    """
    _check_facts(config_to_json(config), where=where, names=names or {})


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The config as JSON types; `config_from_json` gives the equal config back."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
    }


def config_from_json(raw: object, *, where: str) -> ModelConfig:
    """The config that `config_to_json` wrote.

    Raises:
        ValueError: names the field that is missing, not ours, or wrong.
    """
    facts = _with_fields_of(ModelConfig, raw, where=where)
    scaling = facts["rope_scaling"]
    if scaling is not None:
        scaling = _with_fields_of(
            RopeScaling, scaling, where=where, prefix="rope_scaling."
        )
    facts["rope_scaling"] = scaling
    _check_facts(facts, where=where, names={})
    if scaling is not None:
        facts["rope_scaling"] = RopeScaling(**_floats(RopeScaling, scaling))
    facts |= {name: tuple(facts[name]) for name in LISTS}
    return ModelConfig(**_floats(ModelConfig, facts))


def _with_fields_of(
    kind: type, raw: object, *, where: str, prefix: str = ""
) -> dict[str, Any]:
    """A copy of a JSON object that has the fields of a dataclass and no others."""
    if not isinstance(raw, dict):
        place = prefix.rstrip(".") or "the model config"
        raise ValueError(f"{where}: {place}: wanted an object, got {show(raw)}")
    wanted = {field.name for field in fields(kind)}
    if missing := sorted(wanted - raw.keys()):
        raise ValueError(f"{where}: {prefix}{missing[0]} is missing")
    if extra := [name for name in raw if name not in wanted]:
        raise ValueError(f"{where}: {prefix}{show(extra[0])} is not a known field")
    return dict(raw)


def _floats(kind: type, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with 10000 as 10000.0 where a float belongs; JSON knows one number."""
    names = [field.name for field in fields(kind) if field.type is float]
    return facts | {name: float(facts[name]) for name in names}


def _check_facts(
    facts: Mapping[str, Any], *, where: str, names: Mapping[str, str]
) -> None:
    """Refuses, in JSON form, what no model can have; `validate` says how."""

    def called(field: str) -> str:
        return names.get(field, field)

    def refuse(field: str, wanted: str, got: object) -> ValueError:
        return ValueError(f"{where}: {called(field)}: wanted {wanted}, got {show(got)}")

    def check_choice(field: str, choices: tuple[str, ...], value: object) -> None:
        if value not in choices:
            raise refuse(field, "one of " + ", ".join(choices), value)

    check_choice("model_type", get_args(ModelType), facts["model_type"])
    check_choice("hidden_act", get_args(Activation), facts["hidden_act"])
    numbers = dict(facts)
    scaling = facts["rope_scaling"]
    if scaling is not None:
        check_choice("rope_scaling.kind", get_args(RopeKind), scaling["kind"])
        numbers |= {f"rope_scaling.{name}": scaling[name] for name in scaling}
    for field in (name for name in LIMITS if name in numbers):
        check_limits(field, numbers[field], where=where, field=called(field))
    for field in FLAGS:
        check_flag(facts[field], field=called(field), where=where)

    if facts["num_heads"] % facts["num_kv_heads"]:
        wanted = f"a divisor of {called('num_heads')} ({facts['num_heads']})"
        raise refuse("num_kv_heads", wanted, facts["num_kv_heads"])
    if facts["head_dim"] % 2:
        raise refuse("head_dim", "an even number", facts["head_dim"])
    if (
        scaling is not None
        and scaling["low_freq_factor"] >= scaling["high_freq_factor"]
    ):
        wanted = f"less than high_freq_factor ({scaling['high_freq_factor']})"
        raise refuse("rope_scaling.low_freq_factor", wanted, scaling["low_freq_factor"])

    for field in LISTS:
        if not isinstance(facts[field], list):
            raise refuse(field, "a list", facts[field])
    if len(facts["windows"]) != facts["num_layers"]:
        wanted = f"{facts['num_layers']} entries, one a layer"
        raise refuse("windows", wanted, facts["windows"])
    for field in LISTS:
        high = MAX_CONTEXT if field == "windows" else facts["vocab_size"] - 1
        for value in facts[field]:
            check_integer(value, low=0, high=high, field=called(field), where=where)
