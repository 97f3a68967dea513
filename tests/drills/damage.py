"""Every file of a checkpoint truncated, bit-flipped and deleted: never loaded, the one before is used."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.errors import CheckpointError
from medvlp.runs.manifest import step_folder
from tests.drills.outcomes import Case, DrillError, expect
from tests.drills.process import medvlp, read_lines
from tests.drills.workplace import SAVE_EVERY, STEPS, Workplace


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "bit-flipped": _flip,
    "deleted": Path.unlink,
}

#: Damages with which a run is really started again.
RESUMED = [
    ("truncated", "weights.safetensors"), ("bit-flipped", "optimizer/rank-00001.safetensors"),
    ("deleted", "ranks/rank-00000.pt"),
]  # fmt: skip

NEWEST, BEFORE = step_folder(STEPS), step_folder(STEPS - SAVE_EVERY)


def cases(place: Workplace) -> list[Case]:
    """Damages to copies of the last two checkpoints of the uninterrupted run."""
    return [
        *(Case("damage", f"each file {damage}", partial(_every_file, place, damage)) for damage in DAMAGES),
        *(
            Case("damage", f"resume, {name} {damage}", partial(_resume, place, damage, name))
            for damage, name in RESUMED
        ),
        Case("damage", "no checkpoint is good", partial(_none_good, place)),
    ]


def _copy(place: Workplace, name: str) -> Path:
    """A run folder with the last two checkpoints."""
    run = place.folder / "damage" / name
    shutil.rmtree(run, ignore_errors=True)
    keep = {NEWEST, BEFORE}
    shutil.copytree(
        place.whole_folder,
        run,
        ignore=lambda _, names: [n for n in names if n.startswith("step-") and n not in keep],
    )
    return run


def _files(run: Path) -> list[str]:
    folder = run / "checkpoints" / NEWEST
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _every_file(place: Workplace, damage: str) -> str:
    names = _files(place.whole_folder)
    expect(len(names) == 6, f"a checkpoint of two ranks has six files, this one {names}")
    for name in names:
        run = _copy(place, f"file-{damage}")
        DAMAGES[damage](run / "checkpoints" / NEWEST / name)
        with _Warnings() as warnings:
            found = Checkpoint.find(run)
        texts = [text for text in warnings.texts if str(run) in text]  # other drills run at the same time
        expect(found is not None and found.name == BEFORE, f"{name} {damage}: {found} would be loaded")
        expect(
            len(texts) == 1 and NEWEST in texts[0] and Path(name).name in texts[0],
            f"{name} {damage}: the message does not name it: {texts}",
        )
    listed = medvlp("checkpoints", str(run), "--verify")
    expect(listed.returncode == 4, f"medvlp checkpoints --verify ended with code {listed.returncode}")
    count = len(names)
    return f"{count} of {count} files: named, {BEFORE} used instead; `checkpoints --verify` ends with code 4"


class _Warnings(logging.Handler):
    """Collects what is said about checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        logging.getLogger("medvlp").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("medvlp").removeHandler(self)


def _resume(place: Workplace, damage: str, name: str) -> str:
    run = _copy(place, f"resumed-{damage}")
    DAMAGES[damage](run / "checkpoints" / NEWEST / name)
    with place.start(run) as process:
        process.finish()
        text = process.output()
    expect(f"checkpoint {NEWEST} is not used: " in text, f"no message about it: {text[-300:]}")
    last = [event for event in read_lines(run / "events.jsonl") if event["kind"] == "resume"][-1]
    expect(last["step"] == STEPS - SAVE_EVERY, f"it went on after step {last['step']}")
    place.compare(run)
    return f"went on from {BEFORE}, made {NEWEST} again, bit-identical"


def _none_good(place: Workplace) -> str:
    run = _copy(place, "none")
    for step in (NEWEST, BEFORE):
        _flip(run / "checkpoints" / step / "weights.safetensors")
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    with place.start(run) as process:
        code, text = process.end(), process.output()
    expect(code == 4, f"ended with code {code}: {text[-300:]}")
    expect("none is good" in text and "nothing was changed" in text, f"unclear: {text[-300:]}")
    expect(" step 1/" not in text, "it started anew")
    after = sorted(path.name for path in (run / "checkpoints").iterdir())
    expect(before == after, f"checkpoints were changed: {after}")
    try:
        Checkpoint.find(run)
    except CheckpointError:
        return "code 4, no new start, nothing changed"
    raise DrillError("a damaged checkpoint would be loaded")
