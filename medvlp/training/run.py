"""One run on this rank: join the group, build everything, train, close."""

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.logging import RichHandler

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.data.batch_sizes import BatchSizes, divide_batch
from medvlp.data.loader import TrainingLoader, build_loader
from medvlp.data.workers import LoaderError, kill_workers, worker_death
from medvlp.device import choose_device
from medvlp.lifetime import end_within
from medvlp.methods.base import Method, Objective
from medvlp.prototypes.anchors import AnchorEncoder
from medvlp.prototypes.supervisor import decline_worker
from medvlp.prototypes.synchronous import build_service
from medvlp.ranks import LostPeerError, Ranks, detect, threads_of_rank
from medvlp.runs.agreement import together
from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.encoder_records import described
from medvlp.runs.errors import AgreedError
from medvlp.runs.events import EventLog
from medvlp.runs.identity import RunIdentity
from medvlp.runs.manifest import DRAWN, VALIDATED, step_folders
from medvlp.runs.opening import TakenUp, check_drawn, open_data, take_up
from medvlp.runs.randomness import seed_rank, seed_weights
from medvlp.runs.run_folder import describe_run, open_run_folder
from medvlp.runs.run_lock import JobIsOver, RunLock, this_process, unknown
from medvlp.training.accumulation import what_differs
from medvlp.training.bad_steps import BadSteps
from medvlp.training.callbacks import Callback
from medvlp.training.checkpointing import CheckpointCallback
from medvlp.training.deepspeed_config import check_device
from medvlp.training.device_memory import naming_setup
from medvlp.training.engine import Engine
from medvlp.training.hangs import Watchdog, record_flights
from medvlp.training.interrupts import EXIT_INTERRUPTED, Interrupts
from medvlp.training.monitor import Monitor, SampleLog
from medvlp.training.node_metrics import NodeMetrics
from medvlp.training.operations import StepWork, step_work
from medvlp.training.prototype_refresh import PrototypeRefresh
from medvlp.training.prototype_revival import PrototypeRevival
from medvlp.training.prototype_start import PrototypeStart, late_start
from medvlp.training.recipe import Recipe, TrainingSet
from medvlp.training.regional_compile import compile_regions
from medvlp.training.rehearsal import rehearse_phases
from medvlp.training.schedule import Schedule, build_schedule
from medvlp.training.step_guard import StepGuard
from medvlp.training.trainer import Trainer
from medvlp.training.validation import Validation, interval
from medvlp.training.wandb_run import WandbRun
from shards.errors import DataError, MedvlpError

logger = logging.getLogger(__name__)

#: Seconds that groups and data workers get to close after an error.
_CLOSING_SECONDS = 10.0


def train(
    recipe: Recipe, fresh: bool = False, launcher: int | None = None, job_is_over: JobIsOver = unknown
) -> int:
    """Train this rank's part of a run, resuming what is in `run.dir`.

    Args:
        recipe: what is trained; its config is complete and validated.
        fresh: refuse a run folder that is not empty.
        launcher: process that ends all ranks of this node when one fails; the run folder is held as long as
            it lives.
        job_is_over: asks Slurm about the job that holds the run folder.

    Returns:
        0 when the run is finished, `EXIT_INTERRUPTED` when a signal ended it after a checkpoint.

    Raises:
        MedvlpError: anything the user can mend; see `medvlp.runs.errors` and `shards.errors`.
    """
    # Imports have made a million objects that stay. Full collections, of which DeepSpeed asks for some, would
    # look through them each time, for half a second.
    gc.collect()
    gc.freeze()
    config, ranks = recipe.config, detect()
    console = configure_logging(ranks.rank)
    sizes = divide_batch(config, ranks.world_size)
    check_device(config, choose_device(ranks.local_rank).type)
    torch.set_num_threads(config.train.threads or threads_of_rank(ranks))
    run_dir, start_seconds = Path(config.run.dir), 60 * config.train.start_timeout_minutes
    record_flights(run_dir)
    lock = RunLock(run_dir, this_process(launcher), job_is_over)
    watchdog = Watchdog(run_dir, start_seconds, config.train.step_timeout_seconds)
    with Interrupts(config.train.max_minutes) as interrupts:
        device = _join(ranks, start_seconds)
        try:
            with watchdog:
                shown = console if config.monitor.progress else None
                _train(recipe, sizes, device, interrupts, watchdog, shown, fresh, lock)
        except Exception as error:
            named = _named(error, ranks.rank, watchdog.lost)
            code = named.exit_code if isinstance(named, MedvlpError) else 1
            closed = end_within(_CLOSING_SECONDS, code, str(named))
            kill_workers()
            distributed.shutdown(graceful=False)
            if ranks.world_size == 1 or isinstance(error, AgreedError):
                lock.release()  # else another rank may still write; the end of this one's processes tells
            closed.set()
            if named is error:
                raise
            raise named from error
        distributed.shutdown()
        lock.release()
    if interrupts.stopped_by:
        logger.info("stopped by %s after a checkpoint; the same command resumes", interrupts.stopped_by)
        return EXIT_INTERRUPTED
    return 0


