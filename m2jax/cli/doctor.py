"""`m2jax doctor`: what this machine has, and what would stand in the way."""

from pathlib import Path
from typing import Annotated, Any

import typer

from m2jax.cli.options import AsJson, Debug
from m2jax.cli.progress import Activity
from m2jax.cli.session import Answer, Session


def doctor(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="On the disk to be tried, where stores will lie."
        ),
    ] = Path("."),
    as_json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Show versions, devices, memory and disk, and what is amiss.

    Exit code 1 if a check fails. Takes some seconds, two of them to read the disk.
    """
    session: Session = context.obj
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    with Activity(session.console, "doctor") as activity:
        from m2jax.doctor import examine

        activity.add("looking at this machine", 0)
        found = examine(folder)
    return Answer(found, _text(found["checks"]), exit_code=0 if found["ok"] else 1)


def _text(checks: list[dict[str, Any]]) -> str:
    width = max(len(check["name"]) for check in checks)
    lines = []
    for check in checks:
        mark = "ok  " if check["ok"] else "FAIL"
        lines.append(f"{mark}  {check['name'].ljust(width)}  {check['value']}")
        if check["hint"]:
            lines.append(f"      {' ' * width}  {check['hint']}")
    return "\n".join(lines)
