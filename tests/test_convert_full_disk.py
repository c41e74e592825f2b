"""A disk that fills up between the files of a conversion."""

import os

import pytest

from m2jax.convert import convert
from m2jax.errors import TierFailed
from m2jax.store import verify_store
from tests.conftest import TINY
from tests.full_disk import full_disk
from tests.small_checkpoints import digests


# The lock, the journal's first line in pieces, a line that ends in the middle.
@pytest.mark.parametrize("after_bytes", [0, 100, 700])
def test_whatever_cannot_be_written_the_target_is_named(tmp_path, after_bytes):
    target = tmp_path / "store"
    with (
        full_disk(after_bytes=after_bytes),
        pytest.raises(
            TierFailed, match=r"store.*: File too large.* to resume"
        ) as caught,
    ):
        convert(TINY, target)
    assert str(target) in str(caught.value)
    convert(TINY, target)
    verify_store(target)
    assert digests(target) == digests(convert(TINY, tmp_path / "whole"))


def test_a_conversion_that_cannot_begin_leaves_no_file_open(tmp_path):
    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        convert(TINY, tmp_path / "store", progress=refuse)
    assert set(os.listdir("/proc/self/fd")) == before
