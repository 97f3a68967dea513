"""Processes that end in time: with the one that started them, or after an error. No torch."""

import ctypes
import os
import signal
import sys
import threading

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


def end_within(seconds: float, code: int, text: str = "") -> threading.Event:
    """End this process with `code`, after the error `text`, unless the returned event is set in time.

    For what follows an error: closing files, groups and processes may wait for a disk or a peer that is gone.
    """
    ended = threading.Event()

    def end() -> None:
        if not ended.wait(seconds):
            if text:
                print(f"error: {text}", file=sys.stderr, flush=True)
            os._exit(code)

    threading.Thread(target=end, name="medvlp-closing", daemon=True).start()
    return ended
