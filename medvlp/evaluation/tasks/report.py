"""Report generation: a transformer decoder on the patch tokens writes the report of an image by beam search.

Texts are compared as words (`medvlp.data.report.scored_words`) with the whole report of `data.sections`;
samples without a word have no number. Beside the scores of texts stands clinical efficacy: the findings that
the rules of `shards.entities` (or a file) read in a generated report, against the labels of the dataset. The
row "reference" is what these rules find in the true reports: the most that they let a generated one reach.

Baselines, of the drawn training samples: the most frequent report; a random one; that of the nearest image by
backbone features; and a normal one, the most frequent report of images without a finding. `same-findings` is
a ceiling of scores of texts for what states the findings and nothing else: it is told the true labels, and
writes a training report with the same ones, or the most of them.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.config import Config, ConfigError, key
from medvlp.data.report import r2gen_words, report_text, scored_words
from medvlp.evaluation.examples import MOST, Examples, TextExample, evenly
from medvlp.evaluation.labels import has_chexpert_labels
from medvlp.evaluation.metrics.bootstrap import Estimate, PatientBootstrap
from medvlp.evaluation.metrics.clinical import Blank, LabelTable, clinical_efficacy, plain
from medvlp.evaluation.metrics.generation import (
    MetricMissingError,
    bleu_counts,
    corpus_bleu,
    meteor,
    meteor_exact_stem,
    score_texts,
)
from medvlp.evaluation.report_baselines import Baselines, is_normal, unit_rows
from medvlp.evaluation.report_labels import KEY, TEXT, labelled, read_labels, stated
from medvlp.evaluation.task import EvaluationError, Facts, Needs, Reading, Role, TaskResult, Unit, register
from medvlp.evaluation.trained import Fitted, TrainedTask, TrainedTaskConfig, by_unit

if TYPE_CHECKING:
    from medvlp.data.dataset import EvaluationDataset
    from medvlp.data.sample_store import SampleStore
    from medvlp.evaluation.heads.report import ReportObjective
    from medvlp.evaluation.session import View
    from medvlp.evaluation.supervised import Network
    from medvlp.methods.base import Method
    from medvlp.training.predictions import Predictions
    from medvlp.training.recipe import TrainingSet
    from shards.reader import ShardReader

#: A normal report where no training image is without findings.
_NORMAL = "No acute cardiopulmonary abnormality."
_SUMMARY = ("bleu-1", "bleu-4", "rouge-l", "cider", "meteor", "distinct", "ce-f1")


@dataclass
class ReportConfig(TrainedTaskConfig):
    fractions: list[float] = key([1.0], "shares of the training patients", 1e-6, 1, (1, 100))
    tokenizer: Literal["wordpiece", "words"] = key(
        "wordpiece", "the run's tokenizer, or the words that enough training patients share"
    )
    min_patients: int = key(3, "patients whose reports hold a word of the vocabulary of words", 1, 1 << 20)
    max_words: int = key(100, "longest generated report, in words or word pieces", 2, 2000)
    cleaning: Literal["ours", "r2gen"] = key(
        "ours", "words of reports; r2gen: published, which joins 2.5 to 25 and left/right to leftright"
    )
    reference: Literal["full", "truncated_unk"] = key(
        "full", "truncated_unk: cut at max_words, unknown words <unk> (published; raises BLEU)"
    )
    select: Literal["bleu-4", "loss", "best_test"] = key(
        "bleu-4", "what chooses the epoch, on the validation split; best_test (published) is refused"
    )
    width: int = key(512, "of the decoder", 8, 1 << 14)
    layers: int = key(3, "of its encoder and as many of its decoder", 1, 100)
    heads: int = key(8, "of its attention", 1, 1 << 10)
    hidden: int = key(512, "width of its feed-forward layers", 8, 1 << 16)
    dropout: float = key(0.1, "in its layers", 0, 0.9)
    beams: int = key(3, "of the search", 1, 100)
    meteor: Literal["1.5", "exact_stem", "none"] = key(
        "1.5", "1.5 needs java; exact_stem is nltk's without synonyms, another metric under another name"
    )
    ce_uncertain: Literal["exclude", "positive", "negative"] = key(
        "exclude", "what uncertain findings count as in clinical efficacy (R2Gen: negative)"
    )
    ce_blank: Literal["auto", "exclude", "negative"] = key(
        "auto", "what findings count as that the truth does not know; auto: negative for CheXpert's labels"
    )
    ce_empty: Literal["exclude", "one"] = key(
        "exclude", "reports without a finding in truth and text: not in the mean over reports, or right"
    )
    ce_labels: str | None = key(
        None,
        "CSV of another labeller: reports.csv of the unit's folder with a column a label; default: the rules",
        file=True,
    )

    def check(self, config: Config) -> None:
        super().check(config)
        if self.select == "best_test":
            raise ConfigError(
                "evaluation.tasks.report.select=best_test: an epoch is never chosen with the evaluated split "
                "in sight, as in R2Gen's second table; select=bleu-4 chooses on the validation split"
            )
        if self.width % self.heads:
            raise ConfigError(
                f"evaluation.tasks.report: heads={self.heads} does not divide width={self.width}"
            )


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    meteor = "; ".join(dict.fromkeys(own["meteor"] for _, own in by_unit(notes) if "meteor" in own))
    lines = [f"{notes['reports']} reports; METEOR: {meteor}"] if "reports" in notes else []
    for unit, own in by_unit(notes):
        if "normal" in own:
            of = f"the most frequent of {own['normal']} normal training images"
            none = "a sentence of this program: no image is known to be"
            lines.append(f"{unit}normal: {of if own['normal'] else none}")
    if notes.get("clinical"):
        lines.append(f"clinical efficacy over {len(notes['clinical'])} findings, by {notes['labeller']}")
    return lines


@register
class Report(TrainedTask):
    """See the module."""

    name = "report"
    hedged = "clinical efficacy reads evaluation.tasks.report.ce_uncertain"
    own_files = frozenset({"ce_labels"})
    summary = "reports written by a decoder on the patch tokens"
    packages = ("pycocoevalcap",)
    teaches = "a report"
    config = ReportConfig
    version = 3
    keeps_examples = True
    reading = Reading(
        names={
            **{f"bleu-{order}": f"BLEU-{order}" for order in (1, 2, 3, 4)},
            "rouge-l": "ROUGE-L", "cider": "CIDEr", "meteor": "METEOR", "ce-f1": "CE F1",
            "ce-precision": "CE precision", "ce-recall": "CE recall",
        },
        summary=lambda metric: (
            metric.split("@")[0] in _SUMMARY
            and metric.rpartition("/")[2] in (metric, "macro", "micro")
        ),
        remarks=_remarks,
        truth=lambda data, notes: {f"data.{name}": data.get(name) for name in ("sections", "cleaning")},
    )  # fmt: skip
    chooses_mode: ClassVar[Literal["min", "max"]] = "max"
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ours": {
            "optimizer": {"lr": 3e-4, "image_lr_scale": 0.3, "weight_decay": 0.05, "warmup": 0.05},
            "train": {"global_batch": 32, "epochs": 50.0},
        },
        "frozen": {
            "image": {"frozen": True},
            "optimizer": {"lr": 3e-4, "weight_decay": 0.05, "warmup": 0.05},
            "train": {"global_batch": 32, "epochs": 50.0},
        },
    }

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        words = {"ours": "report_words", "r2gen": "r2gen_words"}[settings.cleaning]
        needed = {words} if settings.tokenizer == "words" else set()
        self.fields = frozenset(needed)  # type: ignore[misc]
        self.chooses = settings.select  # type: ignore[misc]
        self.chooses_mode = "min" if settings.select == "loss" else "max"  # type: ignore[misc]

    @property
    def clean(self) -> Callable[[str], list[str]]:
        """Text -> scored words."""
        return scored_words if self.settings.cleaning == "ours" else r2gen_words

    def protocol(self, config: Config) -> Mapping[str, Any]:
        """As named; reports are read as long as they may be written, however short the pre-training cut
        them, for what is cut teaches to end there."""
        # The word pieces, [SEP] among them, stand behind [CLS].
        longest = max(config.data.max_tokens, self.settings.max_words + 1)
        return {**super().protocol(config), "data": {"max_tokens": longest}}

    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        seen = Needs(features=True, fields=self.fields)
        return {"train": seen, "selection": Needs(fields=self.fields), "evaluated": seen}

    def unavailable_with(self, method: Method) -> str | None:
        return None if getattr(method, "image_encoder", None) is not None else "has no image encoder"

    def learnable(self, reader: ShardReader, split: str, store: SampleStore) -> NDArray[np.bool_]:
        """Samples with a report."""
        return np.diff(store.rows.offsets) > 0

    def objective(self, method: Method, data: TrainingSet) -> ReportObjective:
        """See `TrainedTask.objective`; the vocabulary of words is that of the drawn training samples."""
        from medvlp.evaluation.heads.report import (
            PieceVocabulary,
            ReportObjective,
            ReportVocabulary,
            WordVocabulary,
            patch_shape,
            shared_words,
        )
        from medvlp.evaluation.heads.report_decoder import ReportDecoder

        assert data.samples is not None
        settings, config = self.settings, data.config.data
        metadata = [data.reader.metadata(config.split, int(position)) for position in data.samples]
        texts = [report_text(sample, config) for sample in metadata]
        vocabulary: ReportVocabulary
        if settings.tokenizer == "words":
            reports = [self.clean(text) for text in texts]
            patients = [sample["patient_id"] for sample in metadata]
            words = shared_words(reports, patients, settings.min_patients)
            vocabulary = WordVocabulary(words, next(iter(self.fields)))
            lengths = np.array([len(words) for words in reports])
        else:
            vocabulary = PieceVocabulary(data.tokenizer, self.clean)
            lengths = np.diff(data.tokenizer.encode([[text] for text in texts]).offsets)
        patches, width = patch_shape(method, config.image_size)
        decoder = ReportDecoder(
            width, patches, vocabulary.size, vocabulary.pad, vocabulary.bos, vocabulary.eos,
            settings.max_words, settings.width, settings.layers, settings.heads, settings.hidden,
            settings.dropout, settings.beams,
        )  # fmt: skip
        mean = float(np.minimum(lengths + 1, settings.max_words).mean())
        return ReportObjective(method, decoder, vocabulary, mean)

    def metrics(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """BLEU-4 of the validation split."""
        config = data.config
        rows, references = self._references(predictions, data.reader, config.validation.split, config)
        texts = _texts(predictions, "text")
        counts = bleu_counts([texts[row] for row in rows], references)
        return {"bleu-4": float(corpus_bleu(counts, 4)[0])} if references else {}

    def choose(self, view: View, unit: Unit, networks: Mapping[str, Network]) -> Baselines:
        """What the baselines write, from the samples that the networks have seen."""
        split = view.split("train")
        assert split is not None
        rows = np.flatnonzero(np.isin(split.arrays.sample, networks["trained"].drawn(view)))
        reports = [" ".join(self.clean(split.reports[row])) for row in rows]
        names = view.facts.index.label_names
        normal = [
            text for text, row in zip(reports, rows, strict=True) if is_normal(split.labels[row], names)
        ]
        features = np.asarray(split.arrays.models["trained"].features)[rows]
        fallback = " ".join(self.clean(_NORMAL))
        return Baselines(
            reports,
            unit_rows(features),
            Counter(normal).most_common(1)[0][0] if normal else fallback,
            split.labels[rows],
            len(normal),
        )

    def score(
        self, view: View, unit: Unit, predictions: Mapping[str, Predictions], fitted: Fitted
    ) -> TaskResult:
        """Scores of texts and clinical efficacy, of both networks and of the baselines."""
        dataset, first = view.dataset("evaluated"), predictions["trained"]
        rows, references = self._references(
            first, dataset.reader, dataset.split, fitted.networks["trained"].config
        )
        if not references:
            raise EvaluationError(f"{self.name}: no sample of {dataset.split} has a report with a word")
        sample = first.sample[rows]
        models = {name: [_texts(of, "text")[row] for row in rows] for name, of in predictions.items()}
        models |= self._baselines(view, fitted.chosen, sample)
        bootstrap = view.bootstrap(view.patients("evaluated", sample))
        try:
            result = TaskResult(
                {name: score_texts(texts, references, bootstrap) for name, texts in models.items()}
            )
        except MetricMissingError as error:
            raise EvaluationError(f"{self.name}: {error}") from error
        said = self._meteor(result, models, references)
        result.notes = {"reports": len(rows), "meteor": said, "normal": fitted.chosen.normals}
        self._clinical(result, dataset, sample, models, references, bootstrap)
        if self.settings.ce_labels is None:  # else they are there, perhaps with these labels beside them
            _write(view.folder / "reports.csv", _keys(dataset, sample), models["trained"], references)
        result.examples = Examples(
            "Evenly spread over the split, whatever the network wrote.",
            texts=[
                TextExample(int(sample[row]), models["trained"][row], references[row])
                for row in evenly(len(rows), MOST)
            ],
        )
        return result

    def _references(
        self, predictions: Predictions, reader: ShardReader, split: str, config: Config
    ) -> tuple[list[int], list[str]]:
        """Rows of the predictions whose report has a word, and these reports."""
        if self.settings.reference == "truncated_unk":
            texts = _texts(predictions, "reduced")
        else:
            metadata = (reader.metadata(split, int(position)) for position in predictions.sample)
            texts = [" ".join(self.clean(report_text(sample, config.data))) for sample in metadata]
        rows = [row for row, text in enumerate(texts) if text]
        return rows, [texts[row] for row in rows]

    def _baselines(self, view: View, baselines: Baselines, sample: NDArray[np.int64]) -> dict[str, list[str]]:
        split = view.split("evaluated")
        assert split is not None
        place = {int(position): row for row, position in enumerate(split.arrays.sample)}
        features = np.asarray(split.arrays.models["trained"].features)
        rows = [place[int(position)] for position in sample]
        return baselines.written(features[rows], split.labels[rows], view.seed)

    def _meteor(
        self, result: TaskResult, models: Mapping[str, Sequence[str]], references: Sequence[str]
    ) -> str:
        """Put METEOR beside the other metrics; what it is, or why there is none."""
        kind = self.settings.meteor
        if kind == "none":
            return "not asked for"
        try:
            if kind == "1.5":
                for name, value in meteor(models, references).items():
                    result.models[name]["meteor"] = Estimate(value)
                return "1.5, without intervals"
            for name, texts in models.items():
                mean = float(meteor_exact_stem(texts, references).mean())
                result.models[name]["meteor-exact-stem"] = Estimate(mean)
            return "nltk's with exact and stem matches only, which is not METEOR 1.5"
        except MetricMissingError as error:
            return f"not available: {error}"

    def _clinical(
        self,
        result: TaskResult,
        dataset: EvaluationDataset,
        sample: NDArray[np.int64],
        models: Mapping[str, Sequence[str]],
        references: Sequence[str],
        bootstrap: PatientBootstrap,
    ) -> None:
        """Put clinical efficacy beside the other metrics, where the dataset has labels that can be told."""
        settings, known = self.settings, list(dataset.reader.index.label_names)
        truth = LabelTable(known, dataset.store.labels[sample].astype(np.float64))
        names = labelled(self.findings(known))
        if settings.ce_labels is None:
            tables = {name: stated(texts, names) for name, texts in models.items()}
            tables["reference"] = stated(references, names)
        else:
            keys = _keys(dataset, sample)
            table = read_labels(Path(settings.ce_labels), dict(zip(keys, models["trained"], strict=True)))
            have = {plain(name) for name in table.names}
            names, tables = [name for name in self.findings(known) if plain(name) in have], {"trained": table}
            if not names:
                raise EvaluationError(
                    f"{settings.ce_labels}: no column is one of the labels {', '.join(self.findings(known))}"
                )
        if not names:
            result.notes["clinical"] = []
            return
        blank: Blank = "negative" if has_chexpert_labels(known) else "exclude"
        if settings.ce_blank != "auto":
            blank = settings.ce_blank
        for name, table in tables.items():
            found = clinical_efficacy(
                table, truth, names, bootstrap, settings.ce_uncertain, blank, settings.ce_empty
            )
            own = {f"ce-{metric}": value for metric, value in found.items()}
            result.models.setdefault(name, {}).update(own)
        reason = "neither true nor stated by the trained network where the truth is known"
        scored = result.models["trained"]
        result.notes |= {
            "clinical": names,
            "labeller": settings.ce_labels or "the rules of shards.entities",
            "not_evaluable": [
                {"finding": name, "reason": reason} for name in names if f"ce-f1/{name}" not in scored
            ],
        }


def _texts(predictions: Predictions, name: str) -> list[str]:
    from medvlp.evaluation.heads.report import texts_of

    return texts_of(predictions.arrays[name])


def _keys(dataset: EvaluationDataset, sample: NDArray[np.int64]) -> list[str]:
    return dataset.store.keys(sample)


def _write(path: Path, keys: Sequence[str], texts: Sequence[str], references: Sequence[str]) -> None:
    """The reports of the trained network, for other labellers; like all text they stay in the run folder."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([KEY, TEXT, "reference"])
        writer.writerows(zip(keys, texts, references, strict=True))
    partial.replace(path)
