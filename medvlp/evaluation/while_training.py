"""What a pre-training is measured by while it trains: retrieval over the split, and zero-shot AUROC."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medvlp.data.batch import Batch, Text
from medvlp.evaluation.labels import FEWEST, binary, blank_side
from medvlp.evaluation.metrics.classification import aurocs
from medvlp.evaluation.metrics.ranking import best_ranks, median_rank, recall_at
from medvlp.evaluation.tasks.retrieval import RECALL_AT
from medvlp.evaluation.tasks.zero_shot import Ensemble, ZeroShot, ZeroShotConfig, prompts_of
from medvlp.methods.base import Method, Objective
from medvlp.training.predictions import Predictions
from medvlp.training.pretrain import Pretraining
from medvlp.training.recipe import TrainingSet


class MeasuredPretraining(Pretraining):
    """Pre-training with the cheap metrics of its validation.

    They are those of the tasks retrieval and zero-shot without intervals; a report counts as equal to
    another one where the tokens that are read of it are the same.
    """

    def examination(self, objective: Objective, data: TrainingSet) -> Callable[[Batch], Mapping[str, Tensor]]:
        """Embeddings of images and reports, tokens of the reports, and zero-shot scores with labels."""
        assert isinstance(objective, Method)
        method = objective
        ensemble = self._ensemble(data)
        tokens = data.tokenizer.tokenize(
            [[sentence] for sentence in ensemble.sentences or ["."]],
            self.config.data.max_tokens,
            self.config.data.pad_to_max,
        )
        rows = ensemble.rows if method.scores_prompts else {}
        columns = [data.reader.index.label_names.index(name) for name in rows]
        directions: list[Tensor] = []

        def examine(batch: Batch) -> Mapping[str, Tensor]:
            device = batch.image.device
            if not directions and method.scores_by_embedding and columns:
                # Once a validation, on every rank at its first batch: ZeRO-3 gathers weights.
                directions.append(_directions(method.encode_text(tokens.to(device)).float(), ensemble))
            found: dict[str, Tensor] = {}
            if method.embeds_images:
                found |= {"image": method.encode_image(batch.image).float()}
            if method.embeds_reports:
                found |= {"text": method.encode_text(batch.text).float(), "tokens": self._tokens(batch.text)}
            if columns:
                scores = (
                    found["image"] @ directions[0].T if directions else _own(method, batch, tokens, ensemble)
                )
                found |= {"scores": scores, "labels": batch.labels[:, columns]}
            return found

        return examine

    def measure(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """`image_to_text/R@5`, `text_to_image/median_rank`, `zero_shot/auroc/macro`, ..."""
        arrays = predictions.arrays
        found: dict[str, float] = {}
        if "text" in arrays:
            groups = np.unique(arrays["tokens"], axis=0, return_inverse=True)[1].reshape(-1)
            weights = np.ones((1, len(groups)))
            for direction, first, second in (
                ("image_to_text", "image", "text"),
                ("text_to_image", "text", "image"),
            ):
                ranks = best_ranks(arrays[first], arrays[second], groups, groups)
                found |= {f"{direction}/R@{k}": float(recall_at(ranks, k, weights)[0]) for k in RECALL_AT}
                found[f"{direction}/median_rank"] = float(median_rank(ranks, weights)[0])
        if "scores" in arrays:
            names = list(self._ensemble(data).rows)
            blank = blank_side(self.config.evaluation.blank, data.reader.index.label_names)
            truth = binary(arrays["labels"], blank=blank)
            areas = aurocs(arrays["scores"].astype(np.float64), truth, names, FEWEST)
            found |= {f"zero_shot/{name}": area for name, area in areas.items()}
        return found

    def _ensemble(self, data: TrainingSet) -> Ensemble:
        """The configured prompts of the dataset's labels that have some."""
        settings = self.config.evaluation.tasks.get(ZeroShot.name)
        book = ZeroShot(settings if isinstance(settings, ZeroShotConfig) else ZeroShotConfig()).book
        return Ensemble.of(prompts_of(book, data.reader.index.label_names))

    def _tokens(self, text: Text) -> Tensor:
        """[B, max_tokens] token ids, -1 where a report has ended: as long in every batch."""
        ids = text.input_ids.where(text.attention_mask == 1, -1)
        return F.pad(ids, (0, self.config.data.max_tokens - ids.shape[1]), value=-1)


def _directions(embeddings: Tensor, ensemble: Ensemble) -> Tensor:
    """[C, D] of each finding: the mean of the prompts that state it minus that of those that deny it."""
    sides = [
        [F.normalize(embeddings[side].sum(dim=0), dim=0) for side in of] for of in ensemble.rows.values()
    ]
    return torch.stack([positive - negative for positive, negative in sides])


def _own(method: Method, batch: Batch, tokens: Text, ensemble: Ensemble) -> Tensor:
    """[B, C] scores of a method that compares images and prompts in its own way."""
    scores = method.score(batch.image, tokens.to(batch.image.device)).float()
    sides = [
        [scores[:, side].sum(dim=1) / max(side.stop - side.start, 1) for side in of]
        for of in ensemble.rows.values()
    ]
    return torch.stack([positive - negative for positive, negative in sides], dim=1)
