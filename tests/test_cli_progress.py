"""What is shown of work under way."""

import io
import re
import threading
import time

import pytest
from rich.console import Console

from m2jax.cli import progress
from m2jax.cli.progress import Activity


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch):
    """Shown after a hundredth of the usual time."""
    monkeypatch.setattr(progress, "QUIET_S", progress.QUIET_S / 100)
    monkeypatch.setattr(progress, "PLAIN_S", progress.PLAIN_S / 100)


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=100), file


def wait_for(text: str, file: io.StringIO, *, count: int = 1) -> str:
    """What was printed, once it holds the text so many times."""
    deadline = time.monotonic() + 10
    while file.getvalue().count(text) < count:
        assert time.monotonic() < deadline, file.getvalue()
        time.sleep(0.005)
    return file.getvalue()


@pytest.mark.usefixtures("impatient")
def test_without_a_terminal_work_is_a_plain_line_now_and_then():
    target, file = console(terminal=False)
    with Activity(target, "convert") as activity:
        activity.update(1 << 20, 4 << 20)
        shown = wait_for("convert: 1.00 MiB of 4.00 MiB (25 %)", file, count=3)
    assert "\x1b" not in shown
    assert "\r" not in shown


@pytest.mark.usefixtures("impatient")
def test_on_a_terminal_work_is_a_bar_that_goes_away():
    target, file = console(terminal=True)
    with Activity(target, "convert [x]") as activity:
        activity.update(1 << 20, 4 << 20)
        wait_for("convert [x]: 1.00 MiB of 4.00 MiB", file)
    # Erases its line, and shows the cursor again.
    assert "\x1b[2K" in file.getvalue()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


@pytest.mark.usefixtures("impatient")
def test_work_that_reports_nothing_still_shows_its_time():
    target, file = console(terminal=False)
    with Activity(target, "load"):
        wait_for("load: 0 s\n", file, count=2)


def test_work_of_less_than_a_second_shows_nothing():
    target, file = console(terminal=False)
    with Activity(target, "load") as activity:
        activity.add("dense part", 1 << 20)
    assert file.getvalue() == ""
    assert not any(thread.name == "m2jax-progress" for thread in threading.enumerate())


def test_rate_and_time_left_leave_out_what_was_there_before():
    activity = Activity(console(terminal=False)[0], "convert")
    activity._start_s -= 10
    activity.update(60 << 20, 100 << 20)
    activity.update(80 << 20, 100 << 20)
    # 20 MiB in 10 s, so that 20 MiB more take 10 s. The clock runs on meanwhile.
    found = re.fullmatch(
        r"convert: 80\.0 MiB of 100 MiB \(80 %\), ([\d.]+) MiB/s, 10 s, 10 s left",
        activity.line(),
    )
    assert found is not None, activity.line()
    assert 1.9 < float(found[1]) <= 2.0


def test_counted_work_has_no_rate_in_bytes():
    activity = Activity(console(terminal=False)[0], "prompt", unit="layers")
    activity._start_s -= 6
    activity.update(1, 32)
    activity.update(4, 32)
    assert activity.line() == "prompt: 4 of 32 layers (12 %), 6 s, 56 s left"


def test_the_first_second_tells_no_time_left():
    activity = Activity(console(terminal=False)[0], "convert")
    activity._start_s -= 1
    activity.update(0, 100 << 20)
    activity.update(111, 100 << 20)
    assert "left" not in activity.line()
