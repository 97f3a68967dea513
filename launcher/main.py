"""The `medvlp` command. Each group of commands is one file under `launcher/commands/`."""

import gc
import sys
from contextlib import suppress
from typing import NoReturn

import typer
from rich.markup import escape

from launcher.command_words import CommandGroup
from launcher.commands import (
    attempt,
    checkpoints,
    doctor,
    evaluate,
    export,
    finetune,
    import_,
    jobs,
    predict,
    pretrain,
    prototypes,
    report,
    resume,
    runs,
    shards,
    submit,
    submit_evaluate,
    submit_prototypes,
    submit_shards,
)
from launcher.console import Console
from medvlp.lifetime import end_within
from shards.errors import MedvlpError

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's boxes leave three words a line to the options on 80 columns
    help="Pre-train medical vision-language models on image-report pairs.",
)
app.add_typer(shards.app, name="shards")
app.add_typer(prototypes.app, name="prototypes")
app.command("config")(pretrain.config)
app.command("pretrain")(pretrain.pretrain)
app.command("finetune")(finetune.finetune)
app.add_typer(submit.app, name="submit")
submit.app.command("shards", context_settings=submit_shards.SETTINGS)(submit_shards.shards)
submit.app.command("evaluate")(submit_evaluate.evaluate)
submit.app.command("prototypes", context_settings=submit_prototypes.SETTINGS)(submit_prototypes.prototypes)
app.command("jobs")(jobs.jobs)
app.command("logs")(jobs.logs)
app.command("cancel")(jobs.cancel)
app.command("resume", context_settings=resume.SETTINGS)(resume.resume)
app.command("runs")(runs.runs)
app.add_typer(attempt.app, name="attempt", hidden=True)
app.command("evaluate", cls=evaluate.EvaluateCommand)(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("report")(report.report)
app.command("export")(export.export)
app.add_typer(import_.app, name="import")
app.command("predict")(predict.predict)
app.command("embed")(predict.embed)
app.command("checkpoints")(checkpoints.checkpoints)
app.command("doctor")(doctor.doctor)
# The parts of `medvlp doctor` that srun starts.
app.command("doctor-node", hidden=True)(doctor.doctor_node)
app.command("doctor-summary", hidden=True)(doctor.doctor_summary)
app.command("doctor-rank", hidden=True)(doctor.doctor_rank)


#: Seconds a command gets to end after its error; what is open then may wait for a dead disk or peer.
_CLOSING_SECONDS = 30.0


def run() -> NoReturn:
    """Run the command; an error meant for the user becomes one line and its documented exit code."""
    try:
        app()
    except (MedvlpError, RuntimeError) as error:
        known = _known(error)
        if known is None:
            end_within(_CLOSING_SECONDS, MedvlpError.exit_code)
            raise
        end_within(_CLOSING_SECONDS, known.exit_code)
        with suppress(OSError):  # a log on a full disk must not change the exit code
            Console(stderr=True, soft_wrap=True).print(
                f"[red]error:[/] {escape(str(known))}", highlight=False
            )
        sys.exit(known.exit_code)
    finally:
        # Else Python's last garbage collection spends ten seconds of a busy machine in the modules of torch.
        gc.freeze()
    sys.exit(0)


def _known(error: MedvlpError | RuntimeError) -> MedvlpError | None:
    """An error meant for the user, or what `DataLoader` says of a dead worker in words only."""
    if isinstance(error, MedvlpError):
        return error
    workers = sys.modules.get("medvlp.data.workers")  # its import takes seconds
    return None if workers is None else workers.worker_death(error)


if __name__ == "__main__":
    run()
