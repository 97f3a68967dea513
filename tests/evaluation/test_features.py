"""Embedding a split: every model, in order, without gradients, the same in any batch size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medvlp.data.batch import Batch, Text
from medvlp.evaluation import evaluate
from medvlp.evaluation.features import Wanted, embed, embed_texts, shrink
from medvlp.evaluation.task import EvaluationError
from medvlp.methods.base import Method, StepOutput
from medvlp.prototypes.table import PrototypeTable
from shards.errors import NotFiniteError

CPU = torch.device("cpu")


class Linear(Method):
    """The smallest real method: a linear layer for images, a table for tokens, dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.dropout = nn.Linear(64, 4), nn.Embedding(10, 4), nn.Dropout(0.5)

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        loss = -(self.encode_image(batch.image) * self.encode_text(batch.text)).sum(1).mean()
        return StepOutput(loss, {})

    def encode_image(self, image: Tensor) -> Tensor:
        return nn.functional.normalize(self.image_features(image), dim=1)

    def encode_text(self, text: Text) -> Tensor:
        return nn.functional.normalize(self.dropout(self.text(text.input_ids)).mean(1), dim=1)

    def image_features(self, image: Tensor) -> Tensor:
        return self.dropout(self.image(image.float().flatten(1) / 255))


class Biased(Linear):
    """Scores pairs in a way of its own."""

    scores_by_embedding = False

    def score(self, image: Tensor, prompts: Text) -> Tensor:
        return super().score(image, prompts) + torch.arange(len(prompts.input_ids))


class Mute(Biased):
    """Embeds no reports."""

    embeds_reports = False

    def encode_text(self, text: Text) -> Tensor:
        raise NotImplementedError


def make_text(rows: int, seed: int) -> Text:
    ids = torch.randint(0, 10, (rows, 5), generator=torch.Generator().manual_seed(seed))
    return Text(ids, torch.ones_like(ids), torch.zeros_like(ids), torch.zeros_like(ids))


