"""`medvlp prototypes ...`: what the commands print, and how they end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import pytest
from typer.testing import CliRunner, Result

from launcher.main import app
from medvlp.serving.client import RemoteError
from medvlp.serving.cluster_report import Members
from medvlp.serving.layout import ADDRESS, REPORT, SNAPSHOT, TOKEN, PrototypeFilesError, folder_of
from medvlp.serving.questions import RequestError, UnknownClusterError
from medvlp.serving.server import PrototypeServer
from medvlp.serving.snapshot import Snapshot
from shards.errors import MedvlpError, UsageError
from shards.reader import ShardReader
from tests.serving.conftest import TOKEN as SECRET


def medvlp(*arguments: object) -> Result:
    """Run a command; an error meant for the user is left in `result.exception`."""
    return CliRunner().invoke(app, ["prototypes", *map(str, arguments)])


def test_build_gallery_and_export(saved: Path, tmp_path: Path) -> None:
    run = shutil.copytree(saved, tmp_path / "run", ignore=shutil.ignore_patterns("prototypes"))
    result = medvlp("build", run, "--limit", 6, "--clusters", 2)
    assert result.exit_code == 0, result.exception
    assert result.stdout.strip() == str(folder_of(run))
    assert json.loads((folder_of(run) / REPORT).read_text())["samples"] == 6
    result = medvlp("gallery", run, "--images", 3)
    assert result.exit_code == 0, result.exception
    assert Path(result.stdout.strip()).is_file()
    for more, rows in (((), 2), (("--samples", "report"), 6)):
        assert medvlp("export", run, tmp_path / "out.faiss", *more).exit_code == 0
        assert faiss.read_index(str(tmp_path / "out.faiss")).ntotal == rows
    assert isinstance(medvlp("export", run, tmp_path / "x", "--samples", "text").exception, UsageError)


@pytest.fixture
def served(run: Path, start: Callable[..., PrototypeServer]) -> Path:
    """A run whose server runs in this process."""
    server = start()
    server.describe(folder_of(run), run)
    (folder_of(run) / TOKEN).write_text(SECRET)
    (folder_of(run) / TOKEN).chmod(0o600)
    return run


def test_a_server_and_the_files_tell_the_same(
    served: Path, snapshot: Snapshot, data: Path, tmp_path: Path
) -> None:
    film = tmp_path / "film.jpg"
    film.write_bytes(ShardReader(data).image("train", int(snapshot.sample[0])))
    largest = int(Members.of(snapshot).images.argmax())
    address = json.loads((folder_of(served) / ADDRESS).read_text())["address"]
    remote = ("--server", address, "--token-file", folder_of(served) / TOKEN)
    for question in (
        ("nearest", "--text", "Left pleural effusion.", "--clusters", 3),
        ("nearest", "--image", film),
        ("clusters",),
        ("cluster", largest),
    ):
        answers = [
            medvlp(*question, *whom) for whom in (("--run", served), ("--run", served, "--offline"), remote)
        ]
        assert {answer.exit_code for answer in answers} == {0}, answers[0].exception
        assert len({answer.stdout for answer in answers}) == 1
    assert snapshot.key_of(0) in medvlp("nearest", "--image", film, "--run", served).stdout
    assert snapshot.key_of(int(Members.of(snapshot).rows(largest)[0])) in answers[0].stdout
    (folder_of(served) / ADDRESS).unlink()
    assert medvlp("cluster", largest, "--run", served).stdout == answers[0].stdout


def test_keys_in_brackets_are_shown_as_they_are(
    built: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were taken for markup: left out, or an error."""
    largest = int(Members.of(snapshot).images.argmax())
    monkeypatch.setattr(Snapshot, "key_of", lambda self, row: "a[/x][red]")
    for question in (("nearest", "--text", "Clear lungs."), ("cluster", largest)):
        result = medvlp(*question, "--run", built, "--offline")
        assert result.exit_code == 0, result.exception
        assert "a[/x][red]" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message", "code"),
    [
        (("clusters",), UsageError, "say whom to ask", 2),
        (("clusters", "--offline"), UsageError, "say whom to ask", 2),
        (("clusters", "--offline", "--server", "x:1"), UsageError, "has no part in it", 2),
        (("clusters", "--server", "x:1"), UsageError, "needs --token-file", 2),
        (("nearest", "--run", "RUN"), UsageError, "either --text or --image", 2),
        (("nearest", "--run", "RUN", "--image", "missing.png"), UsageError, "missing.png", 2),
        (("cluster", "99", "--run", "RUN", "--offline"), UnknownClusterError, "from 0 to 7", 2),
        (("nearest", "--run", "RUN", "--offline", "--text", ""), RequestError, "no words", 2),
        (("nearest", "--run", "RUN", "--offline", "--text", "\udce9p"), RequestError, "is not UTF-8", 2),
        (("nearest", "--run", "RUN", "--text", "\udce9p"), RequestError, "is not UTF-8", 2),
        (("cluster", "99", "--run", "RUN"), RemoteError, "(NOT_FOUND): there is no cluster 99", 11),
        (("clusters", "--run", "missing"), PrototypeFilesError, "medvlp prototypes build", 4),
        (("clusters", "--server", "192.0.2.1:1", "--token-file", "TOKEN"), UsageError, "--tls-ca", 2),
        (("clusters", "--run", "RUN", "--insecure-network"), UsageError, "is for a --server", 2),
        (("serve", "RUN", "--host", "0.0.0.0"), UsageError, "--insecure-network", 2),
        (("gallery", "missing"), PrototypeFilesError, "medvlp prototypes build", 4),
    ],
)
def test_errors_say_what_to_do(
    arguments: tuple[str, ...], error: type[MedvlpError], message: str, code: int, served: Path
) -> None:
    words = {"RUN": served, "TOKEN": folder_of(served) / TOKEN}
    result = medvlp(*(words.get(word, word) for word in arguments))
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert result.exception.exit_code == code


def test_a_server_that_is_gone_is_told_from_one_that_refuses(served: Path) -> None:
    (folder_of(served) / TOKEN).write_text("another-token-of-the-right-length")
    assert "UNAUTHENTICATED" in str(medvlp("clusters", "--run", served).exception)
    content = json.loads((folder_of(served) / ADDRESS).read_text())
    (folder_of(served) / ADDRESS).write_text(json.dumps(content | {"address": "127.0.0.1:1"}))
    assert "--offline" in str(medvlp("clusters", "--run", served).exception)
    (folder_of(served) / ADDRESS).write_text(json.dumps(content | {"tls": True}))
    assert "--tls-ca" in str(medvlp("clusters", "--run", served).exception)


def test_offline_questions_need_no_protobuf(built: Path) -> None:
    """Neither gRPC nor protobuf can be imported in that process."""
    offline = ["--run", str(built), "--offline"]
    questions = [["clusters"], ["cluster", "1"], ["nearest", "--text", "Clear lungs."]]
    program = (
        "import sys\n"
        "for name in ('grpc', 'google.protobuf', 'medvlp.serving.wire', 'medvlp.serving.messages'):\n"
        "    sys.modules[name] = None\n"
        "from launcher.main import app\n"
        f"for question in {questions}:\n"
        f"    app(['prototypes', *question, *{offline}], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(medvlp(*question, *offline).stdout for question in questions)


def test_texts_need_the_checkpoint_and_clusters_do_not(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert medvlp("clusters", "--run", run).exit_code == 0
    assert "make them anew" in str(medvlp("nearest", "--run", run, "--text", "effusion").exception)
    assert (folder_of(run) / SNAPSHOT).is_file()
