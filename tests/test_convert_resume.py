"""Conversions that are killed, interrupted, run out of disk, or meet another one."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from m2jax import layout as layout_module
from m2jax.convert import convert, run
from m2jax.convert.journal import claim
from m2jax.errors import DoesNotFit, StoreError, TierFailed
from m2jax.store import files, open_store, verify_store
from tests.small_checkpoints import (
    SMALL_CHUNK_TARGET_BYTES,
    digests,
    edit_tensor,
    small_checkpoint,
    tree,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(layout_module, "CHUNK_TARGET_BYTES", SMALL_CHUNK_TARGET_BYTES)


@pytest.fixture
def source(tmp_path):
    return small_checkpoint(tmp_path / "source")


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """What came of every kill and interrupt, by its case."""
    folder = tmp_path_factory.mktemp("kills")
    source = small_checkpoint(folder / "source")
    result = subprocess.run(
        [sys.executable, "-m", "tests.kill_converter", str(source), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def die_at(monkeypatch, write, action):
    """Makes the n-th put of a file or folder fail."""
    whole, lock, count = files.put, threading.Lock(), 0

    def put(target, fill, *, scratch):
        nonlocal count
        with lock:
            count += 1
            mine = count
        if mine >= write:
            action()
        whole(target, fill, scratch=scratch)

    monkeypatch.setattr(files, "put", put)


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_killed_conversion_resumes_to_the_same_bytes(kills):
    died = {case["died"] for case in kills}
    assert died == {9, -9, 130}
    assert all(case["identical"] for case in kills), kills


def test_a_resumed_conversion_rewrites_no_finished_file_and_leaves_nothing(kills):
    assert sum(case["finished"] for case in kills) > 100
    assert all(case["rewritten"] == [] for case in kills), kills
    assert all(case["leftover"] == [] for case in kills), kills


def test_only_a_store_whose_manifest_is_in_place_needs_no_resuming(kills):
    refused = [case["case"] for case in kills if case["resumed"] != 0]
    assert refused == ["after write -1"]


def test_an_interrupt_ends_a_conversion_within_five_seconds(kills):
    seconds = [case["seconds"] for case in kills if "seconds" in case]
    assert len(seconds) == 3
    assert max(seconds) < 5


@pytest.mark.parametrize("write", [4, 17, 30])
def test_a_full_disk_keeps_what_is_finished_and_resumes(
    monkeypatch, source, tmp_path, write
):
    whole = convert(source, tmp_path / "whole")
    target = tmp_path / "store"
    with monkeypatch.context() as patch:
        die_at(patch, write, no_space)
        with pytest.raises(TierFailed, match=r"No space left.*run the same") as caught:
            convert(source, target)
    assert caught.value.exit_code == 5
    assert not any(t.name.startswith("m2jax-convert") for t in threading.enumerate())
    before = tree(target)
    with pytest.raises(StoreError, match=r"incomplete \(\d+ %\): run m2jax convert"):
        open_store(target)
    convert(source, target)
    assert digests(target) == digests(whole)
    after = tree(target)
    kept = [n for n in before if "/c/" in n and not n.startswith(".") and n in after]
    assert kept or write == 4
    assert all(before[name] == after[name] for name in kept)


def test_a_disk_that_is_really_full_gives_one_line_and_no_log(source, tmp_path, capfd):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(DoesNotFit, match=r"needs [\d,]+ more bytes"):
            convert(source, small / "store")
        assert not (small / "store").exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "check_space", lambda *_, **__: None)
            with pytest.raises(TierFailed, match="No space left") as caught:
                convert(source, small / "store")
        assert len(str(caught.value).splitlines()) == 1
        assert capfd.readouterr().err == ""
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_disk_too_small_is_refused_before_anything_is_written(
    monkeypatch, source, tmp_path
):
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DoesNotFit, match=r"needs [\d,]+ more bytes.*200,000 free"):
        convert(source, tmp_path / "deep" / "store")
    assert not (tmp_path / "deep").exists()


def test_the_space_asked_for_is_what_the_store_takes_and_little_more(
    monkeypatch, source, tmp_path
):
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DoesNotFit) as caught:
            convert(source, tmp_path / "store")
    asked = int(str(caught.value).split("needs ")[1].split(" ")[0].replace(",", ""))
    store = convert(source, tmp_path / "store")
    blocks = sum(path.lstat().st_blocks * 512 for path in store.rglob("*"))
    assert blocks <= asked < 2 * blocks


def test_a_second_converter_is_refused_with_host_and_pid_of_the_first(source, tmp_path):
    target = tmp_path / "store"
    program = (
        "import sys, time; from pathlib import Path;"
        "from m2jax.convert.journal import claim\n"
        "with claim(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        before = tree(target)
        for overwrite in (False, True):
            with pytest.raises(
                ValueError, match=rf"process {first.pid} on host {os.uname().nodename}"
            ):
                convert(source, target, overwrite=overwrite)
        assert tree(target) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    # Its owner is dead: the lock is taken over.
    verify_store(convert(source, target))


def test_a_lock_removed_by_its_last_owner_as_we_take_it_is_taken_anew(
    monkeypatch, tmp_path
):
    lock, flock = tmp_path / ".m2jax-convert" / "lock", fcntl.flock

    def late(fd, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(lock.parent)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    refused = pytest.raises(ValueError, match="is being written by")
    with claim(tmp_path), refused, claim(tmp_path):
        pass


def test_a_changed_source_is_not_mixed_into_an_older_conversion(
    monkeypatch, source, tmp_path
):
    target = tmp_path / "store"
    with monkeypatch.context() as patch:
        die_at(patch, 20, no_space)
        with pytest.raises(TierFailed):
            convert(source, target)
    edit_tensor(source / "model.safetensors", "model.norm.weight", 0, 0.5)
    before = tree(target)
    with pytest.raises(ValueError, match="source differs since"):
        convert(source, target)
    assert tree(target).keys() == before.keys()
    fresh = convert(source, target, overwrite=True)
    assert digests(fresh) == digests(convert(source, tmp_path / "whole"))


@pytest.mark.parametrize(
    "options", [{"group_size": 16}, {"dtype": "float32"}, {"planes": ("q4",)}]
)
def test_other_options_are_not_mixed_into_an_older_conversion(
    monkeypatch, source, tmp_path, options
):
    target = tmp_path / "store"
    with monkeypatch.context() as patch:
        die_at(patch, 12, no_space)
        with pytest.raises(TierFailed):
            convert(source, target)
    with pytest.raises(ValueError, match=r"was started with .* now .*overwrite"):
        convert(source, target, **options)
    convert(source, target)


def test_a_source_that_changes_while_it_is_converted_is_not_made_a_store(
    source, tmp_path
):
    def change(done, total, what):
        if what == "dense/head":
            edit_tensor(source / "model.safetensors", "model.norm.weight", 0, 0.5)

    with pytest.raises(ValueError, match=r"model.safetensors: changed while"):
        convert(source, tmp_path / "store", progress=change)
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["torn line", "garbage", "no header", "lost file"])
def test_a_damaged_journal_or_a_lost_file_costs_work_and_nothing_else(
    monkeypatch, source, tmp_path, damage
):
    whole, target = convert(source, tmp_path / "whole"), tmp_path / "store"
    with monkeypatch.context() as patch:
        die_at(patch, 25, no_space)
        with pytest.raises(TierFailed):
            convert(source, target)
    journal = target / ".m2jax-convert" / "journal.jsonl"
    data = journal.read_bytes()
    if damage == "torn line":
        journal.write_bytes(data[:-30])
    elif damage == "garbage":
        journal.write_bytes(data + b"\xff\x00{")
    elif damage == "no header":
        journal.write_bytes(data[:40])
    else:
        (target / "neurons" / "00" / "q4" / "c" / "0" / "0").unlink()
        (target / "dense" / "embed" / "state" / "_METADATA").unlink()
    convert(source, target)
    assert digests(target) == digests(whole)


def test_work_done_after_a_torn_line_is_not_lost_to_the_next_resume(
    monkeypatch, source, tmp_path
):
    target = tmp_path / "store"
    journal = target / ".m2jax-convert" / "journal.jsonl"
    for write in (10, 8):
        with monkeypatch.context() as patch:
            die_at(patch, write, no_space)
            with pytest.raises(TierFailed):
                convert(source, target)
        lines = journal.read_bytes().splitlines()
        assert all(json.loads(line) for line in lines)
        journal.write_bytes(journal.read_bytes()[:-30])
    assert len(lines) > 14


def test_a_store_finished_but_not_cleaned_up_is_complete(source, tmp_path):
    store = convert(source, tmp_path / "store")
    (store / ".m2jax-convert" / "tmp").mkdir(parents=True)
    verify_store(store)
    with pytest.raises(ValueError, match="complete store already; --overwrite"):
        convert(source, store)
    assert not (store / ".m2jax-convert").exists()


def test_overwriting_replaces_a_store_and_keeps_what_is_not_its_own(source, tmp_path):
    store = convert(source, tmp_path / "store")
    (store / "notes.txt").write_text("mine")
    (store / "neurons" / "stale").write_text("not of this model")
    other = small_checkpoint(tmp_path / "other", seed=1, layers=1)
    convert(other, store, overwrite=True)
    assert (store / "notes.txt").read_text() == "mine"
    (store / "notes.txt").unlink()
    assert digests(store) == digests(convert(other, tmp_path / "whole"))