def make_batches(size: int, total: int = 12) -> list[Batch]:
    images = torch.randint(0, 256, (total, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    text = make_text(total, 1)
    fields = (text.input_ids, text.attention_mask, text.word_index, text.sentence_index)
    return [
        Batch(
            image=images[rows],
            text=Text(*(field[rows] for field in fields)),
            sample=torch.arange(total)[rows],
            labels=torch.zeros(total, 1)[rows],
            keys=[str(number) for number in range(total)[rows]],
        )
        for rows in (slice(start, min(start + size, total)) for start in range(0, total, size))
    ]


def test_batch_size_does_not_matter_and_training_mode_comes_back() -> None:
    method = Linear()
    wanted = Wanted(image=True, text=True, features=True)
    whole = embed({"m": method}, make_batches(12), wanted, CPU)
    parts = embed({"m": method}, make_batches(5), wanted, CPU)
    assert method.training
    np.testing.assert_array_equal(parts.sample, np.arange(12))
    np.testing.assert_allclose(parts.pixels, whole.pixels)
    for name in ("image", "text", "features"):
        found = getattr(parts.models["m"], name)
        np.testing.assert_allclose(found, getattr(whole.models["m"], name), atol=1e-6)
        assert found.shape == (12, 4)
    np.testing.assert_allclose(np.linalg.norm(parts.models["m"].image, axis=1), 1, atol=1e-6)


def test_only_what_is_wanted_is_computed() -> None:
    arrays = embed({"m": Linear()}, make_batches(4), Wanted(features=True), CPU).models["m"]
    assert arrays.features is not None
    assert arrays.image is arrays.text is None
    assert arrays.scores == {}
    assert embed({}, make_batches(4), Wanted(), CPU).pixels.shape == (12, 1024)


def test_a_method_with_its_own_score_is_run_on_the_prompts() -> None:
    plain, biased, prompts = Linear(), Biased(), make_text(3, 2)
    assert plain.scores_by_embedding
    assert not biased.scores_by_embedding
    wanted = Wanted(prompts={("a", "b", "c"): prompts, ("d",): make_text(1, 3)})
    found = embed({"plain": plain, "biased": biased}, make_batches(5), wanted, CPU).models
    assert found["plain"].scores == {}
    with torch.no_grad():
        expected = biased.eval().score(make_batches(12)[0].image, prompts)
    np.testing.assert_allclose(found["biased"].scores["a", "b", "c"], expected, atol=1e-6)
    assert found["biased"].scores[("d",)].shape == (12, 1)


def test_a_method_that_embeds_no_reports_has_no_text() -> None:
    arrays = embed({"m": Mute()}, make_batches(4), Wanted(image=True, text=True), CPU).models["m"]
    assert arrays.text is None
    assert arrays.image is not None


def test_texts_are_embedded_in_batches_without_dropout() -> None:
    method, text = Linear(), make_text(7, 3)
    np.testing.assert_allclose(
        embed_texts(method, text, CPU, 2), embed_texts(method, text, CPU, 64), atol=1e-6
    )
    assert method.training


def test_convolutions_on_a_gpu_are_made_in_float32() -> None:
    """Torch's default for them is TF32, with the ten bits of mantissa of float16."""
    seen: list[tuple[bool, bool, bool]] = []

    class Listening(Linear):
        def image_features(self, image: Tensor) -> Tensor:
            cudnn = torch.backends.cudnn
            seen.append((cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark))
            return super().image_features(image)

    before = torch.backends.cudnn.allow_tf32
    embed({"m": Listening()}, make_batches(5), Wanted(features=True), CPU)
    assert set(seen) == {(False, True, False)}
    assert torch.backends.cudnn.allow_tf32 == before


def test_all_of_a_task_is_made_so(tmp_path: Path) -> None:
    seen: list[bool] = []

    def look(*given: Any) -> None:
        seen.append(torch.backends.cudnn.allow_tf32)

    def measure(*given: Any) -> None:
        look()
        raise EvaluationError("enough")

    task: Any = SimpleNamespace(fit=look, measure=measure)
    session: Any = SimpleNamespace(view=lambda *given: None, source=SimpleNamespace(run=tmp_path))
    stored: Any = SimpleNamespace(folder=tmp_path, work=tmp_path)
    nothing: Any = None
    with pytest.raises(EvaluationError, match="enough"):
        evaluate._run(task, nothing, stored, nothing, session)
    assert seen == [False, False]


def test_pixels_are_means_over_areas() -> None:
    image = torch.arange(64 * 64).reshape(1, 1, 64, 64).remainder(251).to(torch.uint8)
    expected = image.double().reshape(32, 2, 32, 2).mean((1, 3)).flatten() / 255
    np.testing.assert_allclose(shrink(image)[0], expected, atol=1e-6)
    assert shrink(torch.zeros(2, 1, 45, 45, dtype=torch.uint8)).shape == (2, 1024)


def test_an_empty_split_and_a_diverged_model_are_errors() -> None:
    with pytest.raises(EvaluationError, match="no readable sample"):
        embed({"m": Linear()}, [], Wanted(), CPU)
    diverged = Linear()
    diverged.image.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="of the trained network are NaN or infinite"):
        embed({"trained": diverged}, make_batches(5), Wanted(features=True), CPU)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_numbers_of_the_cpu() -> None:
    method, wanted = Linear(), Wanted(image=True, text=True, features=True)
    on_cpu = embed({"m": method}, make_batches(5), wanted, CPU).models["m"]
    cuda = torch.device("cuda")
    on_gpu = embed({"m": method.to(cuda)}, make_batches(5), wanted, cuda).models["m"]
    for name in ("image", "text", "features"):
        np.testing.assert_allclose(getattr(on_gpu, name), getattr(on_cpu, name), atol=1e-4)
