"""Ctrl-C and SIGTERM: an exception at once, the end a few seconds later in any case."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 4.0


class Terminated(BaseException):
    """SIGTERM came."""


ERRORS: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
}


@contextmanager
def interruptible(last_words: Callable[[BaseException], int]) -> Iterator[None]:
    """Turns the signals into exceptions of the main thread; a second one ends at once.

    Python raises only between two of its own steps, and code in C (a compilation, a
    write to a slow disk) may come between. A thread waits for that, then ends the
    process: whatever m2jax writes survives a kill.

    Args:
        last_words: says what happened before that end, and gives the exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    done = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(read, done, last_words), name="m2jax-signals", daemon=True
    )
    before = {
        number: signal.getsignal(number)
        for number in ERRORS
        # Whoever started us with a signal ignored meant it.
        if signal.getsignal(number) != signal.SIG_IGN
    }
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, _raise)
    watch.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        done.set()
        os.close(write)
        watch.join()
        os.close(read)


def _raise(number: int, frame: FrameType | None) -> None:
    for known in ERRORS:
        signal.signal(known, signal.SIG_DFL)
    raise ERRORS[number]


def _watch(
    read: int, done: threading.Event, last_words: Callable[[BaseException], int]
) -> None:
    while numbers := os.read(read, 64):
        for number in numbers:
            if number in ERRORS and not done.wait(GRACE_S):
                os._exit(last_words(ERRORS[number]()))
