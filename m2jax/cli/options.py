"""Options that several commands share, with their units. Imports no jax.

The defaults repeat those of `m2jax.load`, whose module imports jax; a test compares.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_SCORER = "base"
DEFAULT_LOOKAHEAD = 0
DEFAULT_POLICY = "lru"
DEFAULT_DISTANCE = 2
DEFAULT_DRAFT = "auto"
DEFAULT_DENSE = 16
DEFAULT_READS = "layers"

StoreFolder = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder made by m2jax convert.")
]
OptionalStore = Annotated[
    Path | None,
    typer.Argument(
        metavar="STORE",
        help="Folder made by m2jax convert; without it the bundled model.",
        show_default=False,
    ),
]
Hbm = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Most that the device may hold, as in 8GiB. Unset: what is free.",
        show_default=False,
    ),
]
Dram = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Most that DRAM may hold, as in 32GiB. Unset: what is free.",
        show_default=False,
    ),
]
Mix = Annotated[
    str | None,
    typer.Option(
        metavar="A/B/C",
        help="Percent of neurons at 16/8/4 bits, what is missing to 100 is skipped; or "
        "one such mix a layer, as in 0/25/75*3,0/50/50. Unset: what search-mix found "
        "for the store, else 0/25/75.",
        show_default=False,
    ),
]
Dense = Annotated[
    int,
    typer.Option(
        metavar="16|8|4",
        help="Bits of attention, embedding and output matrices on the device; 16: as "
        "they are in the store.",
    ),
]
Scorer = Annotated[
    str,
    typer.Option(
        metavar="base|gate|lowrank|none",
        help="What ranks the neurons: the 4-bit plane, its gate alone, or a predictor "
        "trained by calibrate; none: their order.",
    ),
]
Lookahead = Annotated[
    int,
    typer.Option(
        metavar="0|1",
        help="Layers between what the lowrank scorer sees and what it ranks.",
    ),
]
Policy = Annotated[
    str, typer.Option(metavar="lru|lfu", help="Which neurons leave a full HBM cache.")
]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Room for prompt and text together. Unset: the model's, at most 4096.",
        show_default=False,
    ),
]
Prefetch = Annotated[
    int, typer.Option(metavar="LAYERS", help="How far SSD reads run ahead.")
]
Reads = Annotated[
    str,
    typer.Option(
        metavar="layers|records",
        help="What a token reads from SSD where DRAM does not hold all: whole layers, "
        "ahead of time, or the records that it wants and finds nowhere; then nothing "
        "is drafted.",
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        metavar="auto|base|ngram|none|STORE",
        help="What proposes tokens for one sweep to verify: the 4-bit plane, the "
        "text's own past, or a small model of the same vocabulary. auto: base, where "
        "not all fits HBM. The text is the same with any.",
    ),
]
# Of commands that load no model: another one's plan is not known to them.
PlannedDraft = Annotated[
    str,
    typer.Option(
        metavar="auto|base|ngram|none",
        help="What proposes tokens for one sweep to verify. auto: the 4-bit plane, "
        "where not all fits HBM.",
    ),
]
DraftTokens = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Draft so many each time. Unset: as many as pay, as measured.",
        show_default=False,
    ),
]
EmulateSsd = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Hold SSD reads to so many bytes a second, as in 500MB: what a slower "
        "disk would do.",
        show_default=False,
    ),
]
EmulateHbm = Annotated[
    bool,
    typer.Option(
        "--emulate-hbm",
        help="On a CPU: as if HBM were an accelerator's own memory. Rows are copied to "
        "it and kept in its slots; else a CPU uses them where they lie in DRAM.",
        show_default=False,
    ),
]
# `app.run` looks for these two itself, so that they also hold for wrong options.
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="One JSON object on stdout and nothing else.", show_default=False
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", show_default=False),
]


@dataclass(frozen=True)
class EngineOptions:
    """What `m2jax.load` takes, by the same names."""

    hbm: str | None
    dram: str | None
    mix: str | None
    scorer: str
    lookahead: int
    policy: str
    context: int | None
    distance: int
    planes: tuple[str, ...] = ()
    dense: int = DEFAULT_DENSE
    draft: str = "none"
    draft_tokens: int | None = None
    emulate_ssd: str | None = None
    in_place: bool | None = None
    reads: str = DEFAULT_READS


def parse_integers(text: str, *, name: str) -> list[int]:
    """From "1,2,3".

    Raises:
        ValueError: names the entry that is no integer.
    """
    numbers = []
    for place, part in enumerate(text.split(",")):
        try:
            numbers.append(int(part))
        except ValueError:
            raise ValueError(
                f"{name}: entry {place} is {part.strip()!r}: want integers, as in 1,2,3"
            ) from None
    return numbers
