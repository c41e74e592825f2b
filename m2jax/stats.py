"""What a run reports: counters in, one JSON-able record out. No clocks, no arrays."""

from dataclasses import dataclass
from typing import Any


@dataclass
class DraftCounters:
    """Since the engine was loaded.

    drafted, accepted: tokens proposed, and those that were the target's own choice.
    sweeps: passes that verified them. draft_s, sweep_s: seconds of both.
    """

    drafted: int = 0
    accepted: int = 0
    sweeps: int = 0
    draft_s: float = 0.0
    sweep_s: float = 0.0


@dataclass(frozen=True)
class SsdReads:
    """How bytes leave the SSD.

    how: "direct", past the page cache; "buffered", through it; "given", by a reader
    that the caller brought. why: what speaks against direct reads here; None where
    nothing does.
    """

    how: str
    why: str | None = None


@dataclass(frozen=True)
class Counters:
    """Totals since the engine was loaded; the difference of two is one request's."""

    drafted: int = 0
    accepted: int = 0
    sweeps: int = 0
    draft_s: float = 0.0
    sweep_s: float = 0.0
    ssd_read_bytes: int = 0
    dram_accesses: int = 0
    dram_hits: int = 0
    dram_waited_s: float = 0.0
    ssd_retries: int = 0
    hbm_accesses: int = 0
    hbm_hits: int = 0
    hbm_load_bytes: int = 0

    def since(self, earlier: "Counters") -> "Counters":
        return Counters(
            **{
                name: value - getattr(earlier, name)
                for name, value in self.__dict__.items()
            }
        )


@dataclass(frozen=True)
class Held:
    """Bytes of each tier: held now (with the most ever in transit), and allowed. At
    start-up: bytes read, and reads that were tried again."""

    hbm_bytes: int
    hbm_budget_bytes: int
    dram_bytes: int
    dram_budget_bytes: int
    startup_read_bytes: int
    startup_retries: int


@dataclass(frozen=True)
class Timings:
    """Seconds. tpot_s: mean gap between tokens, None below two tokens. compile_s: how
    much of the request XLA spent compiling; it is part of ttft_s and tpot_s."""

    load_s: float
    ttft_s: float | None
    tpot_s: float | None
    compile_s: float

    @property
    def tokens_per_s(self) -> float | None:
        return None if not self.tpot_s else 1 / self.tpot_s


@dataclass(frozen=True)
class Stats:
    """One request. request: all its passes. decode: after the first token. kernels:
    what served, see `kernels.choice.report`."""

    held: Held
    ssd: SsdReads
    request: Counters
    decode: Counters
    decode_steps: int
    timings: Timings
    kernels: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """`timings`, `tiers`, `bytes_per_token`, `drafts` and `kernels`; None where
        nothing was counted."""
        steps = self.decode_steps
        return {
            "timings": {
                "load_s": self.timings.load_s,
                "ttft_s": self.timings.ttft_s,
                "tpot_s": self.timings.tpot_s,
                "tokens_per_s": self.timings.tokens_per_s,
                "compile_s": self.timings.compile_s,
            },
            "tiers": {
                "ssd": {
                    "how": self.ssd.how,
                    "why": self.ssd.why,
                    "read_bytes": self.request.ssd_read_bytes,
                    "startup_read_bytes": self.held.startup_read_bytes,
                    "waited_s": self.request.dram_waited_s,
                    "retries": self.request.ssd_retries,
                    "startup_retries": self.held.startup_retries,
                },
                "dram": {
                    "held_bytes": self.held.dram_bytes,
                    "budget_bytes": self.held.dram_budget_bytes,
                    "hit_ratio": ratio(
                        self.request.dram_hits, self.request.dram_accesses
                    ),
                },
                "hbm": {
                    "held_bytes": self.held.hbm_bytes,
                    "budget_bytes": self.held.hbm_budget_bytes,
                    "load_bytes": self.request.hbm_load_bytes,
                    "hit_ratio": ratio(
                        self.request.hbm_hits, self.request.hbm_accesses
                    ),
                },
            },
            "bytes_per_token": {
                "ssd_to_dram": ratio(self.decode.ssd_read_bytes, steps),
                "dram_to_hbm": ratio(self.decode.hbm_load_bytes, steps),
            },
            "drafts": {
                "drafted": self.decode.drafted,
                "accepted": self.decode.accepted,
                "sweeps": self.decode.sweeps,
                "accepted_share": ratio(self.decode.accepted, self.decode.drafted),
                "accepted_per_sweep": ratio(self.decode.accepted, self.decode.sweeps),
                "draft_s": self.decode.draft_s,
                "sweep_s": self.decode.sweep_s,
            },
            "kernels": self.kernels,
        }


def ratio(part: float, whole: float) -> float | None:
    """part / whole, None where there was nothing."""
    return part / whole if whole else None