def _join(ranks: Ranks, seconds: float) -> torch.device:
    try:
        device = distributed.initialize(ranks, timedelta(seconds=seconds))
        distributed.set_timeout(seconds)  # with time to spare for the watchdog, from the first collective on
        return device
    except distributed.RendezvousError as error:
        reason = " ".join(str(error).split())[:200]
        raise LostPeerError(
            f"rank {ranks.rank}: not all of the {ranks.world_size} ranks met at {ranks.address}:{ranks.port} "
            f"within {seconds:g} s (train.start_timeout_minutes): {reason}"
        ) from error


def _named(error: Exception, rank: int, lost: str) -> Exception:
    """The error a user can act on, or the one given; `lost`: the rank that ended, where that is known."""
    if isinstance(error, LoaderError):
        return LoaderError(f"rank {rank}: {error}")
    if isinstance(error, LostPeerError):
        return error
    if isinstance(error.__cause__, RuntimeError):  # an ended process may have been taken for something else
        named = _named(error.__cause__, rank, lost)
        return error if named is error.__cause__ else named
    if not isinstance(error, RuntimeError):
        return error
    if distributed.is_lost_peer(error):
        reason = " ".join(str(error).split())[:200]
        other = lost or "another rank"
        return LostPeerError(f"rank {rank} lost {other}; its own message says why ({reason})")
    death = worker_death(error)
    return error if death is None else LoaderError(f"rank {rank}: {death}")


