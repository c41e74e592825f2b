"""`m2jax info` and `m2jax verify`: what is in a store, and whether it is whole."""

from typing import Any

import typer

from m2jax.cli.options import AsJson, Debug, StoreFolder
from m2jax.cli.progress import Activity
from m2jax.cli.session import Answer, Session
from m2jax.cli.tables import columns, size
from m2jax.layout import PLANES
from m2jax.store import store_info, verify_store
from m2jax.store.calibration import calibration_index
from m2jax.store.calibration_index import calibration_files


def info(store: StoreFolder, as_json: AsJson = False, debug: Debug = False) -> Answer:
    """Show what is in a store (sizes in binary units)."""
    facts = store_info(store)
    return Answer(facts, _info_text(facts))


def _info_text(facts: dict[str, Any]) -> str:
    model, quantiser = facts["model"], facts["quantiser"]
    rows = [
        ("store", f"{facts['path']}, {size(facts['bytes'])} in {facts['files']} files"),
        ("source", f"{facts['source']['name']}"),
        ("model", f"{model['model_type']}, {model['hidden_act']}"),
        (
            "layers",
            f"{model['num_layers']} x {model['hidden_size']} wide, "
            f"{model['intermediate_size']} neurons each",
        ),
        (
            "heads",
            f"{model['num_heads']} of {model['head_dim']}, "
            f"{model['num_kv_heads']} for keys and values",
        ),
        ("vocabulary", f"{model['vocab_size']} tokens"),
        ("context", f"{model['context']} tokens"),
        ("scales", f"one for {quantiser['group']} weights"),
        ("dense part", size(facts["dense"]["bytes"])),
    ]
    rows += [
        (
            f"plane {name}",
            f"{size(plane['bytes'])}, {plane['dtype']}, records of "
            f"{plane['record_bytes']} B, {plane['chunks_per_layer']} chunks of "
            f"{size(plane['chunk_bytes'])} a layer",
        )
        for name, plane in facts["planes"].items()
    ]
    left_out = [plane for plane in PLANES if plane not in facts["planes"]]
    if left_out:
        rows.append(("left out", f"plane {', '.join(left_out)}"))
    rows.append(("tokenizer", ", ".join(facts["tokenizer"]) or "none"))
    found = (f"{part} {size(count)}" for part, count in facts["calibration"].items())
    rows.append(("calibration", ", ".join(found) or "none"))
    return columns(rows)


def verify(
    context: typer.Context,
    store: StoreFolder,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Read every byte of a store and compare checksums.

    Calibration included.
    """
    session: Session = context.obj
    with Activity(session.console, "verify") as activity:
        checked = verify_store(store, activity.update)
    results = calibration_files(calibration_index(checked))
    entries = [*checked.files.values(), *results.values()]
    total = sum(entry.bytes for entry in entries)
    return Answer(
        {"ok": True, "path": str(store), "files": len(entries), "bytes": total},
        f"{store}: {len(entries)} files, {size(total)}: as the manifest says",
    )
