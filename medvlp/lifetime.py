"""Processes that must not outlive the one that started them. No torch: light commands import this."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_DEATH_SIGNAL_OPTION = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent, of process id `parent`, dies; elsewhere do nothing.

    Strictly: when the parent's thread ends that started this process.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL_OPTION, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)
