"""What is under way, shown on stderr as soon as it takes longer than a second.

On a terminal a rich progress bar, elsewhere a plain line every few seconds. A thread
draws, so that a step that reports nothing (a compilation) still shows its seconds.
"""

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from m2jax.units import format_bytes

QUIET_S = 1.0
PLAIN_S = 2.0
BAR_S = 0.1
# Before that a rate tells little of the time left.
TELLING_S = 3.0


class Activity:
    """One piece of work, as a context manager.

    Args:
        what: its name, as in "convert".
        unit: "bytes", or the plural of what is counted.
    """

    def __init__(self, console: Console, what: str, *, unit: str = "bytes"):
        self._console = console
        self._what, self._unit = what, unit
        self._detail = ""
        self._done, self._total = 0, 0
        # What was there at the first report took no time of ours (a resumed run).
        self._first: int | None = None
        self._start_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._show, name="m2jax-progress", daemon=True
        )

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Notes how far the work is; any thread may call it."""
        if self._first is None:
            self._first = done
        self._done, self._total, self._detail = done, total, detail

    def add(self, detail: str, amount: int) -> None:
        """Notes that more is done, of an unknown total."""
        self._first = 0
        self._done, self._detail = self._done + amount, detail

    def line(self) -> str:
        """How far the work is, its rate, and the time left if that can be told."""
        elapsed = time.monotonic() - self._start_s
        parts = [self._amount(self._done)] if self._done else []
        rate = (self._done - (self._first or 0)) / elapsed if elapsed > 0 else 0
        if self._total:
            percent = 100 * self._done // self._total
            done = self._amount(self._done).removesuffix(f" {self._unit}")
            parts = [f"{done} of {self._amount(self._total)} ({percent} %)"]
        if self._unit == "bytes" and rate > 0:
            parts.append(f"{format_bytes(int(rate))}/s")
        if self._detail and not self._total:
            parts.append(self._detail)
        parts.append(f"{elapsed:.0f} s")
        if self._total and rate > 0 and elapsed >= TELLING_S:
            parts.append(f"{(self._total - self._done) / rate:.0f} s left")
        return f"{self._what}: {', '.join(parts)}"

    def _amount(self, count: int) -> str:
        if self._unit == "bytes":
            return format_bytes(count)
        return f"{count:,} {self._unit}"

    def _show(self) -> None:
        if self._ended.wait(QUIET_S):
            return
        if not self._console.is_terminal:
            while True:
                self._console.print(self.line(), soft_wrap=True)
                if self._ended.wait(PLAIN_S):
                    return
        text = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), BarColumn(), text)
        with Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(self.line(), total=None)
            while not self._ended.wait(BAR_S):
                bars.update(
                    task,
                    description=self.line(),
                    completed=self._done,
                    total=self._total or None,
                )

    def __enter__(self) -> "Activity":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()


class Stages:
    """Pieces of work one after another, each an `Activity` of its own."""

    def __init__(self, console: Console):
        self._console = console
        self._activity = Activity(console, "load", unit="steps")
        self._what = "load"

    def update(self, what: str, done: int, total: int) -> None:
        """Notes how far a piece of work is; another one than before ends that one."""
        if what != self._what:
            self._activity.__exit__(None, None, None)
            self._activity = Activity(self._console, what, unit="steps")
            self._activity.__enter__()
            self._what = what
        self._activity.update(done, total)

    def __enter__(self) -> "Stages":
        self._activity.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._activity.__exit__(kind, error, trace)
