"""Ends a run in which a rank no longer arrives or has died, and says which one and where it was."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from packaging.version import Version

from medvlp import distributed
from medvlp.ranks import LostPeerError, claim_first_error
from medvlp.runs.errors import AgreedError
from medvlp.runs.events import EVENTS, EventLog
from medvlp.training.neighbours import Neighbours
from shards.errors import MedvlpError

#: Seconds to wait for the store's answer, and that the ranks which do not speak leave to the one that does.
_STORE_SECONDS, _SPEAKER_SECONDS = 5.0, 10.0
#: Seconds that a launcher has to say how a rank ended before a neighbour says that it did.
_LAUNCHER_SECONDS = 1.0
#: Seconds in which who lost a rank waits for its name.
_NAMING_SECONDS = 3.0
#: Seconds in which the main thread may find out by itself that a rank has died (gloo tells it, NCCL waits).
_OWN_SECONDS = 5.0
#: Seconds that NCCL may take to tell what it remembers.
_DUMP_SECONDS = 30.0


#: Size and file of NCCL's flight recorder; torch 2.8 renamed them, and warns about the old names.
_FLIGHT_NAMES = "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"
_FLIGHT_NAMES_BEFORE = "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
_TORCH = Version(torch.__version__).release


def record_flights(folder: Path) -> None:
    """Have NCCL remember its last collectives, and write them into `folder` when one times out.

    Call it before `distributed.initialize`; what the user has set stands. NCCL's part has never run for lack
    of a machine with several GPUs; elsewhere it changes nothing.
    """
    size, file = _FLIGHT_NAMES if _TORCH >= (2, 8) else _FLIGHT_NAMES_BEFORE
    for name, value in {
        size: "2000",
        file: str(folder / "flight-"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_PROPAGATE_ERROR": "1",
    }.items():
        os.environ.setdefault(name, value)


def _lost_key(run: str = "") -> str:
    return f"medvlp/lost/{run}"


def announce_lost(store: Any, text: str, run: str = "") -> None:
    """Tell all ranks which of them has ended and how; the first word stands.

    Args:
        store: where they met.
        text: which and how.
        run: of a rank, its start (`Neighbours.run`): torchrun's store serves later ones too. A launcher
            serves one.
    """
    store.compare_set(_lost_key(run), "", text)


def lost_rank(store: Any, run: str = "") -> str:
    """What `announce_lost` was told by the launcher, or by a rank of `run`; "" as long as all ranks live.

    Raises:
        RuntimeError: the store is gone, and with it the process that kept it.
    """
    for key in (_lost_key(), _lost_key(run)):
        if store.check([key]):
            return str(store.get(key).decode(errors="replace"))
    return ""


class HangError(MedvlpError):
    """A rank no longer arrives. Its exit code is what counts: a thread ends the process with it."""

    exit_code = 7


class RankStatus(NamedTuple):
    """Where a rank is.

    Attributes:
        marks: places it has passed; all ranks pass the same.
        step: finished steps; None before there are any.
        name: of the place.
        heartbeat: number of this message; it rises as long as the process runs.
    """

    marks: int
    step: int | None
    name: str
    heartbeat: int


class Watchdog:
    """Watches that this rank moves from place to place, and tells the other ranks where it is.

    Marking a place costs an attribute. One thread puts the place into the process group's store every few
    seconds, another looks at the clock. When this rank has been in one place for too long it reads where the
    others are. A rank that does not answer (stopped, gone), or that has passed fewer places, is the one the
    others wait for. Every rank then ends with `HangError.exit_code`; the first that still answers says why. A
    rank that was stopped and is woken to be ended adds nothing to what was said of it.

    A rank that died is named by the launcher of its node, or by a neighbour (`Neighbours`); every other rank
    then ends with `LostPeerError.exit_code`, in seconds and whatever its main thread waits for.

    Args:
        run_dir: the run folder, for `events.jsonl`.
        start_seconds: limit for each place until `first_step_is_done`, and after `last_step_is_done`.
        step_seconds: limit between them; 0: none.

    Attributes:
        alert: takes a title and a text for the people who watch the run; None on ranks that cannot tell them.
        lost: name of the rank that ended, once that has ended the block; "" where nobody said it.
    """

    def __init__(self, run_dir: Path | str, start_seconds: float, step_seconds: float):
        self.run_dir = Path(run_dir)
        self.limit = start_seconds
        self.start_seconds, self.step_seconds = start_seconds, step_seconds
        self.alert: Callable[[str, str], None] | None = None
        self.lost = ""
        self._gone: int | None = None
        self._neighbours = Neighbours(self._announce)
        self._place = RankStatus(0, None, "the start", 0)
        self._since = time.monotonic()
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    def mark(self, name: str, step: int | None = None) -> None:
        """This rank has come to the place `name`, of the step after `step` finished ones."""
        self._since = time.monotonic()
        self._place = RankStatus(self._place.marks + 1, step, name, 0)

    def first_step_is_done(self) -> None:
        """From now on places are passed quickly: shorten the limit, and the collectives' own time-outs."""
        self._set_limit(self.step_seconds)

    def last_step_is_done(self) -> None:
        """Closing may take its time again (a tracker that uploads)."""
        self._set_limit(self.start_seconds)

    def _set_limit(self, seconds: float) -> None:
        if seconds != self.limit:
            self.limit = seconds
            distributed.set_timeout(seconds or None)

    def __enter__(self) -> Self:
        """Start watching; needs the process group, and all ranks."""
        self._store = distributed.shared_store()
        self._rank, self._ranks = distributed.rank(), distributed.world_size()
        self._neighbours.meet()  # from here on one may be lost, which the store is told
        self._since = time.monotonic()
        self._earlier_events = _size(self.run_dir / EVENTS)
        for target in (self._publish, self._watch):
            self._threads.append(threading.Thread(target=target, name="medvlp-watchdog", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost_peer = error is not None and distributed.is_lost_peer(error)
        if lost_peer:
            self.lost = self._await_name()
        # An agreed error is every rank's: none has lost another.
        self._neighbours.leave(goodbye=error is None or lost_peer or isinstance(error, AgreedError))
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=_STORE_SECONDS)  # the publisher may wait for a store that is gone

    def _announce(self, rank: int) -> None:
        """A neighbour is gone; in a thread of `Neighbours`."""
        if not self._done.wait(_LAUNCHER_SECONDS):
            self._gone, text = rank, self._gone_rank(rank)
            # A store that does not answer is gone too, which tells the others as much.
            _within(_STORE_SECONDS, lambda: announce_lost(self._store, text, self._neighbours.run))

    def _await_name(self) -> str:
        """Who is lost, as somebody will have said soon, or as this rank has seen."""
        said: list[str] = []
        until = time.monotonic() + _NAMING_SECONDS

        def look() -> None:
            while not said and time.monotonic() < until:
                if lost := lost_rank(self._store, self._neighbours.run):
                    said.append(lost)
                else:
                    time.sleep(0.1)

        answers = _within(_NAMING_SECONDS, look)
        while not said and self._gone is None and time.monotonic() < until:
            time.sleep(0.1)
        if said:
            return said[0]
        # Without the store its keeper is lost: another that is gone has only followed it.
        if not answers and self._gone != 0:
            return _store_keeper()
        return "" if self._gone is None else self._gone_rank(self._gone)

    def _gone_rank(self, rank: int) -> str:
        return f"{self._neighbours.name(rank)}, which is gone"

    def _interval(self) -> float:
        return min(5.0, max(0.2, (self.limit or 60.0) / 20))

    def _publish(self) -> None:
        heartbeat = 0
        while not self._done.is_set():
            heartbeat += 1
            try:
                self._store.set(_key(self._rank), json.dumps(self._place._replace(heartbeat=heartbeat)))
                lost = lost_rank(self._store, self._neighbours.run)
            except RuntimeError:
                lost = _store_keeper()
            if lost:
                self._follow(lost)
                return
            self._done.wait(self._interval())

    def _follow(self, lost: str) -> None:
        """End this process, as another rank did, unless its main thread does so by itself."""
        if self._done.wait(_OWN_SECONDS):
            return
        if claim_first_error(os.environ, LostPeerError.exit_code):
            where = _where(self._place)
            print(f"error: rank {self._rank} lost {lost} (it waits in {where})", file=sys.stderr, flush=True)
        _within(_DUMP_SECONDS, lambda: _write_flight_record(self.run_dir))
        os._exit(LostPeerError.exit_code)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(self._interval()):
            now = time.monotonic()
            if now - looked > 3 * self._interval() + 1:  # this process itself was stopped for a while
                self._since = now
            looked = now
            if self.limit and now - self._since > self.limit:
                self._investigate()
                looked = time.monotonic()

    def _investigate(self) -> None:
        marks, limit = self._place.marks, self.limit
        # Two looks at the store, far enough apart for every living process to have put in another heartbeat.
        before = self._places()
        self._done.wait(3 * self._interval() + 0.5)
        after = self._places()
        # This rank may have gone on, or ended, while it looked.
        if self._done.is_set() or self._place.marks != marks:
            return
        # A rank whose main thread waits still sends heartbeats; one that is stopped or gone sends none. This
        # rank counts as answering whatever the store says: it is the one that asks.
        answering = [rank for rank in after if rank == self._rank or before.get(rank) != after[rank]]
        text = self._story(after, answering, limit)
        # Every rank comes here by itself, at about the same time and with the same answers, so they need no
        # agreement (which could hang as well) on who speaks. The others leave the speaker time for it: the
        # launcher ends all ranks of a node when the first has ended.
        if self._rank != min(answering, default=self._rank):
            time.sleep(_SPEAKER_SECONDS)
        # A rank that was stopped finds the others gone when it is woken to be ended. They have named it, here
        # (first error of this node) or on another node (run folder).
        elif not self._is_told() and claim_first_error(os.environ, HangError.exit_code):
            print(f"error: {text}", file=sys.stderr, flush=True)
            _within(
                _STORE_SECONDS, lambda: EventLog(self.run_dir).note("hang", self._place.step or 0, text=text)
            )
            if alert := self.alert:
                _within(_STORE_SECONDS, lambda: alert("hang", text))
        _within(_DUMP_SECONDS, lambda: _write_flight_record(self.run_dir))
        # Not sys.exit: the main thread is in a collective or a system call that nothing interrupts.
        os._exit(HangError.exit_code)

    def _is_told(self) -> bool:
        """Whether a rank has noted a hang since this start."""
        noted: list[bytes] = []

        def read() -> None:
            with suppress(OSError), (self.run_dir / EVENTS).open("rb") as file:
                file.seek(self._earlier_events)
                noted.extend(line for line in file if b'"kind": "hang"' in line)

        return _within(_STORE_SECONDS, read) and bool(noted)

    def _places(self) -> dict[int, RankStatus]:
        """Where the ranks are, as far as the store tells; {} when it does not answer."""
        found: dict[int, RankStatus] = {}

        def read() -> None:
            keys = {rank: _key(rank) for rank in range(self._ranks)}
            known = {rank: key for rank, key in keys.items() if self._store.check([key])}
            values = self._store.multi_get(list(known.values()))
            found.update({rank: RankStatus(*json.loads(v)) for rank, v in zip(known, values, strict=True)})

        return dict(found) if _within(_STORE_SECONDS, read) else {}

    def _story(self, places: dict[int, RankStatus], answering: list[int], limit: float) -> str:
        own = self._place
        key = "train.step_timeout_seconds" if limit == self.step_seconds else "train.start_timeout_minutes"
        head = f"rank {self._rank} has waited {limit:g} s ({key}) in {_where(own)}. "
        if not places:
            keeper = "Rank 0 (of a single node the launcher)"
            return (
                head
                + f"{keeper}, which keeps the store of the process group, does not answer: is it stopped?"
            )
        silent = [rank for rank in range(self._ranks) if rank not in answering]
        if silent:
            parts = [
                f"rank {rank} does not answer"
                + (f" (last in {_where(places[rank])})" if rank in places else "")
                for rank in silent
            ]
            return head + "; ".join(parts) + ": a stopped process, or its machine is gone"
        furthest = max(place.marks for place in places.values())
        behind = [rank for rank in places if places[rank].marks < furthest]
        if behind:
            parts = [f"rank {rank} is still in {_where(places[rank])}" for rank in behind]
            return head + "The others wait for it: " + "; ".join(parts)
        return head + "So have all ranks: the network between them, or a disk they share, does not answer"


def _store_keeper() -> str:
    """Who is lost where the store does not answer; a launcher: ours on one node, or an agent of torchrun."""
    keeper = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    return f"{keeper}, which kept the store of the process group"


def _write_flight_record(run_dir: Path) -> None:
    with suppress(OSError):
        distributed.write_flight_record(run_dir)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _key(rank: int) -> str:
    return f"medvlp/place/{rank}"


def _where(place: RankStatus) -> str:
    return place.name if place.step is None else f"{place.name} of step {place.step + 1}"


def _within(seconds: float, action: Callable[[], object]) -> bool:
    """Whether `action` ended by itself in time; it may hang on a disk or a socket."""
    ended = threading.Event()

    def run() -> None:
        try:
            action()
        except RuntimeError:  # the store's connection is lost: the same as no answer
            return
        ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return ended.is_set()
