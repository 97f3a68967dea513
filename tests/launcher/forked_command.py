"""`medvlp` commands whose processes are forked from one that has imported everything, for 15 s of a core.

Launcher and ranks are processes like those of a shell, with their own signals, sessions and exit codes; only
the start of Python is left out, but for `sitecustomize`. Tests of that start (variables that are read at an
import, other launchers) start `python -m launcher.main`.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NoReturn

from tests.distributed_pool import imported

#: An interpreter starts with these signals as the system has them, whoever started it.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


#: Of the ranks of a pool, and of the W&B service of a test before, which would outlive the command.
_OF_OTHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_SERVICE"}


def environment() -> dict[str, str]:
    """That of a command, whatever ran in this process before: one thread, and lines of 200 columns."""
    kept = {name: value for name, value in os.environ.items() if name not in _OF_OTHERS}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


class ForkedCommand:
    """A running `medvlp ARGUMENTS`, with what tests use of `subprocess.Popen`; both outputs are one."""

    def __init__(self, *arguments: str, environment: Mapping[str, str]):
        self._output, theirs = os.pipe()
        command = (arguments, dict(environment), DupFd(theirs))
        self._process = imported().Process(target=_command, args=command)
        self._process.start()
        os.close(theirs)

    @property
    def pid(self) -> int:
        """Of the launcher, or of the only rank."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, -N for signal N, None before the end."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As `os.kill`."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def wait(self) -> None:
        """Until it has ended; others may still hold its output."""
        self._process.join()

    def communicate(self, timeout: float = 400.0) -> tuple[str, None]:
        """What it and its children have written, once all have ended.

        Raises:
            subprocess.TimeoutExpired: they have not.
        """
        until, parts = time.monotonic() + timeout, []
        while not parts or parts[-1]:
            if not select.select([self._output], [], [], max(0.0, until - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired("medvlp", timeout)
            parts.append(os.read(self._output, 1 << 16))
        os.close(self._output)
        self._process.join()
        return b"".join(parts).decode(), None


def _command(arguments: tuple[str, ...], environment: dict[str, str], output: Any) -> None:
    gc.freeze()  # as in `tests.distributed_pool`: each rank would look through all imports at its start
    descriptor = output.detach()
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = _ForkedRank
    _run(arguments, environment)


class _ForkedRank(subprocess.Popen):  # type: ignore[type-arg]
    """A rank: a copy of its launcher in place of a new interpreter, which torch would start."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **options: Any):
        self._started = args, env
        super().__init__(args, env=env, **options)

    def _execute_child(self, *_: Any) -> None:
        arguments, environment = self._started
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return
        code = 1
        try:
            os.setsid()
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _run(arguments[3:], environment)  # after python -m launcher.main
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _run(arguments: tuple[str, ...], environment: dict[str, str]) -> NoReturn:
    from launcher import main

    os.environ.clear()
    os.environ |= environment
    for folder in filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)):
        if (customisation := Path(folder) / "sitecustomize.py").is_file():  # as Python at its start
            runpy.run_path(str(customisation))
            break
    sys.argv = ["medvlp", *arguments]
    try:
        main.run()
    finally:
        atexit._run_exitfuncs()  # a child of multiprocessing, and what it forks, would end without them
