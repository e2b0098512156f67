"""A child process that ends when its parent does, by the kernel's word.

Invariant: the signal is tied to the parent *thread* that forked, so that thread must live as long as the child.
Where the kernel has no such signal (not Linux), nothing happens.
"""

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Asks the kernel to send this process `number` when the thread that forked it ends. It survives `exec`."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
