"""The doctor's findings: versions, devices, disks; and that nothing stays behind."""

import errno
import json
import mmap
import os
import resource
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from m2jax import bandwidths, disk
from m2jax.disk import cached_pages, drop_cached, filesystem_type, measure_ways
from m2jax.doctor import check_backend, check_disk, check_libraries, examine
from m2jax.kernels import linear, sparse_swiglu
from m2jax.machine import LIBRARIES, installed

SMALL_BYTES = 8 << 20
GOOD = {
    "jax": "0.11.2",
    "jaxlib": "0.11.2",
    "flax": "0.12.12",
    "orbax-checkpoint": "0.12.8",
    "tensorstore": "0.1.86",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "kept").write_bytes(b"mine")
    found = examine(folder)
    assert sorted(folder.iterdir()) == [folder / "kept"]
    assert (folder / "kept").read_bytes() == b"mine"
    return found


def values(report) -> dict[str, str]:
    return {check["name"]: check["value"] for check in report["checks"]}


def test_every_finding_has_a_name_a_verdict_a_value_and_a_hint(report):
    for check in report["checks"]:
        assert [type(part) for part in check.values()] == [str, bool, str, str]
        assert check["value"]
        assert check["hint"] or check["ok"]
    assert report["ok"] == all(check["ok"] for check in report["checks"])
    assert len(values(report)) == len(report["checks"])
    assert json.loads(json.dumps(report)) == report


def test_the_installed_versions_are_named(report):
    for name in LIBRARIES:
        assert f"{name} {installed(name)}" in values(report)["libraries"]


def test_every_tier_is_measured(report):
    found = values(report)
    assert "GiB free" in found["DRAM"]
    assert "GB/s" in found["memory, all cores"]
    assert "64.0 MiB: " in found["host to device, pageable"]
    assert "4.00 MiB x 8: " in found["SSD read, buffered"]
    assert "free" in found["SSD"]


@pytest.fixture
def kept_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for stores, and nothing kept of its disk; measured in no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(disk, "READ_S", 0.02)
    monkeypatch.setattr(bandwidths, "LEAST_S", 0.02)
    monkeypatch.setattr(bandwidths, "MEMORY_BYTES", SMALL_BYTES)
    (tmp_path / "stores").mkdir()
    return tmp_path / "stores"


def test_what_was_measured_is_kept_for_bench_and_simulate(kept_anew: Path):
    assert bandwidths.recalled(kept_anew) is None
    found = values(examine(kept_anew))
    kept = bandwidths.recalled(kept_anew)
    assert kept is not None
    assert found["memory, all cores"] == f"read {kept.memory / 1e9:.1f} GB/s"
    assert "SSD read, kept" not in found
    for way in kept.ssd:
        kind = "direct" if way["direct"] else "buffered"
        assert f"{way['bytes_per_s'] / 1e9:.2f}" in found[f"SSD read, {kind}"]
    assert kept.best_ssd is not None


def test_a_disk_that_became_full_keeps_its_earlier_rates(kept_anew, monkeypatch):
    examine(kept_anew)
    before = bandwidths.recalled(kept_anew)
    assert before is not None
    assert before.best_ssd is not None

    def full(folder: Path, *, file_bytes: int):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "measure_ways", full)
    found = values(examine(kept_anew))
    after = bandwidths.recalled(kept_anew)
    assert after is not None
    assert after.ssd == before.ssd
    assert after.memory != before.memory
    assert found["SSD read"] == "n/a: No space left on device"
    rate = f"{before.best_ssd / 1e9:.2f} GB/s"
    assert found["SSD read, kept"] == f"{rate} at most, measured before"


def test_the_kernels_named_are_those_that_none_chooses(report):
    random = np.random.default_rng(0)
    # Large enough that the forms differ: one widens everything, one tile by tile.
    x = random.standard_normal((2, 256), np.float32)
    w = random.standard_normal((4096, 3 * 256)).astype(np.float16)
    ops = {
        linear: (linear.linear, (x, w[:, :256])),
        sparse_swiglu: (
            partial(sparse_swiglu.project, plane="w16"),
            (x, w, None),
        ),
    }
    for module, (op, arrays) in ops.items():
        name = module.default_implementation()
        short = module.__name__.split(".")[-1]
        assert f"{short}: {name}" in values(report)["kernels"]
        chosen = jax.jit(op).lower(*arrays).as_text()
        named = jax.jit(partial(op, implementation=name)).lower(*arrays).as_text()
        assert chosen.count("while") == named.count("while")


