"""Segmentation and detection on the maintainers' real films: what of them can be learned and measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from medvlp.config import Config
from medvlp.data.dataset import EvaluationDataset
from medvlp.data.loader import EvaluationLoader, evaluation_dataset
from medvlp.data.text import Tokenizer
from medvlp.evaluation.heads.detection import box_truth
from medvlp.evaluation.heads.segmentation import mask_truth
from medvlp.evaluation.tasks.detection import Detection, DetectionConfig
from medvlp.evaluation.tasks.segmentation import Segmentation, SegmentationConfig
from shards.reader import ShardReader
from shards.sources.table import TableSource
from tests.launcher.tiny_run import build

pytestmark = pytest.mark.shared


def opened(shared: Path, shards: Path, split: str, field: str) -> EvaluationDataset:
    words = Tokenizer.load(str(shared / "data" / "tokenizers" / "bert-base-uncased"), str(shards))
    config = Config()
    config.data.root, config.data.image_size, config.data.workers = str(shards), 32, 0
    config.data.transform.crop = "none"
    return evaluation_dataset(config, ShardReader(shards), words, split, [field])


def test_lungs(shared: Path, repository: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "labelled" / "covid_lung"
    table = pd.read_csv(folder / "images.csv", dtype=str)
    source = TableSource(
        folder / "images.csv", folder, repository / "configs" / "tasks" / "masks-covid-lung.yaml"
    )
    shards = build(source, tmp_path / "shards", vocab_size=100)
    task = Segmentation(SegmentationConfig())
    for split, of in table.groupby("split"):
        data = opened(shared, shards, str(split), "masks")
        rows = np.flatnonzero(task.learnable(data.reader, str(split), data.store))
        assert len(rows) == of.lung_mask.notna().sum() > 10
        (batch,) = EvaluationLoader(data, [rows.tolist()], data.config)
        truth, known = mask_truth(batch, torch.tensor([0]), torch.tensor([np.nan]))
        assert known.all()
        share = truth.float().mean((1, 2, 3))
        assert share.min() > 0
        assert 0.2 < share.median() < 0.5


def test_lung_opacities(shared: Path, tmp_path: Path) -> None:
    folder, finding = shared / "data" / "labelled" / "nih1000", "Lung Opacity (RSNA pneumonia)"
    films, boxes = (pd.read_csv(folder / name, dtype=str) for name in ("labels.csv", "boxes.csv"))
    films = films[films.rsna_class.notna()]
    boxes = boxes[boxes.label == finding].drop(columns=["image", "source"])
    films.merge(boxes, on="id", how="left").to_csv(tmp_path / "films.csv", index=False)
    (tmp_path / "map.yaml").write_text(
        "image: image\nid: id\npatient_id: patient_id\nsplit: split\nrows: target\n"
        f"labels: {{'{finding}': {{column: rsna_class, equals: Lung Opacity}}}}\n"
        "boxes: {x: x, y: y, width: w, height: h, label: label}\n"
    )
    shards = build(
        TableSource(tmp_path / "films.csv", folder, tmp_path / "map.yaml"),
        tmp_path / "shards",
        vocab_size=100,
    )
    task = Detection(DetectionConfig())
    found = 0
    for split, of in films.groupby("split"):
        data = opened(shared, shards, str(split), "boxes")
        rows = np.flatnonzero(task.learnable(data.reader, str(split), data.store))
        assert len(rows) == len(of)
        (batch,) = EvaluationLoader(data, [rows.tolist()], data.config)
        truth = box_truth(batch, torch.tensor([0]), smallest=1.0)
        for image, label in enumerate(batch.labels[:, 0].tolist()):
            held, _, hedged = truth.of(image)
            assert (len(held) > 0) == (label == 1)
            assert not hedged.any()
            found += len(held)
    assert found == len(boxes[boxes.id.isin(films.id)])
