"""Training layer after layer: kills, resuming, damage, a folder of another run."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from m2jax.calibrate import fitted
from m2jax.calibrate.fit import FitOptions, fit_model
from m2jax.calibrate.predictor import Examples
from m2jax.errors import TierFailed
from tests.planted_examples import QUICK, assert_same, planted


def three_layers() -> Iterator[tuple[int, Examples]]:
    return ((layer, planted(layer, count=500)) for layer in range(3))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


HEADER = {"model": "ab12", "text": "cd34", "lookahead": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """Three layers trained in one go, and the folder they were kept in."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    return fit_model(three_layers(), folder, header=HEADER, options=QUICK), folder


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_killed_training_goes_on_to_the_same_bytes(whole, tmp_path: Path):
    results, kept = whole
    folder = tmp_path / "work"

    def killed_at(layer: int) -> Iterator[tuple[int, Examples]]:
        for at, data in three_layers():
            if at == layer:
                raise Killed
            yield at, data

    for layer in range(3):
        with pytest.raises(Killed):
            fit_model(killed_at(layer), folder, header=HEADER, options=QUICK)
        assert list(fitted.finished(folder)) == list(range(layer))
        # The next attempt is killed later, and meets what this one finished.
    resumed = fit_model(three_layers(), folder, header=HEADER, options=QUICK)
    for layer, result in resumed.items():
        assert_same(result, results[layer])
    assert tree(folder) == tree(kept)


@pytest.mark.parametrize(
    ("module", "name"),
    [(fitted, "save_bank"), (fitted.files, "write_synced"), (fitted.files, "put")],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_kill_while_a_layer_is_written_leaves_it_whole_or_unfinished(
    whole, tmp_path: Path, module, name: str, late: bool
):
    results, kept = whole
    folder = tmp_path / "work"
    fit_model([], folder, header=HEADER, options=QUICK)
    work = getattr(module, name)

    def killed(*args, **keywords):
        if late:
            work(*args, **keywords)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(Killed):
            fit_model(three_layers(), folder, header=HEADER, options=QUICK)
    done = [0] if name == "put" and late else []
    assert list(fitted.finished(folder)) == done
    resumed = fit_model(three_layers(), folder, header=HEADER, options=QUICK)
    assert_same(resumed[0], results[0])
    assert tree(folder) == tree(kept)


@pytest.mark.parametrize("name", ["save_bank", "put"])
def test_a_full_disk_is_named_and_the_same_call_goes_on(whole, tmp_path, name):
    results, _ = whole
    folder, module = tmp_path / "work", fitted if name == "save_bank" else fitted.files

    def full(*args, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(TierFailed, match=r"work: .*left on .*; free some") as e:
            fit_model(three_layers(), folder, header=HEADER, options=QUICK)
        assert e.value.exit_code == 5
    resumed = fit_model(three_layers(), folder, header=HEADER, options=QUICK)
    for layer, result in resumed.items():
        assert_same(result, results[layer])


def test_a_finished_layer_is_not_trained_again_and_need_not_be_given(whole):
    results, folder = whole
    nothing: list[tuple[int, Examples]] = []
    again = fit_model(nothing, folder, header=HEADER, options=QUICK)
    assert list(again) == [0, 1, 2]
    for layer, result in again.items():
        assert_same(result, results[layer])
    broken = planted()._replace(labels=np.zeros((1, 1), np.uint8))
    fit_model([(1, broken)], folder, header=HEADER, options=QUICK)


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ({**HEADER, "model": "0000"}, QUICK),
        ({**HEADER, "lookahead": 2}, QUICK),
        (HEADER, FitOptions(rank=5, epochs=3, learning_rate=1e-2)),
    ],
)
def test_a_work_folder_of_another_run_is_refused_untouched(whole, header, options):
    _, folder = whole
    before = tree(folder)

    def layers() -> Iterator[tuple[int, Examples]]:
        raise AssertionError("nothing is computed for a run that is refused")
        yield

    with pytest.raises(ValueError, match="remove the folder to start afresh"):
        fit_model(layers(), folder, header=header, options=options)
    assert tree(folder) == before


def test_a_folder_of_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        fit_model([], tmp_path, header=HEADER)
    assert tree(tmp_path) == {"thesis.txt": b"precious"}


def test_a_damaged_layer_is_trained_again_to_the_same_bytes(whole, tmp_path: Path):
    _, kept = whole
    folder = tmp_path / "work"
    shutil.copytree(kept, folder)
    layer = folder / "layer-1"
    files = [path for path in layer.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        data = path.read_bytes()
        damages = [data + b"x"]
        if data:
            damages += [b"", bytes([data[0] ^ 1]) + data[1:]]
        for damaged in damages:
            path.write_bytes(damaged)
            assert list(fitted.finished(folder)) == [0, 2]
        path.unlink()
        assert list(fitted.finished(folder)) == [0, 2]
        path.write_bytes(data)
    assert list(fitted.finished(folder)) == [0, 1, 2]
    files[0].write_bytes(b"")
    fit_model(three_layers(), folder, header=HEADER, options=QUICK)
    assert tree(folder) == tree(kept)


def test_progress_tells_layers_done_epoch_and_recall(tmp_path: Path):
    seen: list[tuple[int, int, float]] = []
    results = fit_model(
        three_layers(),
        tmp_path / "work",
        header={},
        options=QUICK,
        progress=lambda *told: seen.append(told),
    )
    assert [told[:2] for told in seen] == [
        (layer, epoch)
        for layer, result in results.items()
        for epoch in range(1, result.epochs + 1)
    ]
    assert all(0 < told[2] <= 1 for told in seen)
