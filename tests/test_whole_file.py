"""Results in files: whole or as they were, and an error that names the file."""

from pathlib import Path

import pytest

from m2jax.cache.trace import Trace
from m2jax.timeline import Timeline
from tests.full_disk import full_disk


@pytest.mark.parametrize("save", [Trace().save, Timeline().write])
def test_a_full_disk_leaves_what_was_there_and_is_told_with_the_file(
    save, tmp_path: Path
):
    path = tmp_path / "result"
    path.write_text("old")
    with full_disk(after_bytes=16), pytest.raises(OSError, match="large") as caught:
        save(path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    save(path)
    assert path.read_bytes() != b"old"
