"""When what was done, by which thread: for profiles. Knows no tiers and no model."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from m2jax.whole_file import whole_file

NOTHING = nullcontext()


class Event(NamedTuple):
    """A stretch of time: seconds since the timeline began, and what it was spent on."""

    name: str
    start_s: float
    end_s: float
    thread: str
    about: dict[str, int | str]


class Timeline:
    """Events of several threads, in the order in which they ended.

    Args:
        begun: of another timeline, to which the events will be added.
    """

    def __init__(self, begun: float | None = None) -> None:
        self.events: list[Event] = []
        self.begun = time.perf_counter() if begun is None else begun

    @contextmanager
    def span(self, name: str, **about: int | str) -> Iterator[None]:
        """Notes how long the body takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.events.append(
                Event(
                    name,
                    start - self.begun,
                    end - self.begun,
                    threading.current_thread().name,
                    about,
                )
            )

    def seconds(self, thread: str) -> dict[str, float]:
        """Seconds of each name in one thread, what lies within another left out."""
        sums: dict[str, float] = {}
        # Ends come in order, so whatever a span holds stands before it.
        open_events: list[Event] = []
        for event in self.events:
            if event.thread != thread:
                continue
            inner = 0.0
            while open_events and open_events[-1].start_s >= event.start_s:
                within = open_events.pop()
                inner += within.end_s - within.start_s
            own = event.end_s - event.start_s - inner
            sums[event.name] = sums.get(event.name, 0.0) + own
            open_events.append(event)
        return sums

    def write(self, path: Path) -> None:
        """As a Chrome trace, which Perfetto (ui.perfetto.dev) opens; whole or not."""
        threads = {event.thread: None for event in self.events}
        numbers = {name: number for number, name in enumerate(threads)}
        trace = [
            {
                "ph": "M",
                "name": "thread_name",
                "pid": 0,
                "tid": number,
                "args": {"name": name},
            }
            for name, number in numbers.items()
        ]
        trace += [
            {
                "ph": "X",
                "name": event.name,
                "pid": 0,
                "tid": numbers[event.thread],
                "ts": 1e6 * event.start_s,
                "dur": 1e6 * (event.end_s - event.start_s),
                "args": event.about,
            }
            for event in self.events
        ]
        text = json.dumps({"traceEvents": trace, "displayTimeUnit": "ms"})
        with whole_file(path) as file:
            file.write(text.encode())


def span(
    timeline: Timeline | None, name: str, **about: int | str
) -> AbstractContextManager[None]:
    """`timeline.span`, or nothing where there is none."""
    return NOTHING if timeline is None else timeline.span(name, **about)
