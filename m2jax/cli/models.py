"""What a plan needs of a model: from its store, its folder or its config.json alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m2jax.config import ModelConfig
from m2jax.ffn_spec import FfnSpec
from m2jax.hf_config import config_from_hf
from m2jax.layout import ORIGINAL_DTYPES, PLANES, Layout, make_layout
from m2jax.store import Store, open_store
from m2jax.store.calibration import read_json_part
from m2jax.strict_json import read_json, show

CONFIG = "config.json"
MANIFEST = "manifest.json"
GENERATION = "generation_config.json"
GROUP_SIZE = 64
# The widest, so that a plan never promises too much.
ASSUMED_DTYPE = "float32"


@dataclass(frozen=True)
class Model:
    """What a plan needs of a model.

    store_bytes: of its store on SSD. planes: those of the store. own_mix: found by
    search-mix. notes: what was assumed. store: None where there is none.
    """

    source: str
    config: ModelConfig
    layout: Layout
    dense_bytes: int
    store_bytes: int
    planes: tuple[str, ...] = PLANES
    own_mix: str | None = None
    notes: tuple[str, ...] = ()
    store: Store | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "model_type": self.config.model_type,
            "num_layers": self.config.num_layers,
            "hidden_size": self.config.hidden_size,
            "neurons_per_layer": self.config.intermediate_size,
            "context": self.config.context,
            "original_dtype": self.layout.original_dtype,
            "group": self.layout.group,
        }


def read_model(path: Path, *, dense: int = 16) -> Model:
    """A model's shapes from its store, its folder or its config.json.

    Args:
        dense: bits of the dense part's matrices on the device.

    Raises:
        ValueError, NotImplementedError: it is none of these, or its config is refused.
        StoreError: the store is damaged.
    """
    from m2jax.dense_bits import check_dense
    from m2jax.dense_part import shaped_dense_bytes, stored_dense_bytes

    check_dense(dense)
    if path.is_dir() and ((path / MANIFEST).exists() or not (path / CONFIG).exists()):
        store = open_store(path)
        own = read_json_part(store, "mix")
        return Model(
            source=str(path),
            config=store.config,
            layout=store.layout,
            dense_bytes=stored_dense_bytes(store, dense),
            store_bytes=sum(entry.bytes for entry in store.files.values()),
            planes=store.planes,
            own_mix=None if own is None else str(own["mix"]),
            store=store,
        )
    file = path / CONFIG if path.is_dir() else path
    raw = read_json(file)
    beside = file.parent / GENERATION
    config = config_from_hf(
        raw,
        where=str(file),
        generation=read_json(beside) if beside.is_file() else None,
    )
    named = _dtype(raw, where=str(file))
    dtype = named or ASSUMED_DTYPE
    layout = make_layout(config, original_dtype=dtype, group_size=GROUP_SIZE)
    item_bytes = ORIGINAL_DTYPES[dtype]
    kept_bytes = shaped_dense_bytes(config, layout, item_bytes=item_bytes)
    planes_bytes = sum(layout.plane_bytes(plane) for plane in PLANES)
    return Model(
        source=str(path),
        config=config,
        layout=layout,
        dense_bytes=shaped_dense_bytes(
            config, layout, item_bytes=item_bytes, bits=dense
        ),
        store_bytes=kept_bytes + config.num_layers * planes_bytes,
        notes=() if named else (f"{file} names no dtype: {dtype} is assumed",),
    )


def with_predictors(found: Model, specs: Sequence[FfnSpec], lookahead: int) -> Model:
    """The model with the predictors that its scorer needs on the device.

    Raises:
        ValueError: the store has none, or there is no store.
    """
    from m2jax.dense_part import stored_predictor_bytes

    if not any(spec.predicted for spec in specs):
        return found
    if found.store is None:
        raise ValueError(
            f"{found.source}: --scorer lowrank needs predictors, which only a store "
            "has (m2jax calibrate)"
        )
    more = stored_predictor_bytes(found.store, lookahead)
    return replace(found, dense_bytes=found.dense_bytes + more)


def _dtype(raw: dict[str, Any], *, where: str) -> str | None:
    """The checkpoint's dtype as both generations of config.json give it."""
    for field in ("dtype", "torch_dtype"):
        value = raw.get(field)
        if value is None:
            continue
        if not isinstance(value, str) or value not in ORIGINAL_DTYPES:
            raise ValueError(
                f"{where}: {field}: want one of {', '.join(ORIGINAL_DTYPES)}, "
                f"got {show(value)}"
            )
        return value
    return None
