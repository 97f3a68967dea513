"""Published results stand beside a run's own only where everything that matters agrees."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report.published import PublishedResult, compare, read
from medvlp.evaluation.report.results import Evaluation
from shards.errors import MedvlpError

FILE = Path(__file__).resolve().parents[3] / "configs/results/published.yaml"


def evaluation(
    source: str | None = "rsna", protocol: str | None = "mgca-linear", images: int = 5337
) -> Evaluation:
    trained = {"auroc@1%/macro": Estimate(0.8, 0.7, 0.9), "auroc@10%/macro": Estimate(math.nan)}
    return Evaluation(
        {"name": "run"},
        {"source": source, "split": "test", "splits": {"test": {"samples": images}}},
        {"options": {"fine-tuning": {} if protocol is None else {"protocol": protocol}}},
        {"fine-tuning": {"trained": trained}},
        {"fine-tuning": {}},
    )


def row(**changes: object) -> PublishedResult:
    values: dict[str, object] = {
        "method": "M", "dataset": "rsna", "task": "fine-tuning", "protocol": "mgca-linear",
        "metric": "auroc/macro", "values": {"1%": 0.886, "10%": 0.891}, "evidence": "requoted",
        "test_images": 5337,
    }  # fmt: skip
    return PublishedResult(**(values | changes))  # type: ignore[arg-type]


def test_a_number_stands_beside_the_one_at_the_same_share_of_labels() -> None:
    compared = compare(evaluation(), [row(note="own lists")], from_memory=False)
    ((task, metric, own, value, by),) = compared.rows
    assert (task, metric, own.value, value) == ("fine-tuning", "auroc@1%/macro", 0.8, 0.886)
    assert by == "M (mgca-linear, requoted)"
    assert compared.remarks == ["fine-tuning: M: own lists"]


def with_findings(*names: str) -> Evaluation:
    made = evaluation()
    made.results["fine-tuning"]["trained"] |= {f"auroc@1%/{name}": Estimate(0.8) for name in names}
    return made


def test_a_mean_stands_beside_one_over_the_same_findings() -> None:
    published = row(findings=["Edema", "Pleural_Effusion"])
    assert compare(with_findings("pleural effusion", "edema"), [published], from_memory=False).rows
    # RSNA holds "Normal" beside "Pneumonia", CheXpert nine labels beside the five of its competition.
    several = [item for item in read(FILE) if item.dataset in ("rsna", "chexpert") and "auroc" in item.metric]
    assert all(item.findings for item in several)


@pytest.mark.parametrize(
    ("run", "published", "reason"),
    [
        (evaluation(protocol="ours"), row(), "mgca-linear is another protocol than ours: M"),
        (evaluation(protocol=None), row(), "mgca-linear is another protocol than that of the task: M"),
        (evaluation(images=3000), row(), "M was tested on 5337 images, this run on 3000"),
        (evaluation(source="siim"), row(), "nothing published is known of siim"),
        (evaluation(source=None), row(), "nothing published is known of a dataset of unknown source"),
        (evaluation(), row(task="zero-shot"), "nothing published is known of rsna"),
        (
            with_findings("Pneumonia", "Normal"),
            row(findings=["Pneumonia"]),
            "M reports the mean over Pneumonia, this run that over Pneumonia, Normal",
        ),
        (evaluation(), row(metric="f1/macro"), "M reports f1/macro, this run does not"),
        (
            evaluation(),
            row(values={"100%": 0.9}),
            "M reports auroc/macro, this run does not at the same share",
        ),
    ],
)
def test_what_does_not_agree_is_said_and_not_shown(
    run: Evaluation, published: PublishedResult, reason: str
) -> None:
    compared = compare(run, [published], from_memory=False)
    assert not compared.rows
    assert len(compared.remarks) == 1
    assert reason in compared.remarks[0]


def test_what_nobody_looked_up_is_shown_only_on_demand_and_marked() -> None:
    remembered = row(evidence="memory")
    assert not compare(evaluation(), [remembered], from_memory=False).rows
    assert compare(evaluation(), [remembered], from_memory=True).rows[0][-1] == "M (mgca-linear, from memory)"


def test_every_row_of_the_file_can_be_shown() -> None:
    rows = read(FILE)
    assert len(rows) > 100
    for item in rows:
        assert all((item.method, item.dataset, item.task, item.protocol, item.metric, item.values)), item
        assert all(0 < value < 1 for value in item.values.values()), item
        assert item.values.keys() <= {"1%", "10%", "100%", "all"}, item
        assert item.evidence != "requoted" or item.source or item.note, item


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text("results:\n- {method: M, evidence: hearsay}\n")
    with pytest.raises(MedvlpError, match="evidence"):
        read(file)
