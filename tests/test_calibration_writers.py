"""Writers of calibration parts: killed, failing, stopped, or two at once."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from m2jax.errors import TierFailed
from m2jax.store import calibration, open_store, verify_store
from m2jax.store.calibration import (
    read_json_part,
    read_part,
    write_json_part,
    write_part,
)
from tests.calibration_parts import FILES, some_files
from tests.small_checkpoints import digests, small_store, tree

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("made") / "store", layers=1)


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "store")


@pytest.fixture
def filled(path):
    """Its store has parts `order` and `mix`."""
    write_part(open_store(path), "order", some_files(0))
    write_json_part(open_store(path), "mix", {"mix": "0/25/75", "kl": 0.125})
    return path


@pytest.fixture(scope="module")
def kills(whole, tmp_path_factory):
    """What came of a kill at every step of a writer, by its case."""
    folder = tmp_path_factory.mktemp("kills")
    result = subprocess.run(
        [sys.executable, "-m", "tests.kill_part_writer", str(whole), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_a_killed_writer_leaves_the_old_part_or_the_new_one_whole(kills):
    allowed = {
        "first": [None, {"mix": "new"}],
        "replaced": [{"mix": "old"}, {"mix": "new"}],
        "the same again": [{"mix": "old"}],
        "several files": [None],
    }
    files = ["deep/numbers.bin", "report.md"]
    for case, results in kills.items():
        assert [result["died"] for result in results] == [9] * (len(results) - 1) + [0]
        assert len(results) > 20
        seen = [result["mix"] for result in results]
        assert all(mix in allowed[case] for mix in seen), case
        assert seen[-1] == allowed[case][-1]
        reports = [result["report"] for result in results]
        if case == "several files":
            assert reports[0] is None
            assert reports[-1] == files
        else:
            assert reports == [
                files if "mix" in results[0] and case != "first" else None
            ] * len(results)


def test_what_a_killed_writer_left_is_gone_after_the_next_write(kills):
    for results in kills.values():
        for result in results:
            assert result["after"] == {"mix": "new"}
            folders = [
                name for name in result["names"] if not name.startswith("report-")
            ]
            assert folders[:2] == [".lock", "index.json"]
            assert len(folders) == 3
            assert len(result["names"]) - 3 == (result["report"] is not None)


def test_all_of_a_part_is_on_disk_before_its_name_and_that_before_the_index(
    monkeypatch, path
):
    events, sync, rename = [], os.fsync, os.rename

    def fsync(fd):
        events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).relative_to(path))
        sync(fd)

    def renamed(old, new):
        events.append(("rename", new.name))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    write_json_part(open_store(path), "mix", {})
    events.clear()
    write_part(open_store(path), "order", some_files(0))
    root, folder = Path("calibration"), read_part(open_store(path), "order")
    assert folder is not None
    scratch = root / ".order.half-written"
    first = events.index(("rename", folder.name))
    deep = [scratch, scratch / "deep", scratch / "deep" / "under"]
    assert {*events[:first]} == {*deep, *(scratch / name for name in FILES)}
    half = root / ".index.json.half-written"
    assert events[first + 1 :] == [root, half, ("rename", "index.json"), root]


def test_the_first_part_has_an_index_before_its_name(monkeypatch, path):
    """Parts without an index are damage: nobody may be killed between."""
    names, rename = [], os.rename

    def renamed(old, new):
        names.append(new.name)
        rename(old, new)

    monkeypatch.setattr(os, "rename", renamed)
    write_json_part(open_store(path), "mix", {})
    assert names[0] == names[2] == "index.json"
    assert names[1].startswith("mix-")


def test_writers_and_readers_at_once_all_see_whole_parts(path):
    problems, reads = [], 0

    def write(part, writer):
        for count in range(6):
            write_json_part(open_store(path), part, {"by": writer, "count": count})

    def run(part, writer):
        try:
            write(part, writer)
        except Exception as error:
            problems.append(error)

    threads = [
        threading.Thread(target=run, args=(part, writer))
        for part in ("mix", "trace")
        for writer in range(2)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        facts = read_json_part(open_store(path), "mix")
        assert facts is None or facts.keys() == {"by", "count"}
        reads += 1
    assert problems == []
    assert reads > 0
    store = verify_store(path)
    assert (read_json_part(store, "mix") or {})["count"] == 5
    assert (read_json_part(store, "trace") or {})["count"] == 5
    assert len(list((path / "calibration").iterdir())) == 4


def once_before(monkeypatch, module, name, action):
    """The next call of a function comes after another process did something."""
    whole = getattr(module, name)

    def call(*args):
        monkeypatch.setattr(module, name, whole)
        action()
        return whole(*args)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("between", ["part_problems", "read_bytes"])
def test_a_part_replaced_while_it_is_read_is_read_anew(monkeypatch, filled, between):
    store = open_store(filled)
    write_json_part(store, "mix", {"mix": "0/50/50"})
    replace = partial(write_json_part, store, "mix", {"mix": "new"})
    # Its files are checked, then opened: it may vanish before either.
    owner = Path if between == "read_bytes" else calibration
    once_before(monkeypatch, owner, between, replace)
    assert read_json_part(store, "mix") == {"mix": "new"}


def test_a_store_opens_while_a_part_is_being_replaced(monkeypatch, filled):
    vanishing = filled / "calibration" / ".mix.half-written"
    vanishing.mkdir()
    scan = os.scandir

    def scandir(path):
        if Path(path) == vanishing and vanishing.exists():
            vanishing.rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert open_store(filled).files
    assert not vanishing.exists()


def test_a_lock_that_is_never_given_back_is_not_waited_for_for_ever(
    monkeypatch, filled
):
    monkeypatch.setattr(calibration, "LOCK_WAIT_S", 0.1)
    before = tree(filled)
    with open(filled / "calibration" / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing"):
            write_json_part(open_store(filled), "mix", {})
    assert tree(filled) == before
    write_json_part(open_store(filled), "mix", {})


def no_space(folder):
    (folder / "half").write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(folder):
    (folder / "half").write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("write", "error", "words"),
    [
        (no_space, TierFailed, "No space left"),
        (interrupted, KeyboardInterrupt, None),
        (lambda folder: None, ValueError, "no file was written"),
        (lambda folder: (folder / "a b").write_text(""), ValueError, "'a b' is no"),
    ],
)
def test_a_writer_that_fails_leaves_the_part_as_it_was(filled, write, error, words):
    before = digests(filled)
    with pytest.raises(error, match=words):
        write_part(open_store(filled), "order", write)
    assert digests(filled) == before
    assert not [name for name in tree(filled) if "half" in name]


def test_a_store_that_cannot_be_written_is_the_machines_fault(path):
    (path / "calibration").write_text("a file where the folder should be")
    with pytest.raises(TierFailed, match=r"calibration: cannot be written") as caught:
        write_json_part(open_store(path), "mix", {})
    assert caught.value.exit_code == 5
