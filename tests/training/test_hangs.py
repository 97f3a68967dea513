"""The watchdog's verdict on ranks that are behind, silent, or all in one place; and the event log."""

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launcher.local import free_port
from medvlp import distributed
from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.ranks import LostPeerError
from medvlp.runs.errors import AgreedError
from medvlp.runs.events import EventLog
from medvlp.training import hangs, run
from medvlp.training.hangs import RankStatus, Watchdog, announce_lost, lost_rank, record_flights
from medvlp.training.neighbours import Neighbours
from medvlp.training.pretrain import Pretraining
from tests.distributed_pool import imported


@pytest.fixture
def watchdog(tmp_path: Path) -> Watchdog:
    dog = Watchdog(tmp_path, start_seconds=1800, step_seconds=60)
    dog._rank, dog._ranks = 0, 3
    dog.mark("forward and backward", 41)
    return dog


def places(*marks: int) -> dict[int, RankStatus]:
    names = {5: "loading data", 6: "forward and backward"}
    return {rank: RankStatus(mark, 41, names[mark], heartbeat=9) for rank, mark in enumerate(marks)}


@pytest.mark.parametrize(
    ("found", "answering", "expected"),
    [
        (places(6, 5, 6), [0, 1, 2], "The others wait for it: rank 1 is still in loading data of step 42"),
        (places(6, 6, 6), [0, 2], "rank 1 does not answer (last in forward and backward of step 42)"),
        (places(6, 6), [0, 1], "rank 2 does not answer: a stopped process"),
        (places(6, 6, 6), [0, 1, 2], "So have all ranks"),
        (
            {},
            [],
            "Rank 0 (of a single node the launcher), which keeps the store of the process group, does not",
        ),
    ],
)
def test_the_rank_that_did_not_arrive_is_named(
    watchdog: Watchdog, found: dict[int, RankStatus], answering: list[int], expected: str
) -> None:
    text = watchdog._story(found, answering, 60)
    assert text.startswith(
        "rank 0 has waited 60 s (train.step_timeout_seconds) in forward and backward of step"
    )
    assert expected in text
    assert "train.start_timeout_minutes" in watchdog._story(found, answering, 1800)


class Clock:
    """The watchdog's clock, which goes when the test says so; `looks`: how often it has been looked at."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.now, self.looks = 0.0, 0

    def monotonic(self) -> float:
        self.looks += threading.current_thread() is not threading.main_thread()
        return self.now

    def go(self, seconds: float) -> None:
        """Let time pass, and wait until the watchdog has noticed."""
        self.now += seconds
        seen, deadline = self.looks, time.monotonic() + 200
        while self.looks < seen + 3:
            assert time.monotonic() < deadline, "the watchdog does not look"
            time.sleep(0.01)


def test_a_rank_that_moves_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits of a second, many seconds in many places are no hang, and one in one place is."""
    clock, hangs = Clock(), threading.Event()
    monkeypatch.setattr("medvlp.training.hangs.time", clock)
    monkeypatch.setattr(Watchdog, "_investigate", lambda self: hangs.set())
    monkeypatch.setattr(Watchdog, "_interval", lambda self: 0.02)
    distributed.initialize()
    with Watchdog(tmp_path, 1.0, 0.8) as dog:
        for step in range(10):
            dog.mark("loading data", step)
            clock.go(0.7)
            dog.first_step_is_done()
        assert dog.limit == 0.8
        assert not hangs.is_set()
        dog.mark("forward and backward", 10)
        clock.go(0.9)
        assert hangs.is_set()
        dog.last_step_is_done()
        assert dog.limit == 1.0
        assert dog._places()[0].name in ("loading data", "forward and backward")
    distributed.shutdown()
    assert not (tmp_path / "events.jsonl").exists()


