"""Results in files: whole or as they were, and an error that names the file."""

from pathlib import Path

import pytest

from m2jax.cache.trace import Trace
from m2jax.timeline import Timeline
from m2jax.whole_file import whole_file
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


def test_files_written_at_once_in_one_folder_do_not_meet(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    with whole_file(first) as one, whole_file(second) as two:
        one.write(b"one")
        two.write(b"two")
    assert first.read_bytes() == b"one"
    assert second.read_bytes() == b"two"
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path):
    with whole_file(tmp_path / "ours") as file:
        file.write(b"1")
    (tmp_path / "plain").write_bytes(b"1")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