def test_versions_that_work_together_are_no_finding():
    assert check_libraries(GOOD).ok
    assert check_libraries(GOOD | {"jax": "0.10.2", "flax": "0.12.8"}).ok


@pytest.mark.parametrize("flax", ["0.12.8", "0.12.8.post1"])
def test_flax_that_cannot_be_imported_with_this_jax_is_named(flax):
    check = check_libraries(GOOD | {"flax": flax})
    assert not check.ok
    assert f"flax {flax} cannot be imported with jax 0.11.2" in check.hint
    assert "flax>=0.12.9" in check.hint


@pytest.mark.parametrize(
    ("name", "version"),
    [("jax", "0.9.9"), ("tensorstore", "0.1.9"), ("orbax-checkpoint", None)],
)
def test_a_library_too_old_or_missing_is_named_with_the_one_wanted(name, version):
    check = check_libraries(GOOD | {name: version})
    assert not check.ok
    assert f"pip install -U '{name}>=0" in check.hint
    assert check.hint.count("pip") == 1


def test_a_gpu_that_jax_does_not_use_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert check_backend(nvidia=tmp_path).ok
    (tmp_path / "gpus").mkdir()
    assert check_backend(nvidia=tmp_path).ok
    (tmp_path / "gpus" / "0000:01:00.0").mkdir()
    check = check_backend(nvidia=tmp_path)
    assert not check.ok
    assert ".[cuda]" in check.hint


def test_a_gpu_left_out_on_request_is_only_a_hint(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    check = check_backend(nvidia=tmp_path)
    assert check.ok
    assert "JAX_PLATFORMS=cpu" in check.hint


@pytest.mark.parametrize("where", ["missing", "file", "/proc"])
def test_a_folder_that_cannot_be_written_is_not_available_with_the_reason(
    tmp_path: Path, where: str
):
    (tmp_path / "file").write_bytes(b"")
    checks, ways = check_disk(tmp_path / where, file_bytes=SMALL_BYTES)
    assert not ways
    for check in checks[1:]:
        assert check.ok
        assert check.value.startswith("n/a: ")
        assert len(check.value) > len("n/a: ")
        assert check.hint


def test_a_disk_that_fills_up_midway_is_not_available_with_the_reason(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_BYTES // 3, limits[1]))
    try:
        checks, _ = check_disk(tmp_path, file_bytes=SMALL_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [check.value for check in checks[1:]] == ["n/a: File too large"] * 2
    assert not list(tmp_path.iterdir())


def test_a_disk_nearly_full_is_left_alone(tmp_path):
    checks, _ = check_disk(tmp_path, file_bytes=1 << 60)
    assert all("free is too little" in check.value for check in checks[1:])


def test_the_read_rate_is_bytes_over_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "READ_S", 0.05)
    ways = measure_ways(tmp_path, file_bytes=SMALL_BYTES)
    assert {way.direct for way in ways} >= {False}
    assert all(1e5 < way.bytes_per_s < 1e12 for way in ways)
    assert not list(tmp_path.iterdir())


def test_pages_in_the_page_cache_are_counted(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SMALL_BYTES))
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.pread(fd, SMALL_BYTES, 0)
        assert cached_pages(fd, SMALL_BYTES) == SMALL_BYTES // mmap.PAGESIZE
        drop_cached(fd)
        if filesystem_type(tmp_path) not in ("tmpfs", "ramfs", "overlay"):
            assert cached_pages(fd, SMALL_BYTES) == 0
    finally:
        os.close(fd)


@pytest.mark.skipif(
    filesystem_type(Path("/dev/shm")) != "tmpfs", reason="no tmpfs on /dev/shm"
)
def test_a_tmpfs_has_no_direct_io(monkeypatch):
    monkeypatch.setattr(disk, "READ_S", 0.05)
    # Since Linux 6.6 it accepts O_DIRECT all the same.
    ways = measure_ways(Path("/dev/shm"), file_bytes=SMALL_BYTES)
    assert ways
    assert not any(way.direct for way in ways)


def test_the_filesystem_is_that_of_the_innermost_mount(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 8:2 / /big rw shared:1 - xfs /dev/sdb rw\n"
        "3 1 8:3 / /big\\040disk rw - btrfs /dev/sdc rw\n"
        "4 2 0:9 / /big rw - tmpfs tmpfs rw\n"
    )
    kinds = {
        "/home": "ext4",
        "/big/store": "tmpfs",
        "/bigger": "ext4",
        "/big disk/store": "btrfs",
    }
    for folder, kind in kinds.items():
        assert filesystem_type(Path(folder), mounts=mounts) == kind
