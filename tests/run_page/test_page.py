"""`medvlp report`: what the page says, what it must not hold, that it stands alone and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
from typer.testing import CliRunner

import medvlp
from launcher.main import app
from medvlp.evaluation.report import results, scores
from medvlp.evaluation.task import Scores
from medvlp.run_page import collect, history, samples
from medvlp.run_page.charts import line_chart
from medvlp.run_page.page import results_parts
from medvlp.runs.errors import RunFolderError
from medvlp.runs.manifest import Manifest
from medvlp.runs.state_files import checksum
from shards.errors import MedvlpError, UsageError
from shards.reader import ShardReader
from tests.evaluation.report.test_results import of_texts
from tests.export.saved import save_run
from tests.run_page.made import Page, add_clusters, add_examples, invoke, made_scores

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
#: Attributes with which a page would load something.
_LOADS = ("src", "href", "xlink:href", "action", "data", "srcset", "poster")


@pytest.fixture(scope="module")
def run(make: Callable[..., Path], data: Path) -> Path:
    made = make("first", 0.75)
    add_examples(made, data)
    add_clusters(made)
    return made


@pytest.fixture(scope="module")
def html(run: Path) -> Path:
    out = run.parent / "report.html"
    result = invoke(run, "--out", out, "--samples", 2)
    assert result.exit_code == 0, result.exception
    return out


def test_it_says_what_the_run_is(html: Path) -> None:
    page = Page(html.read_text())
    text = " ".join(page.text.split())
    for told in (
        "method mgca", "test_vit", "evaluated at step 3", "AUROC macro 0.750 (0.65–0.85) 0.500",
        "AUROC edema 0.250", "Restarts after step 12, 20", "resume 2", "data.max_tokens 12", "torch 9.9",
        "loss/word", "F1 and accuracy at the threshold", "Nearest report",
    ):  # fmt: skip
        assert told in text, told
    for told in (
        "ROC, mean over findings", "mass: Precision and recall", "No calibration",
        "edema 1 1 0 2 0.500 1.000 1 ", "sensitivity",
    ):  # fmt: skip
        assert told in text, told
    drawn = sum(tag == "svg" for tag, _ in page.tags)
    assert drawn == 2 + 6 + 1, "losses, learning rate, two kinds of curves, NMI"
    assert "secret-host" not in text
    assert len(html.read_bytes()) < 5e6


def test_it_stands_alone(html: Path) -> None:
    page = Page(html.read_text())
    assert not {"link", "iframe", "object", "form", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), tag
            if name in _LOADS:
                assert (value or "").startswith(("#", "data:image/jpeg;base64,")), (tag, name)
    assert "http" not in re.sub(r"http-equiv|http://www\.w3\.org/\S+", "", html.read_text())


def test_people_who_do_not_see_it_can_read_it(html: Path) -> None:
    page = Page(html.read_text())
    named = [attributes.get("id") for _, attributes in page.tags if attributes.get("id")]
    assert len(named) == len(set(named))
    links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a" and attributes.get("href")]
    assert links
    assert set(links) <= set(named)
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_runs_stand_beside_each_other(run: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    other = make("second", 0.5, "method.embedding=16")
    assert invoke(run, other, "--out", tmp_path / "a.html", "--samples", 0).exit_code == 0
    text = " ".join(Page((tmp_path / "a.html").read_text()).text.split())
    assert "AUROC macro 0.750 (0.65–0.85) 0.500 (0.40–0.60) 0.500" in text
    assert "method.embedding 8 16" in text
    assert "data.max_tokens" not in text, "a key with one value in both"
    assert "first: loss/word" in text
    result = invoke(run, run, run, "--out", tmp_path / "b.html", "--samples", 0)
    assert isinstance(result.exception, UsageError)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """Of three folders runs/x the page was refused after all was computed."""
    taken: set[str] = set()
    for parent in ("a/runs", "b/runs", "c/runs", "a/other"):
        history_name = collect._told_apart("x", tmp_path / parent / "x", taken)
        assert history_name not in taken
        taken.add(history_name)
    assert taken == {"x", "x (runs/x)", "x (c/runs/x)", "x (other/x)"}
    assert collect._told_apart("x", Path("/x"), taken) == "x (/x)"


def test_retrieval_among_other_texts_stands_in_a_part_of_its_own(tmp_path: Path) -> None:
    known = {
        name: (tmp_path, of_texts("retrieval", sections))
        for name, sections in (("one", ["findings", "impression"]), ("two", ["findings"]))
    }
    found = [(part.task, part.runs, part.tables[0].remarks) for part in results_parts(known)]
    count = "402 queries, 402 distinct reports"
    other = "retrieval of two: in a table of its own, for it was measured with other data.sections than one"
    assert found[:2] == [("retrieval", ["one"], [count]), ("retrieval", ["two"], [count, other])]
    assert [(task, runs) for task, runs, _ in found[2:]] == [("zero-shot", ["one", "two"])]


def test_curves_say_why_they_are_not_there(run: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    other = make("bare", 0.5)
    shutil.rmtree(other / results.FOLDER)
    assert invoke(run, other, "--out", tmp_path / "a.html", "--samples", 0).exit_code == 0
    text = " ".join(Page((tmp_path / "a.html").read_text()).text.split())
    assert "bare: no curves" in text
    assert str(other) not in text, "a place of the machine"
    assert "ROC, mean over findings" in text
    found = results.read(other / "evaluation.json")
    found.scores = {}
    results.write(found, other / "evaluation.json")
    assert invoke(other, "--out", tmp_path / "b.html", "--samples", 0).exit_code == 0
    text = (tmp_path / "b.html").read_text()
    assert "bare: no curves: zero-shot, whole: no scores are stored (evaluate again with --fresh)" in text
    assert "ROC, mean" not in text


def test_curves_of_two_runs_are_over_what_both_have(
    run: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    other = make("narrow", 0.5)
    kept, of = made_scores(), results.read(other / "evaluation.json")
    one = Scores(kept.sample, ["mass"], kept.truth[:, 1:], {"trained": kept.models["trained"][:, 1:]})
    of.scores["zero-shot"]["whole"].checksum = scores.write(one, next(other.glob("evaluation-units/*/*")))
    results.write(of, other / "evaluation.json")
    assert invoke(run, other, "--out", tmp_path / "a.html", "--samples", 0).exit_code == 0
    text = " ".join(Page((tmp_path / "a.html").read_text()).text.split())
    assert "Curves over the findings that all runs have: mass." in text
    assert "edema: ROC" not in text
    assert "mass: ROC" in text
    assert "ROC, mean over findings" in text


def test_samples_of_patients_need_a_word(run: Path, data: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    shutil.copytree(data, real)
    index = json.loads((real / "index.json").read_text())
    index["arguments"]["source"]["name"] = "archive"
    (real / "index.json").write_text(json.dumps(index))
    result = invoke(run, "--out", tmp_path / "a.html", "--data", real)
    assert result.exit_code == 0, result.exception
    assert "only with --include-samples" in " ".join(result.output.split())
    page = (tmp_path / "a.html").read_text()
    assert "data:image" not in page
    assert ShardReader(data).metadata("test", 0)["sentences"][0] not in page
    invoke(run, "--out", tmp_path / "b.html", "--data", real, "--include-samples", "--samples", 1)
    assert "data:image/jpeg" in (tmp_path / "b.html").read_text()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"checkpoint": "step-00000009"}, "the evaluated checkpoint is gone"),
        ({"checkpoint": "../checkpoints/step-00000003"}, "the evaluated checkpoint is gone"),
        ({"weights": "0" * 32}, "step-00000003 holds other weights than were evaluated"),
        ({"weights": ""}, ""),  # a file of before
    ],
)
def test_samples_are_of_the_weights_that_were_evaluated(
    changed: dict[str, str], told: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    run = make("again", 0.5)
    evaluation = results.read(run / "evaluation.json")
    evaluation.model |= changed
    results.write(evaluation, run / "evaluation.json")
    result = invoke(run, "--out", tmp_path / "a.html", "--samples", 1)
    assert result.exit_code == 0, result.exception
    text = (tmp_path / "a.html").read_text()
    assert told in text
    assert ("data:image" in text) == (not told)


def test_a_network_that_has_diverged_has_no_samples(make: Callable[..., Path], tmp_path: Path) -> None:
    run = make("diverged", 0.5)
    folder = run / "checkpoints" / "step-00000003"
    file, manifest = folder / "weights.safetensors", Manifest.read(folder)
    weights = {name: value * float("nan") if value.is_floating_point() else value
               for name, value in safetensors.torch.load_file(file).items()}  # fmt: skip
    safetensors.torch.save_file(weights, file)
    manifest.files[file.name]["xxh3_128"] = checksum(file)
    (folder / "manifest.json").write_text(manifest.to_json())
    evaluation = results.read(run / "evaluation.json")
    evaluation.model["weights"] = checksum(file)
    results.write(evaluation, run / "evaluation.json")
    result = invoke(run, "--out", tmp_path / "a.html", "--samples", 1)
    assert result.exit_code == 0, result.exception
    assert "are NaN or infinite" in (tmp_path / "a.html").read_text()


def test_a_report_that_the_model_does_not_read_takes_no_other_off_the_page(
    data: Path, tmp_path: Path
) -> None:
    """Of a report of one word the cleaning of MGCA leaves nothing, which ended the search among all."""
    short = tmp_path / "data"
    shutil.copytree(data, short, ignore=shutil.ignore_patterns("tokens"))
    reader = ShardReader(short)
    shard, _, members = reader._members("test", 0)
    start, size = members["json"]
    content = bytearray((short / shard.file).read_bytes())
    metadata = bytes(content[start : start + size])
    for text in filter(None, reader.metadata("test", 0)["sections"].values()):
        stored = json.dumps(text).encode()
        assert stored in metadata
        metadata = metadata.replace(stored, json.dumps("x".ljust(len(stored) - 2)).encode())
    content[start : start + size] = metadata
    (short / shard.file).write_bytes(content)
    save_run(data, tmp_path / "run", "data.cleaning=mgca", "data.sections=[findings]")
    dataset = medvlp.open_dataset(short, "test")
    dataset.label_names.append("Other")  # which has no prompts
    shown = samples.shown_samples(medvlp.load(tmp_path / "run", "cpu"), dataset, len(dataset))
    by_key = {one.key: one for one in shown}
    assert len(by_key) == len(dataset) > 1
    assert all(one.picture and one.nearest and one.scores for one in shown)
    assert by_key.pop(dataset[0].key).rank is None
    assert all(one.rank and one.rank <= one.among == len(dataset) - 1 for one in by_key.values())


_HUGE = 10**400


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("metrics.jsonl", {"step": 30, "loss": _HUGE}),
        ("metrics.jsonl", {"step": _HUGE, "loss": 1.0}),
        ("metrics.jsonl", {"step": 30, "loss": 1.7e308}),
        ("events.jsonl", {"kind": "resume", "step": _HUGE}),
        ("identity.json", {"data": None}),
        ("identity.json", {"data": [], "origin": "x"}),
        ("identity.json", {"data": [{"name": "phantom", "licences": None}]}),
        ("evaluation.json", {"model": {"step": "x"}}),
        ("evaluation.json", {"model": {"step": None}}),
        ("evaluation.json", {"model": {"step": _HUGE}}),
        ("evaluation.json", {"model": {"weights": ["x"]}}),
        ("evaluation.json", {"data": {"name": None}}),
        ("evaluation.json", {"notes": {"zero-shot": {"not_evaluable": ["x"]}}}),
        ("evaluation.json", {"notes": {"zero-shot": {"not_evaluable": 1}}}),
    ],
)
def test_malformed_files_of_strangers_are_one_line(
    name: str, changed: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    """Each was a traceback."""
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / name
    if name.endswith(".jsonl"):
        file.write_text(file.read_text() + "\n" + json.dumps(changed) + "\n")
    else:
        content = json.loads(file.read_text()) if file.is_file() else {}
        for section, values in changed.items():
            content[section] = content[section] | values if section in content else values
        file.write_text(json.dumps(content))
    made = [invoke(copy, "--out", tmp_path / "a.html", "--samples", 0)]
    if name == "evaluation.json":
        made.append(CliRunner().invoke(app, ["export", str(copy), "--out", str(tmp_path / "out")]))
        assert made[0].exception is not None
    for result in made:
        assert result.exit_code == 0 or isinstance(result.exception, MedvlpError), result.exception
        assert "\n" not in str(result.exception)


def test_names_of_strangers_are_text(make: Callable[..., Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = make("evil", 0.5, f"run.name={evil}", f"data.split={evil}")
    assert invoke(run, "--out", tmp_path / "a.html", "--samples", 0).exit_code == 0
    page = Page((tmp_path / "a.html").read_text())
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert evil in page.text
    chart = line_chart(evil, {evil: ([0, 1], [0, 1]), "$x^{": ([0, 1], [1, 0])})
    assert "<script" not in chart
    assert "#ffffff" not in chart, "its ground is the page's, also in the dark"
    assert "$x^{" in chart


def test_places_of_the_machine_are_not_told(make: Callable[..., Path], tmp_path: Path) -> None:
    run = make("here", 0.5, "monitor.project=/secret/place/project", "monitor.group=local-dir:/secret/a")
    (run / "evaluation.json").unlink()
    assert invoke(run, "--out", tmp_path / "a.html").exit_code == 0
    text = (tmp_path / "a.html").read_text()
    assert "not evaluated" in text
    assert "…/project" in text
    assert "local-dir:…/a" in text
    assert "secret" not in text
    assert str(run.parent) not in text
    assert history.without_places("https://host/a/b models/c.pth") == "https://host/a/b models/c.pth"


def test_long_curves_are_thinned_and_what_is_no_run_is_refused(tmp_path: Path) -> None:
    lines = (
        json.dumps({"step": step, "loss": float(step), "text": "x", "bad": None}) for step in range(5000)
    )
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(RunFolderError, match="no run folder"):
        history.read_history(tmp_path)
    (tmp_path / "config.yaml").write_text("method: {name: mgca}\n")
    found = history.read_history(tmp_path)
    assert list(found.curves) == ["loss"]
    steps, values = found.curves["loss"]
    assert len(steps) <= history.POINTS
    assert steps[-1] == values[-1] == 4999
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(RunFolderError, match="cannot be read"):
        history.read_history(tmp_path)


def test_the_demo_ends_with_the_path_of_a_page(repository: Path) -> None:
    lines = (repository / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0].splitlines()
    assert lines[-1].split()[1:3] == ["report", "$(DEMO)/run"]
    assert any(line.split()[1:3] == ["prototypes", "build"] for line in lines[1:-1]), "its page has clusters"


#: Presses the head of the second column of the first folded table twice, and says what stands where.
_PRESS = """() => {
  const table = document.querySelector("details table"), order = [];
  for (const part of document.querySelectorAll("details")) part.open = true;
  for (let press = 0; press < 2; press++) {
    table.querySelectorAll("th button")[1].click();
    order.push(Array.from(table.tBodies[0].rows, (row) => row.cells[0].textContent).join("+"));
  }
  return order;
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian's package chromium)")
def test_it_works_in_a_browser(html: Path, run: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    """On a screen in light, on a phone in dark: it sorts, fits, loads nothing, and axe finds nothing."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    both = tmp_path / "both.html"
    assert invoke(run, make("other", 0.5), "--out", both, "--samples", 0).exit_code == 0
    said: list[str] = []
    with sync_playwright() as playwright:
        # No limits of its own: a busy machine may take minutes, and pytest ends what hangs.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=0)
        looks: list[tuple[Path, int, Literal["light", "dark"]]] = [
            (html, 1280, "light"), (html, 390, "dark"), (both, 390, "light"),
        ]  # fmt: skip
        for file, width, scheme in looks:
            page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.set_default_timeout(0)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: said.append(request.url) if "://" in request.url else None)
            page.goto(file.as_uri())
            assert said == [file.as_uri()], "it loads nothing and complains of nothing"
            order = page.evaluate(_PRESS)
            assert order == ["AUROC mass+AUROC edema", "AUROC edema+AUROC mass"]
            assert not page.evaluate("document.documentElement.scrollWidth > innerWidth"), "scrolls sideways"
            found = Axe().run(page).response["violations"]
            assert [(of["impact"], of["id"], of["nodes"][0]["html"]) for of in found] == []
            page.close()
            said.clear()
        chromium.close()
