"""A process that lives no longer than the one that wants its result.

`python -m bench.lifeline COMMAND…` becomes COMMAND and leaves it that property.
"""

import ctypes
import os
import signal
import sys

PARENT = "UNET_BENCH_PARENT"
"""The environment variable with the parent's process id; a process that asks takes it out of what its children see."""

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def stop_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: nobody would read what it finds."""
    parent = int(os.environ.pop(PARENT, os.getppid()))
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be asked for
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    stop_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 (the command is what was asked for)
