"""Run as a program: the C++ kernels, compiled with given flags, against XLA's forms.

    python -m tests.compare_kernels -march=x86-64-v3

Prints the largest difference, relative to the largest value, over all ops and shapes:
of a few tokens, and of blocks of them.
"""

import json
import sys
from itertools import product

import numpy as np

from m2jax.kernels import attention as attention_op
from m2jax.kernels import linear as linear_op
from m2jax.kernels import sparse_swiglu as swiglu_op
from m2jax.kernels.native import build, status
from m2jax.quant import quantise_rows, split_codes

NEURONS = 300


def largest_difference(counts: tuple[int, ...]) -> float:
    """Of so many tokens."""
    worst = 0.0
    rng = np.random.default_rng(0)
    for group, tokens in product((16, 32, 128), counts):
        width = 6 * group
        rows = rng.standard_normal((NEURONS, 3, width)).astype(np.float32)
        codes, scales, _ = quantise_rows(rows, group=group)
        x = rng.standard_normal((tokens, width)).astype(np.float32)
        h = rng.standard_normal((tokens, NEURONS)).astype(np.float32)
        q4, r4 = (plane.reshape(NEURONS, -1) for plane in split_codes(codes))
        half = rows.astype(np.float16).reshape(NEURONS, -1)
        bfloat = (rows.view(np.uint32) >> 16).astype(np.uint16).reshape(NEURONS, -1)
        packed = linear_op.Packed(
            np.ascontiguousarray(q4[:, : width // 2]),
            np.ascontiguousarray(r4[:, : width // 2]),
            np.ascontiguousarray(scales[:, 0]),
        )

        def forms(name: str | None, group=group, x=x, h=h, scales=scales, **given):
            for plane, records in given["planes"].items():
                own = None if plane.startswith("w16") else scales
                kind = "w16" if own is None else plane
                options = {"plane": kind, "implementation": name}
                yield from swiglu_op.project(x, records, own, **options)
                yield swiglu_op.accumulate(h, records, own, **options)
            for kinds in (("q4",), ("q4", "r4")):
                records = {kind: given["planes"][kind] for kind in kinds}
                for activation in swiglu_op.ACTIVATIONS:
                    yield swiglu_op.whole(
                        x / 8,
                        records,
                        scales,
                        activation=activation,
                        implementation=name,
                    )
            yield linear_op.linear(x, given["packed"], implementation=name)
            seen = np.int32(NEURONS - 1) + np.arange(-len(x) + 1, 1, dtype=np.int32)
            keys = given["keys"]
            yield attention_op.attend(
                x.reshape(len(x), 6, -1),
                keys,
                np.ascontiguousarray(keys[:, ::-1]),
                seen,
                np.int32(200),
                implementation=name,
            )

        planes = {"q4": q4, "r4": r4, "w16 half": half, "w16 bfloat": bfloat}
        keys = rng.standard_normal((3, NEURONS, group)).astype(np.float32)
        given = {"planes": planes, "packed": packed, "keys": keys}
        for one, other in zip(forms(None, **given), forms("xla", **given), strict=True):
            scale = float(np.abs(other).max())
            worst = max(worst, float(np.abs(one - other).max()) / scale)
    return worst


if __name__ == "__main__":
    flags = [flag for flag in build._flags() if not flag.startswith("-m")]
    # Compiling is most of the time.
    build._flags = lambda: [*flags, "-O1", *sys.argv[1:]]
    assert status().ready, status().about
    found = {
        "blocks": status().blocks,
        "of a few": largest_difference((1, 5)),
        "of a block": largest_difference((70,)),
    }
    print(json.dumps(found))