@pytest.mark.parametrize("told", ["by a rank of this node", "by a rank of another node", "by nobody"])
def test_a_rank_that_wakes_adds_no_error_of_its_own(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 was stopped; when it is woken to be ended the other ranks are gone, for it nobody answers."""
    ended: list[int] = []
    flights: list[Path] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr(distributed, "write_flight_record", flights.append)
    monkeypatch.setattr(Watchdog, "_places", lambda self: {})
    monkeypatch.setattr(Watchdog, "_interval", lambda self: 0.05)
    monkeypatch.setenv("MEDVLP_FIRST_ERROR", str(tmp_path / "first"))
    EventLog(tmp_path).note("hang", 3, text="of an earlier start")
    distributed.initialize()
    alerts: list[str] = []
    with Watchdog(tmp_path, 1800, 60) as dog:
        dog.alert = lambda title, text: alerts.append(title)
        if "this node" in told:
            (tmp_path / "first").write_text("1 7")
        elif "another" in told:
            EventLog(tmp_path).note("hang", 3, text="rank 0 does not answer")
        dog._investigate()
    distributed.shutdown()
    assert ended == [7]
    assert flights == [tmp_path], "what NCCL remembers of this rank, whoever speaks"
    assert capsys.readouterr().err.count("error: ") == (told == "by nobody")
    assert alerts == (["hang"] if told == "by nobody" else [])


@pytest.fixture
def lost_only_here() -> Iterator[None]:
    """A single process keeps its group, and the word in it that a rank is lost: no later run reads it."""
    yield
    distributed.shared_store().delete_key(hangs._lost_key())


@pytest.mark.usefixtures("lost_only_here")
@pytest.mark.parametrize("main_thread", ["waits for ever", "finds out by itself"])
def test_a_rank_that_died_ends_the_others(
    main_thread: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a launcher tells it; under NCCL the main thread would wait until its collective times out."""
    codes: list[int] = []
    flights: list[Path] = []
    ended = threading.Event()
    monkeypatch.setattr(distributed, "write_flight_record", flights.append)

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("medvlp.training.hangs._OWN_SECONDS", 0.3)
    monkeypatch.setattr(Watchdog, "_interval", lambda self: 0.02)
    monkeypatch.delenv("MEDVLP_FIRST_ERROR", raising=False)
    distributed.initialize()
    with Watchdog(tmp_path, 1800, 60) as dog:
        dog.mark("forward and backward", 41)
        announce_lost(distributed.shared_store(), "rank 3 (node 1), which was killed by SIGKILL")
        announce_lost(distributed.shared_store(), "rank 4, which ended because of it")
        if main_thread == "waits for ever":
            assert ended.wait(60)
    distributed.shutdown()
    assert codes == ([6] if main_thread == "waits for ever" else [])
    assert flights == [tmp_path] * len(codes)
    said = (
        "rank 0 lost rank 3 (node 1), which was killed by SIGKILL (it waits in forward and backward of step"
    )
    assert (said in capsys.readouterr().err) == (main_thread == "waits for ever")


def test_a_word_of_an_earlier_start_ends_no_later_one() -> None:
    """Torchrun's store serves all rounds of a job, and not every new round counts as a restart."""
    store = distributed.host_store()
    announce_lost(store, "rank 3 on gone, which is gone", "an earlier start")
    assert lost_rank(store, "this start") == ""
    announce_lost(store, "rank 1 on here, which is gone", "this start")
    announce_lost(store, "rank 2 on here, which ended because of it", "this start")
    assert lost_rank(store, "this start") == "rank 1 on here, which is gone"
    announce_lost(store, "rank 1 (node 0), which was killed by SIGKILL")
    assert lost_rank(store, "this start") == "rank 1 (node 0), which was killed by SIGKILL"


@pytest.mark.parametrize(
    ("error", "goodbye"),
    [
        (None, True),
        (ConfigError("of this rank"), False),
        (AgreedError("of all ranks"), True),
        (LostPeerError("of another rank"), True),
    ],
)
def test_who_ends_with_an_error_of_its_own_says_no_goodbye(
    error: Exception | None, goodbye: bool, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []
    monkeypatch.setattr(watchdog._neighbours, "leave", lambda goodbye: said.append(goodbye))
    monkeypatch.setattr(watchdog, "_await_name", lambda: "")
    watchdog.__exit__(None if error is None else type(error), error, None)
    assert said == [goodbye]


@pytest.mark.parametrize("launchers", [False, True])
def test_a_store_that_does_not_answer_holds_nobody_up(
    launchers: bool, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a machine that is gone: a call of it may wait for as long as the run's own limits."""

    class Gone:
        def waits(self, *_: object) -> None:
            threading.Event().wait(60)

        check = compare_set = waits

    for name in ("_STORE_SECONDS", "_NAMING_SECONDS", "_LAUNCHER_SECONDS"):
        monkeypatch.setattr(hangs, name, 0.1)
    watchdog._store = Gone()
    watchdog._neighbours._machines = ["here", "gone"]
    began = time.monotonic()
    watchdog._announce(1)  # it ended because it has lost rank 0 too
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(launchers))
    keeper = "the launcher" if launchers else "rank 0"
    assert watchdog._await_name() == f"{keeper}, which kept the store of the process group"
    watchdog._announce(0)
    assert watchdog._await_name() == "rank 0 on here, which is gone"
    assert time.monotonic() - began < 30


def test_a_connection_that_breaks_is_not_waited_for() -> None:
    def breaks() -> None:
        raise RuntimeError("connection reset")

    began = time.monotonic()
    assert not hangs._within(100, breaks)
    assert time.monotonic() - began < 50


def test_a_neighbour_may_die_as_soon_as_it_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "_LAUNCHER_SECONDS", 0.0)
    monkeypatch.setattr(hangs, "_OWN_SECONDS", 60.0)

    def meet(self: Neighbours) -> None:
        self._machines, self.run = ["here", "there"], "a start of this test"
        self._lost(1)

    monkeypatch.setattr(Neighbours, "meet", meet)
    distributed.initialize()
    with pytest.raises(LostPeerError), Watchdog(tmp_path, 1800, 60) as dog:
        raise LostPeerError("of another rank")
    assert dog.lost == "rank 1 on there, which is gone"
    distributed.shutdown()


@pytest.mark.parametrize(
    ("release", "size", "file"),
    [
        ((2, 7, 1), "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
        ((2, 8, 0), "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"),
    ],
)
def test_the_flight_recorder_is_asked_for_under_the_names_of_each_torch(
    release: tuple[int, ...], size: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One name each: torch warns about an old name that is set beside the new one."""
    environment = {size: "9"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(hangs, "_TORCH", release)
    record_flights(tmp_path)
    named = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_NCCL_PROPAGATE_ERROR": "1"}
    assert environment == named | {size: "9", file: str(tmp_path / "flight-")}


def test_this_torch_knows_its_flight_recorder_by_the_name_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    record_flights(tmp_path)
    header = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    names = re.findall(r'"(TORCH_\w+_BUFFER_SIZE)"', (header / "FlightRecorder.hpp").read_text())
    assert names[0] in environment


def rank_that_fails(rank: int, port: int, folder: Path) -> None:
    """A rank whose run raises, and which then waits for ever to leave its process group, as NCCL may."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    os.dup2(os.open(folder.with_name(f"said-{rank}"), os.O_WRONLY | os.O_CREAT), 2)
    config = Config()
    config.run.dir, config.train.global_batch, config.precision = str(folder), 2, "fp32"

    def fails(*_: object) -> None:
        raise ConfigError(f"planned error of rank {rank}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_train", fails)
        patch.setattr(run, "_CLOSING_SECONDS", 0.5)
        patch.setattr("torch.distributed.destroy_process_group", lambda: threading.Event().wait())
        run.train(Pretraining(config))


def rank_of_torchrun(rank: int, port: int, folder: Path, end: str) -> None:
    """One of three ranks that no launcher watches; the last ends as told, the others wait for ever."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": 3,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.pop("MEDVLP_FIRST_ERROR", None)
    os.dup2(os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    distributed.initialize()
    with Watchdog(folder, 1800, 600) as dog:
        dog.mark("forward and backward", 7)
        distributed.barrier()
        if rank == 2:
            worker = os.fork()  # as the loader's: it outlives its rank for a while
            if not worker:
                time.sleep(60)
                os._exit(0)
            (folder / "worker").write_text(str(worker))
        if end == "killed" and rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        elif end == "an error" and rank == 2:
            raise ConfigError("planned")
        elif end == "killed" or (end == "an error" and rank < 2):
            threading.Event().wait()  # as under NCCL
        elif rank == 2:
            time.sleep(hangs._LAUNCHER_SECONDS + 2)  # the others have long left, without a word of a loss


def exit_codes(rank: Callable[..., None], count: int, *arguments: object) -> list[int | None]:
    """Of the processes that run `rank(number, port, *arguments)`, once they have ended by themselves."""
    port, context = free_port(), imported()
    ranks = [context.Process(target=rank, args=(number, port, *arguments)) for number in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    alive = [process.is_alive() for process in ranks]
    for process in ranks:
        process.kill()
    assert alive == [False] * count
    return [process.exitcode for process in ranks]


@pytest.mark.dist
@pytest.mark.parametrize("end", ["killed", "an error", "done"])
def test_a_rank_that_ends_is_noticed_whoever_started_it(end: str, tmp_path: Path) -> None:
    """Torchrun's agents tell nobody on other nodes; under NCCL the ranks there would wait for minutes."""
    codes = exit_codes(rank_of_torchrun, 3, tmp_path, end)
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    assert codes == {"killed": [6, 6, -9], "an error": [6, 6, 1], "done": [0, 0, 0]}[end]
    for rank in (0, 1):
        said = (tmp_path / f"said-{rank}").read_text()
        named = f"rank {rank} lost rank 2 on {socket.gethostname()}, which is gone (it waits in forward"
        assert (named in said) == (end != "done")


def test_an_error_ends_a_rank_that_cannot_leave_its_group(tmp_path: Path) -> None:
    assert exit_codes(rank_that_fails, 2, tmp_path / "run") == [ConfigError.exit_code] * 2
    for rank in (0, 1):
        assert f"error: planned error of rank {rank}" in (tmp_path / f"said-{rank}").read_text()


def test_events_are_lines_of_json_over_all_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    EventLog(tmp_path).note("start", 0, ranks=2)
    EventLog(tmp_path).note("loss_not_finite", 3, ranks=[{"rank": 1, "loss": float("nan")}])
    first, second = (json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
    assert (first["kind"], first["step"], first["ranks"]) == ("start", 0, 2)
    assert second["ranks"] == [{"rank": 1, "loss": None}]
    assert first["time"] <= second["time"]
    assert first["time"].endswith("+00:00")
    logging.getLogger("medvlp").propagate = True
    EventLog(tmp_path / "nowhere").note("start", 0)
    assert "cannot note the event 'start'" in caplog.text
