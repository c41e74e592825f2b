"""Positions in a Hugging Face config: how they rotate, and which of them a query sees.

Knows no other part of the model.
"""

from typing import Literal

from m2jax.config import MAX_CONTEXT, MAX_LAYERS, RopeScaling
from m2jax.hf_fields import Reader, only
from m2jax.strict_json import check_integer, check_number, show

DEFAULT_ROPE_THETA = 10000.0
ROPE_KINDS = ("default", "linear", "llama3")
LLAMA3_FIELDS = (
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
ROPE_FIELDS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    *LLAMA3_FIELDS,
)
LAYER_TYPES = ("full_attention", "sliding_attention")

# What `sliding_window` is about: no layer, every layer, or those that
# `use_sliding_window` with `max_window_layers`, or `layer_types`, say.
Windows = Literal["none", "all", "by_layer"]


def rope_from_hf(source: Reader) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_scaling` or transformers 5's `rope_parameters`.

    Raises:
        ValueError: a field is missing or wrong, or two places disagree.
        NotImplementedError: another rope than default, linear and llama3.
    """
    _check_full_rotation(source)
    thetas, scalings = set(), set()
    if "rope_theta" in source.raw:
        thetas.add(source.number("rope_theta", "rope_theta"))
    for name in ("rope_scaling", "rope_parameters"):
        raw = source.raw.get(name)
        if raw is None or raw == {}:
            continue
        if not isinstance(raw, dict):
            raise source.wrong(name, wanted="an object or null")
        part = Reader(raw, source.where, prefix=f"{name}.")
        scalings.add(_rope_scaling(part, source))
        if "rope_theta" in raw:
            thetas.add(part.number("rope_theta", "rope_theta"))
    if len(thetas) > 1 or len(scalings) > 1:
        raise ValueError(
            f"{source.where}: rope_theta, rope_scaling and rope_parameters disagree; "
            "remove those that are wrong"
        )
    theta = thetas.pop() if thetas else DEFAULT_ROPE_THETA
    return theta, scalings.pop() if scalings else None


def _rope_scaling(part: Reader, source: Reader) -> RopeScaling | None:
    for name, value in part.raw.items():
        if isinstance(value, dict):
            raise part.unsupported(name, why="one rope for all layers is supported")
    kind = _rope_kind(part)
    if unknown := [name for name in part.raw if name not in ROPE_FIELDS]:
        raise part.unsupported(unknown[0], why=only(ROPE_FIELDS))
    _check_full_rotation(part)
    if kind == "default":
        return None

    factor = part.number("factor", "rope_scaling.factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    low = part.number("low_freq_factor", "rope_scaling.low_freq_factor")
    high = part.number("high_freq_factor", "rope_scaling.high_freq_factor")
    original = part.number(
        "original_max_position_embeddings", "rope_scaling.original_context"
    )
    # transformers 5 lets a key of this name beside the rope win, 4 does not know it.
    outer = source.raw.get("original_max_position_embeddings")
    if outer is not None and outer != original:
        wanted = f"what stands outside the rope, {show(outer)}"
        raise part.wrong("original_max_position_embeddings", wanted=wanted)
    return RopeScaling("llama3", factor, low, high, original)


def _rope_kind(part: Reader) -> str:
    """`rope_type`, or its older name `type`."""
    named = [name for name in ("rope_type", "type") if part.raw.get(name) is not None]
    if not named:
        if any(name in part.raw for name in ("factor", *LLAMA3_FIELDS)):
            raise part.wrong("rope_type", wanted="one of " + ", ".join(ROPE_KINDS))
        return "default"
    for name in named:
        if not isinstance(part.raw[name], str):
            raise part.wrong(name, wanted="a string")
        if part.raw[name] not in ROPE_KINDS:
            raise part.unsupported(name, why=only(ROPE_KINDS))
    kind = part.raw[named[0]]
    if part.raw[named[-1]] != kind:
        raise part.wrong("type", wanted=f"what rope_type says, {show(kind)}")
    return kind


def _check_full_rotation(source: Reader) -> None:
    name = "partial_rotary_factor"
    value = source.raw.get(name)
    if value is None:
        return
    check_number(value, low=0, high=1, field=source.field(name), where=source.where)
    if value != 1:
        raise source.unsupported(name, why="only whole heads are rotated; supported: 1")


def windows_from_hf(
    source: Reader, *, kind: Windows, num_layers: int
) -> tuple[int, ...]:
    """Per layer, the positions a query sees; 0 = all.

    Raises:
        ValueError: a field is wrong, or `layer_types` slides without a window.
        NotImplementedError: a layer type other than full and sliding attention, or
            sliding layers where transformers' class has none.
    """
    window, first = _sliding_window(source, kind)
    slides = [window > 0 and layer >= first for layer in range(num_layers)]
    listed = _layer_types(source, num_layers)
    if listed is not None and listed != slides:
        if kind != "by_layer":
            raise source.unsupported(
                "layer_types", why="layers of this model_type are all alike"
            )
        if any(listed) and window == 0:
            wanted = "full_attention only, as sliding windows are off"
            raise source.wrong("layer_types", wanted=wanted)
        slides = listed
    return tuple(window if slide else 0 for slide in slides)


def _sliding_window(source: Reader, kind: Windows) -> tuple[int, int]:
    """The window (0 = off), and the first layer that slides."""
    window = source.raw.get("sliding_window", None if kind == "none" else 4096)
    if kind == "none" and window is not None:
        # transformers would ignore it; whoever wrote it meant something else.
        raise source.unsupported(
            "sliding_window", why="this model_type has none; supported: null"
        )
    if kind == "by_layer" and not source.flag("use_sliding_window"):
        return 0, 0
    if window is None:
        return 0, 0
    check_integer(
        window, low=1, high=MAX_CONTEXT, field="sliding_window", where=source.where
    )
    if kind == "all":
        return window, 0
    first = source.raw.get("max_window_layers", 28)
    check_integer(
        first, low=0, high=MAX_LAYERS, field="max_window_layers", where=source.where
    )
    return window, first


def _layer_types(source: Reader, num_layers: int) -> list[bool] | None:
    """Per layer, whether `layer_types` says that it slides; None = not said."""
    types = source.raw.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers:
        raise source.wrong("layer_types", wanted=f"a list of {num_layers} names")
    if unknown := [name for name in types if name not in LAYER_TYPES]:
        raise NotImplementedError(
            f"{source.where}: layer_types {show(unknown[0])}: {only(LAYER_TYPES)}"
        )
    return [name == "sliding_attention" for name in types]
