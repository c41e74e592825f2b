"""What a run took and moved, as lines of text."""

from typing import TYPE_CHECKING, Any

from m2jax.cli.tables import columns, number, seconds, share, size

if TYPE_CHECKING:
    from m2jax.stream import Generation


def figures(result: "Generation") -> str:
    """What the run took and moved, in lines."""
    facts = result.stats.to_json()
    times, tiers = facts["timings"], facts["tiers"]
    ssd, dram, hbm = tiers["ssd"], tiers["dram"], tiers["hbm"]
    moved = facts["bytes_per_token"]
    rate = number(times["tokens_per_s"], digits=1)
    rows = [
        (
            "tokens",
            f"{result.prompt_tokens} prompt, {len(result.token_ids)} new, finished by "
            f"{result.finish_reason}, seed {result.seed}",
        ),
        (
            "time",
            f"load {seconds(times['load_s'])}, TTFT {seconds(times['ttft_s'])}, TPOT "
            f"{seconds(times['tpot_s'])}, {rate} tokens/s; "
            f"{seconds(times['compile_s'])} of it compiling",
        ),
        ("HBM", f"{_held(hbm)}, hit ratio {share(hbm['hit_ratio'])}"),
        ("DRAM", f"{_held(dram)}, hit ratio {share(dram['hit_ratio'])}"),
        ("SSD", _read(ssd)),
        (
            "a token",
            f"SSD to DRAM {size(moved['ssd_to_dram'])}, DRAM to HBM "
            f"{size(moved['dram_to_hbm'])}",
        ),
    ]
    drafts = facts["drafts"]
    if drafts["sweeps"]:
        rows.append(
            (
                "drafts",
                f"{share(drafts['accepted_share'])} of {drafts['drafted']:,} tokens "
                f"right, {number(drafts['accepted_per_sweep'], digits=1)} a sweep; "
                f"{drafts['sweeps']:,} sweeps in {seconds(drafts['sweep_s'])}, drafted "
                f"in {seconds(drafts['draft_s'])}",
            )
        )
    rows.append(("kernels", kernels_line(facts["kernels"])))
    return columns(rows)


def kernels_line(kernels: dict[str, Any]) -> str:
    """Which implementations served which ops, and the compiler, or why there is none.

    Args:
        kernels: see `kernels.choice.report`.
    """
    served: dict[str, list[str]] = {}
    for op, names in kernels["ops"].items():
        for name in names:
            served.setdefault(name, []).append(op)
    parts = [f"{name}: {', '.join(ops)}" for name, ops in sorted(served.items())]
    line, about = "; ".join(parts) or "none", kernels["about"]
    if about is None:
        return line
    kind = "compiled by" if kernels["compiled"] else "none compiled:"
    return f"{line} ({kind} {about})"


def _read(ssd: dict[str, Any]) -> str:
    """Bytes; and what made reads slower than they could be, if anything did."""
    line = f"read {size(ssd['read_bytes'])}, at start {size(ssd['startup_read_bytes'])}"
    retries = ssd["retries"] + ssd["startup_retries"]
    if retries:
        line += f"; {retries:,} reads tried again"
    if ssd["why"]:
        line += f"; {ssd['how']}, {ssd['why']}"
    if retries or ssd["why"]:
        line += f"; waited {seconds(ssd['waited_s'])}"
    return line


def _held(tier: dict[str, Any]) -> str:
    return f"held {size(tier['held_bytes'])} of {size(tier['budget_bytes'])}"
