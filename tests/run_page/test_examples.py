"""Overlays, boxes, generated reports and clusters on the page, and where it says why there are none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medvlp.evaluation.examples import Box, BoxExample
from medvlp.evaluation.report import results
from medvlp.evaluation.report.pictures import SAID, TRUE, box_picture, mask_picture, seen_image
from medvlp.run_page import examples
from medvlp.serving.layout import SNAPSHOT, folder_of
from shards.reader import ShardReader
from tests.run_page.made import UNIT, Page, add_clusters, add_examples, invoke


@pytest.fixture(scope="module")
def run(make: Callable[..., Path], data: Path) -> Path:
    made = make("first", 0.75)
    add_examples(made, data)
    add_clusters(made)
    return made


def page_of(run: Path, out: Path, *more: object) -> tuple[Page, str]:
    """The page of a run, and its text with single spaces."""
    result = invoke(run, "--out", out, *more)
    assert result.exit_code == 0, result.exception
    page = Page(out.read_text())
    return page, " ".join(page.text.split())


def patients(data: Path, folder: Path) -> Path:
    """The same data, said to be no phantoms."""
    shutil.copytree(data, folder)
    index = json.loads((folder / "index.json").read_text())
    index["arguments"]["source"]["name"] = "archive"
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_examples_stand_under_their_tasks(run: Path, data: Path, tmp_path: Path) -> None:
    page, text = page_of(run, tmp_path / "a.html")
    alts = [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img"]
    key = ShardReader(data).key("test", 0)
    assert f"Sample {key}, mass, true mask: 0.0% of the image" in alts
    assert sum("predicted mask" in alt for alt in alts) == 2
    assert sum("True (solid)" in alt for alt in alts) == 1
    for told in (
        "Dice 0.", " (a) Found (broken): ", "Found (broken): mass 0.75 (1)",
        "mass: known not to be there; 0.0% of the image called",
        f"The first ones. Of {UNIT}.", "Findings stated as present in both: none",
        "only in the generated report: none", "only in the true report: pleural effusion",
    ):  # fmt: skip
        assert told in text, told
    marks = (tmp_path / "a.html").read_text()
    assert '<mark class="absent">effusion<span class="heard"> (absent)</span></mark>' in marks
    assert '<mark class="uncertain">edema<span class="heard"> (uncertain)</span></mark>' in marks
    assert '<mark class="present">effusion<span class="heard"> (present)</span></mark>' in marks
    assert "No examples" not in text


def test_the_findings_of_both_reports_are_compared(run: Path, data: Path) -> None:
    names = list(ShardReader(data).index.label_names)
    example = examples.TextExample(0, "small left pleural effusion . <b>", "edema . pleural effusion .")
    written = examples._texts(example, names)
    said = dict(part.split(": ") for part in written.compared.split("; "))
    assert said == {
        "stated as present in both": "pleural effusion",
        "only in the generated report": "none",
        "only in the true report": "edema",
    }
    assert "<b>" not in written.generated
    assert "&lt;b&gt;" in written.generated


def test_clusters_have_a_gallery_and_nmi_over_refreshes(run: Path, tmp_path: Path) -> None:
    page, text = page_of(run, tmp_path / "a.html")
    assert "clusters and findings, by refresh" in text
    assert "2 clusters (kmeans) of step-00000003" in text
    assert "NMI with sets of findings 0." in text
    assert 1 <= len(re.findall(r"Cluster \d : \d+ images", text)) <= 2
    small = [attributes for tag, attributes in page.tags if attributes.get("class") == "picture small"]
    assert 2 <= len(small) <= 12
    charts = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert "clusters and findings, by refresh" in charts
    assert not any("prototypes" in (chart or "") for chart in charts), "NMI is drawn once"


def test_an_evaluation_of_before_and_a_run_without_clusters_say_why_there_are_none(
    make: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    old = make("old", 0.5)
    add_examples(old, data)
    evaluation = results.read(old / "evaluation.json")
    evaluation.examples = {}
    results.write(evaluation, old / "evaluation.json")
    _, text = page_of(old, tmp_path / "a.html")
    for task in ("segmentation", "detection", "report"):
        assert f"No examples: {task}, whole: no examples are stored: it was evaluated by a version" in text
    assert (
        "No gallery: …/prototypes.safetensors does not exist; make it with: medvlp prototypes build" in text
    )
    (old / "metrics.jsonl").unlink()
    _, text = page_of(old, tmp_path / "b.html")
    assert "No curve of NMI" in text


def test_images_and_reports_of_patients_need_a_word(run: Path, data: Path, tmp_path: Path) -> None:
    real = patients(data, tmp_path / "real")
    page, text = page_of(run, tmp_path / "a.html", "--data", real)
    assert not any(tag in ("img", "mark") for tag, _ in page.tags)
    assert "No examples: images and reports of patients stand in the page only with --include-samples" in text
    assert "No images: images and reports of patients" in text
    assert "effusion . possible" not in text
    assert "2 clusters (kmeans)" in text, "what is no sample stays"
    page, text = page_of(run, tmp_path / "b.html", "--data", real, "--include-samples")
    assert sum(tag == "img" for tag, _ in page.tags) > 8
    assert "possible" in text
    _, text = page_of(run, tmp_path / "c.html", "--samples", 0)
    assert "left out (--samples 0)" in text
    assert "data:image" not in (tmp_path / "c.html").read_text()


def test_files_that_are_not_of_the_data_are_named(
    make: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    run = make("moved", 0.5)
    add_examples(run, data)
    add_clusters(run)
    of = results.read(run / "evaluation.json")
    file = next(run.glob("evaluation-units/report/*/examples.json"))
    stored = json.loads(file.read_text())
    stored["texts"][0]["sample"] = 10**6
    import xxhash

    file.write_text(json.dumps(stored))
    of.examples["report"][UNIT].checksum = xxhash.xxh3_128_hexdigest(file.read_bytes())
    of.data["fingerprint"] = "0" * 32
    results.write(of, run / "evaluation.json")
    (folder_of(run) / SNAPSHOT).write_bytes(b"{}")
    _, text = page_of(run, tmp_path / "a.html")
    assert "is not what was evaluated" in text
    assert "No gallery" in text
    assert str(run.parent) not in (tmp_path / "a.html").read_text(), "a place of the machine"
    of.data["fingerprint"] = ShardReader(data).index.fingerprint
    results.write(of, run / "evaluation.json")
    _, text = page_of(run, tmp_path / "b.html")
    assert "they are of samples that the split does not have" in text


def test_pictures_show_masks_and_boxes_where_they_are() -> None:
    image = seen_image(np.full((16, 16), 100, np.uint8), 16, "none", 64)
    mask = np.zeros((16, 16), dtype=bool)
    mask[4:8, 8:12] = True
    drawn = mask_picture(image, mask, TRUE)
    assert (drawn[:14, :30] == 100).all()
    assert (drawn[24, 40] == (0.65 * 100 + 0.35 * np.array(TRUE)).astype(np.uint8)).all()
    assert (drawn[16:32, 32:48] == TRUE).all(2).any(), "its outline"
    assert (mask_picture(image, mask & False, TRUE) == 100).all()
    boxes = BoxExample(0, [Box("mass", 1, 1, 6, 6, 0.5)] * 9, [Box("mass", 8, 8, 14, 14)])
    found = box_picture(image, boxes, 16)
    assert (found[40, 32] == TRUE).all()
    assert (found[4, 4:24] == SAID).all(1).any()
    assert not (found[4, 4:24] == SAID).all(), "a broken line"
    assert (image == 100).all(), "the image itself is not drawn on"