class _Passing(logging.Handler):
    """Lets the end of a data worker through, which torch raises wherever the process is at that moment.

    Logging takes what is raised in it for its own error, shows a traceback and goes on.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, RuntimeError) and worker_death(error):
            raise error
        super().handleError(record)


class _Console(_Passing, RichHandler): ...


class _Lines(_Passing, logging.StreamHandler[TextIO]): ...


def configure_logging(rank: int) -> Console:
    """Rank 0 tells what happens, the others only warn."""
    console = Console(stderr=True)
    handler: logging.Handler
    if rank == 0 and console.is_terminal:
        handler = _Console(console=console, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = _Lines()
        prefix = "" if rank == 0 else f"rank {rank}: "
        handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    for name in ("medvlp", "shards"):
        package = logging.getLogger(name)
        package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        package.handlers = [handler]
        package.propagate = False
    return console


def _train(
    recipe: Recipe,
    sizes: BatchSizes,
    device: torch.device,
    interrupts: Interrupts,
    watchdog: Watchdog,
    console: Console | None,
    fresh: bool,
    lock: RunLock,
) -> None:
    config = recipe.config
    watchdog.mark("opening the dataset")
    reader = open_data(config)
    watchdog.mark("looking for a checkpoint")
    open_run_folder(Path(config.run.dir), fresh, lock)
    checkpoint = Checkpoint.find(config.run.dir)
    if checkpoint is not None:
        checkpoint.check(config, sizes)
    step = 0 if checkpoint is None else checkpoint.step
    taken_up = take_up(config, reader, checkpoint, recipe.tokenizer, recipe.lesson)
    tokenizer = taken_up.tokenizer
    samples = recipe.samples(reader, tokenizer)
    learned = TrainingSet(config, reader, samples, tokenizer)

    def loader(start_step: int) -> TrainingLoader:
        rank, ranks, micro = distributed.rank(), sizes.world_size, sizes.micro_batch
        return together(
            lambda: build_loader(
                config, reader, tokenizer, rank, ranks, micro, start_step, recipe.fields, samples
            )
        )

    data = loader(step)
    _check_order(config, data)
    # Where the data themselves have changed, which samples are drawn has too.
    changes = taken_up.changes or check_drawn(config, checkpoint, data.drawn, data.samples)
    watchdog.mark("building what is trained")
    objective, identity = _build(recipe, learned, taken_up, checkpoint, device)
    if checkpoint is not None:
        together(partial(checkpoint.weights_into, objective))
    else:
        recipe.start(objective, lambda: loader(0))
    schedule = build_schedule(config, data.steps_per_epoch)
    work = step_work(objective, config, schedule, step, device)
    if config.train.compile:
        compile_regions(objective, device)
    engine = Engine(objective, config, sizes, device)
    guard = StepGuard(objective, config.train.spike_sigma, device)
    callbacks, saving, refresh = _callbacks(
        recipe, learned, engine, guard, schedule, data.steps_per_epoch, loader, checkpoint, console,
        identity.summary() | {DRAWN: data.drawn}, watchdog, work,
    )  # fmt: skip
    seed_rank(config.train.seed, distributed.rank())
    batches: Iterator[Batch] = iter(data)
    if checkpoint is not None:
        watchdog.mark("loading the checkpoint")
        saving.load(checkpoint)
        together(partial(checkpoint.randomness, config.train.seed))
    watchdog.mark("rehearsing later phases")
    batches = rehearse_phases(engine, schedule, guard, batches, config, step)
    # Not earlier: the config of a start that fails is not the run's.
    describe_run(config, sizes.world_size, identity, tokenizer)
    trainer = Trainer(
        engine, batches, schedule, data.steps_per_epoch, callbacks, guard, watchdog,
        config.monitor.log_every, step, refresh, config.train.agree_every,
    )  # fmt: skip
    _note_start(config, checkpoint, step, schedule.steps, changes)
    if (line := what_differs(objective, config, sizes)) is not None:
        logger.info("%s", line)
    trainer.train(interrupts)
    if distributed.is_main():
        kind = "interrupt" if interrupts.stopped_by else "finish"
        EventLog(config.run.dir).note(kind, trainer.step, by=interrupts.stopped_by)
    engine.close()


def _check_order(config: Config, data: TrainingLoader) -> None:
    """Refuse ranks whose orders differ: each computes its own, from what it could read of its copy."""
    drawn = distributed.gather_objects((data.drawn, data.unreadable))
    other = next((rank for rank, (found, _) in enumerate(drawn) if found != drawn[0][0]), None)
    if other is not None:
        raise AgreedError(
            f"rank {other} would draw other samples of split {config.data.split} than rank 0 "
            f"({drawn[other][1]} and {drawn[0][1]} of them could not be read there): run `medvlp shards "
            "verify` on both nodes, delete `tokens` where something was amiss, and start again",
            exit_code=DataError.exit_code,
        )


def _build(
    recipe: Recipe,
    learned: TrainingSet,
    taken_up: TakenUp,
    checkpoint: Checkpoint | None,
    device: torch.device,
) -> tuple[Objective, RunIdentity]:
    """The objective with equal weights on all ranks, and what the run is made from."""
    config = recipe.config
    seed_weights(config.train.seed)
    # A checkpoint holds every weight: what training began with need not be at hand any more.
    buildable = config if checkpoint is None else described(config, taken_up.stored)
    objective = together(lambda: recipe.build(replace(learned, config=buildable)))
    step = 0 if checkpoint is None else checkpoint.step
    identity = taken_up.identity(
        learned.reader, config, objective, step, recipe.started_from, recipe.lesson, recipe.start_origin
    )
    with naming_setup(config):
        objective = objective.to(device)
    objective.prepare(learned.tokenizer)
    return objective, identity


def _note_start(
    config: Config, checkpoint: Checkpoint | None, step: int, steps: int, changes: Sequence[str]
) -> None:
    """Write into the run's history that it starts or goes on, on which data, and what was passed over."""
    if not distributed.is_main():
        return
    events = EventLog(config.run.dir)
    for newer, folder in step_folders(Path(config.run.dir) / "checkpoints"):
        if newer > step:
            events.note("checkpoint_passed_over", newer, checkpoint=folder.name)
    if changes:
        events.note("data_changed", step, root=config.data.root, changes=list(changes))
    ranks = distributed.world_size()
    if checkpoint is None:
        events.note("start", step, steps=steps, ranks=ranks)
    else:
        if step >= steps:
            logger.info("%s is finished (step %d); more train.steps continue it", config.run.dir, step)
        else:
            logger.info("resuming %s after step %d of %d", config.run.dir, step, steps)
        events.note("resume", step, steps=steps, ranks=ranks, checkpoint=checkpoint.name)


