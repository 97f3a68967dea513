"""The W&B side of a run. Whatever happens to W&B or the network, training goes on."""

import logging
import netrc
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from numpy.typing import NDArray

from medvlp.config import MonitorConfig

logger = logging.getLogger(__name__)

#: Seconds to wait for the server at the start (W&B's own WANDB_INIT_TIMEOUT stands above it) and at the end.
INIT_TIMEOUT = 30.0
FINISH_TIMEOUT = 60.0

#: In the run folder: id of its W&B run, and the folder itself, by which a copy of it knows that it is one.
ID_FILE = "wandb-run-id"
_ID = re.compile(r"[0-9a-z]{4,64}")
_NOTE_CHARACTERS = 8192


def resolve_mode(mode: str) -> str:
    """ "auto" -> "online" with an API key (environment or netrc), else "offline"; other modes unchanged."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _key_in_netrc() else "offline"


def _key_in_netrc() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbRun:
    """One W&B run, continued under the same id after a restart, and by an evaluation.

    Metrics stand over the training step, `step`. After a restart from a checkpoint the steps since then, and
    the last ones before it, are logged again with the same values; W&B itself leaves out steps that it has.

    Report text and images are sent with `monitor.share_samples` alone (`images`, `texts`); else only numbers
    and the config are, and W&B's capture of the console (error messages may name samples) and of code is off.

    Attributes:
        id: of the run, also when offline; None when disabled.
    """

    def __init__(
        self,
        config: MonitorConfig,
        run_dir: Path,
        name: str,
        settings: Mapping[str, Any],
        run_id: str | None,
        job_type: str = "train",
    ):
        """Start or continue a run.

        Args:
            config: the `monitor` section.
            run_dir: W&B's files go below it.
            name: shown in W&B.
            settings: the resolved config, shown in W&B.
            run_id: of the run to continue, as a checkpoint knows it, where the folder does not; None: new.
            job_type: what W&B groups runs by beside `monitor.group`.
        """
        self._run: Any = None
        self._alerts, self._shares = config.alerts, config.share_samples
        self.id: str | None = None
        mode = resolve_mode(config.wandb)
        if mode == "disabled":
            return
        import wandb  # here: it is slow to import, and a run without it needs no W&B installed

        self.id = _own_id(run_dir, run_id) if job_type == "train" else run_id
        arguments: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "tags": list(config.tags) or None,
            "dir": str(run_dir),
            "name": name,
            "id": self.id,
            "config": dict(settings),
            "group": config.group,
            "job_type": job_type,
        }
        if mode == "online":
            try:
                self._run = wandb.init(mode="online", resume="allow", settings=_settings(), **arguments)
                self._attempt("start", self._begin)
                return
            except Exception as error:  # W&B raises many kinds, none of which is worth the training run
                reason = " ".join(str(error).split())[:200]
                logger.warning(
                    "W&B cannot be reached (%s); this run is logged offline; "
                    "medvlp runs FOLDER --sync sends it later",
                    reason,
                )
                wandb.teardown()
        try:
            self._run = wandb.init(mode="offline", settings=_settings(), **arguments)
        except Exception as error:  # see above
            logger.warning("W&B could not start (%s); the run goes on without it", error)
        else:
            self._attempt("start", self._begin)

    def _begin(self) -> None:
        """Name the axis of all metrics, and tell where the run can be looked at."""
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        offline = self._run.settings.mode == "offline"  # W&B warns who asks an offline run for its address
        logger.info("W&B: %s", f"offline, in {self._run.dir}" if offline else self._run.url)

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Send the metrics of a step (None is left out)."""
        if self._run is not None:
            values = {name: value for name, value in metrics.items() if value is not None}
            self._attempt("log", lambda: self._run.log(values, step=step))

    def summarise(self, values: Mapping[str, float]) -> None:
        """Put numbers that belong to no step into the run's summary."""
        if self._run is not None:
            self._attempt("summarise", lambda: self._run.summary.update(dict(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table of texts and numbers."""
        if self._run is not None:
            import wandb  # see __init__

            content = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._attempt("add a table", lambda: self._run.log({name: content}))

    def plot(
        self, name: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], axes: tuple[str, str]
    ) -> None:
        """Add a plot of curves: name in the legend -> points (x, y); `axes` say what x and y are."""
        if self._run is not None and curves:
            import wandb  # see __init__

            def draw() -> None:
                chart = wandb.plot.line_series(
                    xs=[list(x) for x, _ in curves.values()],
                    ys=[list(y) for _, y in curves.values()],
                    keys=list(curves),
                    title=f"{name}: {axes[1]}",
                    xname=axes[0],
                )
                self._run.log({name: chart})

            self._attempt("add a plot", draw)

    def images(self, name: str, pictures: Sequence[tuple[NDArray[np.uint8], str]]) -> None:
        """Add pictures [H, W] or [H, W, 3] with captions; nothing without `monitor.share_samples`."""
        if self._run is not None and self._shares and pictures:
            import wandb  # see __init__

            def show() -> None:
                self._run.log({name: [wandb.Image(pixels, caption=said) for pixels, said in pictures]})

            self._attempt("add images", show)

    def texts(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table of what is written in or about samples; nothing without `monitor.share_samples`."""
        if self._shares:
            self.table(name, columns, rows)

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell the people who watch the run, with `monitor.alerts`; `text` names no sample."""
        if self._run is not None and self._alerts:
            self._attempt("alert", lambda: self._run.alert(title, text, level="WARN"))

    def finish(self) -> None:
        """Send what is left, for at most `FINISH_TIMEOUT` seconds."""
        if self._run is not None:
            self._attempt("finish", self._run.finish)
            self._run = None

    def _attempt(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # see __init__
            logger.warning("W&B could not %s (%s); the run goes on without it", what, error)
            self._run = None


def known_id(run_dir: Path, saved: str | None) -> str | None:
    """The id of a folder's W&B run: its own note's, else its checkpoint's, else that of a note of before."""
    known, folder = _noted(run_dir)
    return known if folder == str(run_dir.resolve()) else saved or known


def _noted(run_dir: Path) -> tuple[str | None, str]:
    """The id that an earlier start noted, and for which folder ("": not said, by a version of before)."""
    try:
        with (run_dir / ID_FILE).open(encoding="utf-8", errors="surrogateescape") as file:
            known, _, folder = file.read(_NOTE_CHARACTERS).strip().partition("\n")
    except (OSError, ValueError):
        return None, ""
    return (known, folder) if _ID.fullmatch(known) else (None, "")


def _own_id(run_dir: Path, saved: str | None) -> str:
    """The id to train under, noted for the next start: a new one in a first start and in a copy of a run.

    A copy has another folder than the note says, where the noted one still has that run; a folder that was
    moved takes its run along.
    """
    own = str(run_dir.resolve())
    known, folder = _noted(run_dir)
    is_copy = folder not in ("", own) and _noted(Path(folder)) == (known, folder)
    if is_copy and not run_dir.samefile(folder):  # one folder may be mounted twice
        logger.warning("%s is a copy of %s, to which its W&B run belongs: it gets a new one", run_dir, folder)
        run_id = secrets.token_hex(4)
    else:
        run_id = known_id(run_dir, saved) or secrets.token_hex(4)
    if (run_id, own) != (known, folder):
        path = run_dir / ID_FILE
        try:
            path.write_text(f"{run_id}\n{own}\n", encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            logger.warning("cannot note the W&B run in %s: %s", path, error.strerror or error)
    return run_id


def _settings() -> Any:
    import wandb  # see WandbRun

    timeout = float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT))
    return wandb.Settings(
        init_timeout=timeout,
        login_timeout=timeout,
        finish_timeout=FINISH_TIMEOUT,
        console="off",
        disable_code=True,
        disable_git=True,
        silent=True,
    )
