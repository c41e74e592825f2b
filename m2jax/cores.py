"""Cores of this machine. Imports nothing: commands that touch no array ask too."""

import os


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