def _callbacks(
    recipe: Recipe,
    learned: TrainingSet,
    engine: Engine,
    guard: StepGuard,
    schedule: Schedule,
    steps_per_epoch: int,
    loader: Callable[[int], TrainingLoader],
    checkpoint: Checkpoint | None,
    console: Console | None,
    identity: Mapping[str, str],
    watchdog: Watchdog,
    work: StepWork | None,
) -> tuple[list[Callback], CheckpointCallback, PrototypeRefresh | None]:
    """All callbacks in the order in which they see a step: check, refresh, validate, log, save."""
    config, objective = recipe.config, engine.objective
    run_dir = Path(config.run.dir)
    wandb_run = None
    if distributed.is_main():
        run_id = None if checkpoint is None else checkpoint.manifest.wandb_run_id
        wandb_run = WandbRun(config.monitor, run_dir, config.run.name or run_dir.name, asdict(config), run_id)
        if checkpoint is not None:
            wandb_run.alert("restart", f"the run goes on after step {checkpoint.step}")
    run_id = distributed.broadcast_object(None if wandb_run is None else wandb_run.id)
    bar = console if console is not None and console.is_terminal and distributed.is_main() else None
    monitor = Monitor(run_dir / "metrics.jsonl", schedule.steps, wandb_run, bar, work)
    bad_steps = BadSteps(guard, config.train.max_bad_steps, run_dir, monitor.add)
    watchdog.alert = bad_steps.alert = None if wandb_run is None else wandb_run.alert
    callbacks: list[Callback] = [bad_steps]
    noted: dict[str, Callable[[], Any]] = {}
    refresh: PrototypeRefresh | None = None
    user = objective.service_user
    size = None if user is None else user.service_size()
    if user is not None and size is not None:
        assert isinstance(objective, Method)
        anchors = AnchorEncoder(objective, learned.tokenizer, config, engine.device)
        service = build_service(config.prototypes, size, config.train.seed, detect(), engine.device.type)
        follows = user.assigns_softly
        refreshing = refresh = PrototypeRefresh(service, engine.device, monitor.add, follows, anchors)
        callbacks.append(refresh)
        noted["clusters"] = lambda: refreshing.version
    else:
        decline_worker(detect())
    if isinstance(objective, Method) and late_start(objective, config.prototypes, schedule):
        start = PrototypeStart(engine, config.prototypes, config.train.seed, schedule, loader, monitor.add)
        start.alive = watchdog.mark
        callbacks.append(start)
    if config.prototypes.revive_below > 0:
        callbacks.append(PrototypeRevival(engine, config.prototypes, config.train.seed, monitor.add))
    if every := interval(config, steps_per_epoch):
        validation = Validation(recipe, engine, learned, every, monitor.add)
        validation.alive = watchdog.mark
        if refresh is not None:
            validation.clusters = lambda: refreshing.table
        identity = {**identity, VALIDATED: validation.measured_on}
        callbacks.append(validation)
    callbacks.append(monitor)
    if run_id is not None:
        callbacks.append(NodeMetrics(wandb_run))
    if config.monitor.log_samples:
        callbacks.append(SampleLog(run_dir / "samples.jsonl", noted))
    saving = CheckpointCallback(
        config, engine, list(callbacks), run_id, identity, monitor.metrics_of, monitor.add
    )
    saving.alive = watchdog.mark
    return [*callbacks, saving], saving, refresh
