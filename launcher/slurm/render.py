"""Job scripts from the templates in `slurm/`: what is asked of sbatch, and values made safe for the shell."""

import dataclasses
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.slurm.cluster_config import ClusterConfig
from shards.errors import MedvlpError, UsageError

#: Values of sbatch's options: what node lists, times, dependencies and constraints are written with.
_VALUE = re.compile(r"[A-Za-z0-9_.,:;@%+*/=&|?~^()\[\]-]+")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|INFINITE", re.ASCII)
_MEMORY = re.compile(r"([0-9]{1,15})([KMGTkmgt]?)")
_SHIFTS = {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}
#: Ten years; what sbatch takes beyond is a slip.
_MOST_MINUTES = 10 * 366 * 24 * 60
#: 1024 TB; no node has more.
_MOST_MEGABYTES = 1 << 30

#: Slurm sends the warning signal up to this much earlier than asked for (sbatch's manual), in seconds.
EARLY_SECONDS = 60


class TemplateError(MedvlpError):
    """A template is not where it should be, or asks for a value that nobody gives."""


@dataclass(frozen=True)
class SlurmRequest:
    """What one job asks of Slurm.

    Attributes:
        job_name: shown by squeue; characters that Slurm or a shell would mind become "_".
        output: file of the script's output; sbatch's patterns (%j) stand for what they stand for.
        nodes, gpus_per_node: 0 GPUs ask for none.
        tasks_per_node: job tasks of each node; the ranks of a node are one task.
        cpus_per_task: None leaves it to the partition.
        time, mem, partition, account, qos, constraint, reservation, dependency, exclude, gpu_type: as sbatch
            writes them; None leaves them out.
        exclusive: whole nodes.
        array: array indexes, such as "0-7%4".
        signal_seconds: when before the time limit the batch script gets SIGUSR1; None: never.
        requeue: whether Slurm may start the job again after a node failure or a preemption.
        extra: more options, each "--name=value" or "--name".
    """

    job_name: str
    output: Path
    nodes: int = 1
    gpus_per_node: int = 0
    gpu_type: str | None = None
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    time: str | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    dependency: str | None = None
    exclude: str | None = None
    exclusive: bool = False
    array: str | None = None
    signal_seconds: int | None = None
    requeue: bool = True
    extra: Sequence[str] = field(default_factory=tuple)


def directives(request: SlurmRequest) -> list[str]:
    """The `#SBATCH` lines of a request.

    Raises:
        UsageError: a value holds characters that no option of sbatch takes, or is no time or memory.
    """
    limit_seconds(request.time)
    check_memory(request.mem)
    gpus = f"{request.gpu_type}:{request.gpus_per_node}" if request.gpu_type else request.gpus_per_node
    options: dict[str, str | int | None] = {
        "job-name": re.sub(r"[^A-Za-z0-9_.+-]", "_", request.job_name)[:60],
        "nodes": request.nodes,
        "ntasks-per-node": request.tasks_per_node,
        "gpus-per-node": gpus if request.gpus_per_node else None,
        "cpus-per-task": request.cpus_per_task,
        "time": request.time,
        "mem": request.mem,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "reservation": request.reservation,
        "dependency": request.dependency,
        "exclude": request.exclude,
        "array": request.array,
        "signal": None if request.signal_seconds is None else f"B:USR1@{request.signal_seconds}",
    }
    lines = []
    for name, value in options.items():
        if value is not None:
            lines.append(f"#SBATCH --{name}={_checked(f'--{name}', str(value))}")
    if request.exclusive:
        lines.append("#SBATCH --exclusive")
    lines.append(f"#SBATCH --{'requeue' if request.requeue else 'no-requeue'}")
    lines.append("#SBATCH --open-mode=append")
    lines.append(f"#SBATCH --output={_quoted_path(request.output)}")
    for option in request.extra:
        name, _, value = option.partition("=")
        lines.append(f"#SBATCH {_checked('option', name)}" + (f"={_checked(name, value)}" if value else ""))
    return lines


