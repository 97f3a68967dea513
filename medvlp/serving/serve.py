"""`medvlp prototypes serve`: the server as a process, until it is told to end."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from medvlp.serving.access import check_network, make_token, read_token
from medvlp.serving.build import SnapshotOptions
from medvlp.serving.follow import Source
from medvlp.serving.layout import TOKEN, folder_of
from medvlp.serving.limits import Limits
from medvlp.serving.server import Address, PrototypeServer
from shards.errors import MedvlpError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """What the user asks for.

    Attributes:
        run: run folder.
        address: where to listen.
        build: how snapshots are made.
        limits: of requests and connections.
        token_file: None: `RUN/prototypes/token`, made where it does not exist.
        insecure_network: serve other machines without TLS.
        follow: answer from the newest checkpoint of a run that trains.
        poll_seconds: between two looks at it.
    """

    run: Path
    address: Address
    build: SnapshotOptions
    limits: Limits = Limits()
    token_file: Path | None = None
    insecure_network: bool = False
    follow: bool = False
    poll_seconds: float = 10.0


class _Ended(BaseException):
    """SIGTERM or SIGINT arrived; a BaseException, so that nothing on the way takes it for a failure."""


def serve(options: ServeOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; call it in the main thread.

    With `follow` it serves from the start and answers UNAVAILABLE until the run has a checkpoint; without,
    what it answers from is there before it listens.

    Raises:
        UsageError: address, TLS or token cannot be.
        MedvlpError: without `follow`: run or snapshot cannot be used.
    """
    check_network(options.address.host, options.address.tls, options.insecure_network)
    address, folder = options.address.settled(), folder_of(options.run)
    token = make_token(folder / TOKEN) if options.token_file is None else read_token(options.token_file)
    source = Source(options.run, options.build, options.limits, say)
    with _until_told():
        answers = None if options.follow else source.load()
        server = PrototypeServer(address, token, options.limits)
        try:
            if answers is not None:
                server.publish(answers)
            server.start()
            server.describe(folder, options.run)
            protection = "TLS" if address.tls else "no TLS"
            say(f"serving {options.run} at {address.advertised(server.port)} ({protection})")
            while True:
                if options.follow and (answers := source.newer()) is not None:
                    server.publish(answers)
                    try:
                        server.describe(folder, options.run)
                    except MedvlpError as error:  # clients still find it by what the file said before
                        logger.warning("%s", error)
                    table, origin = answers.snapshot.table, answers.snapshot.origin
                    say(f"serving version {table.version} ({table.fingerprint}) of {origin.checkpoint}")
                time.sleep(options.poll_seconds)
        finally:
            server.forget(folder)
            server.stop()
            say("ended")


@contextmanager
def _until_told() -> Iterator[None]:
    """End the block at the first SIGTERM or SIGINT; a second one ends the process as if nobody listened."""

    def end(number: int, frame: FrameType | None) -> None:
        for name in signals:
            signal.signal(name, signal.SIG_DFL)
        raise _Ended

    signals = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, end) for name in signals}
    try:
        yield
    except _Ended:
        pass
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
