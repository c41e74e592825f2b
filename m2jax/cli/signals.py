"""Ctrl-C and SIGTERM: an exception at once, the end a few seconds later in any case."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 4.0
# How long after it was swallowed an exception comes again.
AGAIN_S = 0.05


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
    process: whatever m2jax writes survives a kill. Where Python swallows what is raised
    (finalizers, callbacks of the garbage collector, of which JAX has one), that thread
    sends the signal again.

    Args:
        last_words: says what happened before that end, and gives the exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    done = threading.Event()
    swallowed: list[int] = []
    watch = threading.Thread(
        target=_watch,
        args=(read, done, swallowed, last_words),
        name="m2jax-signals",
        daemon=True,
    )
    before = {
        number: signal.getsignal(number)
        for number in ERRORS
        # Whoever started us with a signal ignored meant it.
        if signal.getsignal(number) != signal.SIG_IGN
    }
    unraisable = sys.unraisablehook

    def again(about: "sys.UnraisableHookArgs") -> None:
        numbers = [n for n in before if ERRORS[n] is about.exc_type]
        here = threading.current_thread() is threading.main_thread()
        if not numbers or not here or done.is_set():
            unraisable(about)
            return
        for number in before:
            signal.signal(number, _raise)
        # No more than this: whatever a lock guards may be what was interrupted.
        swallowed.extend(numbers)

    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, _raise)
    sys.unraisablehook = again
    watch.start()
    try:
        yield
    finally:
        try:
            done.set()
            signal.set_wakeup_fd(wakeup)
            os.close(write)
            # Before the handlers go: it may be sending a signal again.
            watch.join()
            os.close(read)
        finally:
            # Orbax may have a hook around it by now, which stays.
            if sys.unraisablehook is again:
                sys.unraisablehook = unraisable
            for number, handler in before.items():
                signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    for known in ERRORS:
        signal.signal(known, signal.SIG_DFL)
    raise ERRORS[number]


def _watch(
    read: int,
    done: threading.Event,
    swallowed: list[int],
    last_words: Callable[[BaseException], int],
) -> None:
    main = threading.main_thread().ident
    assert main is not None
    while numbers := os.read(read, 64):
        known = [ERRORS[number] for number in numbers if number in ERRORS]
        deadline_s = time.monotonic() + GRACE_S
        while known and not done.wait(AGAIN_S):
            if swallowed:
                # One, however often: a second would end the process without a word.
                signal.pthread_kill(main, swallowed[0])
                swallowed.clear()
            elif time.monotonic() >= deadline_s:
                os._exit(last_words(known[0]()))