def build_request(
    site: ClusterConfig, output: Path, job_name: str, nodes: int, given: Mapping[str, Any]
) -> SlurmRequest:
    """A request from the command line's options (None: not given) over the site's defaults.

    Args:
        given: values by the names of `SlurmRequest`'s attributes.

    Raises:
        UsageError: a time that is none, or a warning that does not fit into it.
    """
    defaults = {
        item.name: getattr(site.sbatch, item.name)
        for item in dataclasses.fields(SlurmRequest)
        if hasattr(site.sbatch, item.name)
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    merged = defaults | chosen
    merged["extra"] = [*site.sbatch.extra, *chosen.get("extra", ())]
    merged["gpus_per_node"] = merged["gpus_per_node"] or 0
    merged["signal_seconds"] = _warning(merged["signal_seconds"], merged["time"], "signal_seconds" in chosen)
    return SlurmRequest(job_name=job_name, output=output, nodes=nodes, **merged)


def _warning(seconds: int, time: str | None, is_asked: bool) -> int:
    """When before the end to warn; a site's default gives way to a short limit, an option does not."""
    limit = limit_seconds(time)
    if limit is None or seconds < limit / 2:
        return seconds
    if is_asked and seconds >= limit:
        raise UsageError(f"--signal-seconds {seconds} does not fit into --time {time}")
    return seconds if is_asked else max(10, limit // 3)


def limit_seconds(time: str | None) -> int | None:
    """Seconds of a time limit as sbatch writes it; None without one, which 0 says too.

    Raises:
        UsageError: it is no time.
    """
    if time is None or time in ("UNLIMITED", "INFINITE"):
        return None
    if not _TIME.fullmatch(time) or _is_overflowing(time):
        raise UsageError(f"--time {time!r}: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None


def _is_overflowing(time: str) -> bool:
    """Whether a part behind a larger one is as long as that, as 1:99:99; or the whole is over ten years."""
    days, dash, rest = time.rpartition("-")
    first, *parts = [int(part) for part in rest.split(":")]
    return (
        any(part > 59 for part in parts)
        or (bool(dash) and first > 23)
        or first > _MOST_MINUTES
        or int(days or 0) > _MOST_MINUTES // 1440
    )


def check_memory(memory: str | None) -> None:
    """Refuse an amount of memory that sbatch does not take.

    Raises:
        UsageError: it is no number of megabytes, nor one with K, M, G or T, or more than a node has.
    """
    if memory is None:
        return
    found = _MEMORY.fullmatch(memory)
    if not found or int(found[1]) << _SHIFTS[found[2].upper()] > _MOST_MEGABYTES << 20:
        raise UsageError(f"--mem {memory!r}: write megabytes, or a number with K, M, G or T, such as 500G")


def _checked(option: str, value: str) -> str:
    if not _VALUE.fullmatch(value):
        raise UsageError(f"{option} {value!r}: sbatch takes no such value")
    return value


def _quoted_path(path: Path) -> str:
    text = str(path)
    if any(character in text for character in '"\\\n\r'):
        raise UsageError(f"{text!r}: sbatch cannot write its output there: rename the folder")
    return f'"{text}"'


def quote_with_variables(text: str) -> str:
    """Quote for the shell all but $NAME and ${NAME}, which the job fills in."""
    parts, position = [], 0
    for match in _VARIABLE.finditer(text):
        if match.start() > position:
            parts.append(shlex.quote(text[position : match.start()]))
        parts.append(f'"${{{match[1] or match[2]}}}"')
        position = match.end()
    if position < len(text) or not parts:
        parts.append(shlex.quote(text[position:]))
    return "".join(parts)


def program(site: ClusterConfig) -> list[str]:
    """How a job on this cluster calls the `medvlp` command, without the container around it."""
    if site.command:
        return list(site.command)
    return ["medvlp"] if site.container.kind != "none" else [sys.executable, "-m", "launcher.main"]


def in_container(site: ClusterConfig, has_gpus: bool) -> tuple[list[str], list[str]]:
    """(options of srun, words before the command) that put a command of a job into the site's container."""
    container = site.container
    if container.kind == "apptainer":
        binds = [word for mount in container.mounts for word in ("--bind", mount)]
        gpus = ["--nv"] if has_gpus else []
        return [], ["apptainer", "exec", *gpus, *binds, *container.options, str(container.image)]
    if container.kind == "pyxis":
        mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
        return [f"--container-image={container.image}", *mounts, *container.options], []
    return [], []


def render(template: str, **values: Any) -> str:
    """The text of `slurm/TEMPLATE` with values filled in.

    Templates have the filters `quote` (one word of shell), `words` (a list of them) and `expand` (one word in
    which $VARIABLES live).

    Raises:
        TemplateError: no such template, or one that asks for a value not given.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML: every value goes through one of the filters
    )
    environment.filters |= {
        "quote": lambda value: shlex.quote(str(value)),
        "words": lambda values: shlex.join(map(str, values)),
        "expand": quote_with_variables,
    }
    try:
        return environment.get_template(template).render(**values)
    except jinja2.TemplateError as error:
        raise TemplateError(f"slurm/{template}: {error}") from error


def template_folder() -> Path:
    """The folder of the templates: `slurm/` of a checkout, else where the installed package put them.

    Raises:
        TemplateError: neither is there.
    """
    checkout = Path(__file__).resolve().parents[2] / "slurm"
    if (checkout / "base.sbatch.j2").is_file():
        return checkout
    try:
        files = metadata.distribution("medvlp").files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "base.sbatch.j2":
            return Path(str(file.locate())).resolve().parent
    raise TemplateError("the job templates (slurm/*.sbatch.j2) are not installed: install medvlp again")
