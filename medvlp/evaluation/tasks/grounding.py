"""Zero-shot grounding: does a method's map of a finding, or of a phrase, lie where it is in the image?

A map is `Method.ground` of a prompt, on the network's view of the image: upsampled to its pixels, and with
`scale` "image" stretched to [0, 1] by itself. What is shown is compared with up to three truths:

- `boxes`, `masks`: of an image and a finding, the pixels in any of its boxes, or of its mask. Its map is the
  mean of the maps of its positive prompts.
- `phrases`: of an image and a phrase with boxes, the pixels in any of them. The phrase is the prompt; its
  finding is the label that all its boxes bear.

Only what is there is scored: a finding without a box, with an empty mask, hedged (label -1), or outside the
view gives no number. Measures are those of `medvlp.evaluation.metrics.localisation`, a number each of every
pair of image and finding (or phrase), so memory does not grow with maps. `<measure>/<truth>/<finding>` is
the mean over a finding's pairs, `macro` the mean over findings, `pairs` the mean over all pairs. IoU, Dice,
recall and precision are at one threshold for all findings, the best by mean IoU on the selection split.

Baselines: the untrained network; `prior`, the mean of the truths of the training split, the same map for
every image; `finding-prior`, the same for each finding by itself, which sees labels; chance, a uniform map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.config import TaskConfig, key
from medvlp.evaluation import prompts as prompt_files
from medvlp.evaluation.metrics.localisation import ThresholdCurve, localisation, min_max, uniform
from medvlp.evaluation.metrics.pairs import PairTable
from medvlp.evaluation.prompts import PromptBook
from medvlp.evaluation.task import (
    EvaluationError,
    Facts,
    Needs,
    Reading,
    Role,
    Task,
    TaskResult,
    Unit,
    register,
)
from shards.errors import NotFiniteError

if TYPE_CHECKING:
    from torch import Tensor

    from medvlp.data.batch import Batch
    from medvlp.evaluation.places import Place, Truth
    from medvlp.evaluation.session import View
    from medvlp.evaluation.splits import Split
    from medvlp.methods.base import Method

Floats = NDArray[np.float64]

TRUTHS: tuple[Truth, ...] = ("boxes", "masks", "phrases")
#: Images whose phrases are shown to a method together: it maps every phrase of one in all of them.
_TOGETHER = 8
#: Range of the values of maps that are not scaled: cosines, and attention or its probabilities.
_RAW = (-1.0, 1.0)


@dataclass
class GroundingConfig(TaskConfig):
    truth: Literal["all", "boxes", "masks", "phrases"] = key("all", "what maps are compared with")
    prompts: str | None = key(
        None,
        "YAML with prompts of findings; a relative path is looked for beside the config file first; "
        "default: templates",
        file=True,
    )
    scale: Literal["image", "batch_max", "raw"] = key(
        "image",
        "image: each map to [0, 1]; raw: as the method gives it (MedKLIP, BioViL); batch_max: divided by the "
        "largest value of the batch, so that numbers depend on evaluation.batch (published MeDSLIP)",
    )
    threshold: float | None = key(
        None,
        "called is what lies above it; null: the best on the selection split (published: 0.008 of raw maps, "
        "0 or 0.01 of batch_max ones; 0 calls every pixel)",
        -1e6,
        1e6,
    )
    ties: Literal["expected", "any"] = key(
        "expected", "tied maxima: share inside, or 1 if any is (published)"
    )
    upsampling: Literal["bilinear", "nearest"] = key("bilinear", "of maps to pixels; nearest: published")
    smoothing: float = key(0.0, "sigma of a Gaussian over each map, in patches (BioViL: 1.5)", 0, 100)
    cnr: Literal["union", "each"] = key(
        "union", "of all boxes at once, or of each by itself, then their mean"
    )


@dataclass
class Pair:
    """A place in an image, and what networks show of it.

    Attributes:
        place: what is there. image: its number in the batch. row: its sample in the split.
        grids: network -> its map on the patch grid, divided by the batch's maximum with `scale` batch_max.
    """

    place: Place
    image: int
    row: int
    grids: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Fitted:
    """What was taught and chosen without the evaluated split.

    Attributes:
        priors: truth -> finding -> mean of its training places [S, S]; under "" that of all findings.
        thresholds: truth -> model -> threshold; a model without one has no IoU.
    """

    priors: dict[str, dict[str, Floats]]
    thresholds: dict[str, dict[str, float]]


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{truth}: {of['pairs']} pairs of {of['images']} images and {of['patients']} patients"
        for truth, of in notes.get("truths", {}).items()
    ]
    if notes.get("hedged"):
        lines.append(f"{notes['hedged']} hedged findings left out")
    if "thresholds" in notes:
        said = notes["threshold_from"]
        lines.append(
            f"IoU and Dice at the threshold {said}"
            if said
            else "no IoU and Dice at a threshold: no other split to choose one on"
        )
    return lines


@register
class Grounding(Task):
    """See the module."""

    name = "grounding"
    hedged = "phrases of hedged findings are left out"
    summary = "maps of findings and phrases against boxes, masks and phrases with boxes"
    config = GroundingConfig
    reading = Reading(
        names={
            "point": "pointing game",
            "auprc": "pixel AUPRC",
            "iou": "IoU",
            "dice": "Dice",
            "cnr_signed": "CNR (signed)",
            "cnr": "|CNR|",
            "miou": "mIoU at 0.1–0.5",
        },
        summary=lambda metric: (
            metric.endswith("/macro")
            and metric.split("/")[0] in ("point", "iou", "dice", "auprc", "cnr_signed")
        ),
        by_finding="point",
        remarks=_remarks,
        places=True,
    )

    @cached_property
    def book(self) -> PromptBook:
        """The configured prompts."""
        return prompt_files.read(self.settings.prompts, self.name)

    @property
    def truths(self) -> tuple[Truth, ...]:
        """What maps are compared with, as far as the dataset has it."""
        return TRUTHS if self.settings.truth == "all" else (self.settings.truth,)

    def unavailable_on(self, facts: Facts) -> str | None:
        if facts.index.version == 1:
            return (
                "the dataset is of format version 1, which holds no phrases and one finding a pixel; build "
                "it again with medvlp shards build"
            )
        return None

    def unavailable_with(self, method: Method) -> str | None:
        return None if method.grounds else "gives no map of a text as it is configured"

    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        places = Needs(fields=frozenset(self.truths))
        return {"train": places, "selection": places, "evaluated": places}

    def fit(self, view: View, unit: Unit) -> Fitted:
        """Mean truths of the training split, and thresholds on the selection split."""
        fitted = Fitted(self._priors(view), {truth: {} for truth in self.truths})
        if self.settings.threshold is not None or "selection" not in view.facts.roles:
            return fitted
        curves: dict[tuple[str, str], ThresholdCurve] = {}
        for pair in self._shown(view, "selection", set()):
            for model, heat in self._heats(pair, fitted).items():
                span = _RAW if self.settings.scale == "raw" and model in pair.grids else (0.0, 1.0)
                curve = curves.setdefault((pair.place.truth, model), ThresholdCurve(*span))
                try:
                    curve.add(heat, pair.place.pixels)
                except ValueError as error:
                    raise EvaluationError(
                        f"{self.name}: a map of the {model} network holds {error}: set evaluation.tasks."
                        f"{self.name}.scale=image, or its threshold"
                    ) from error
        for (truth, model), curve in curves.items():
            fitted.thresholds[truth][model] = curve.best()
        return fitted

    def measure(self, view: View, unit: Unit, fitted: Fitted) -> TaskResult:
        """All measures of every network, of the priors and of chance."""
        split = view.split("evaluated")
        assert split is not None
        tables: dict[str, PairTable] = {}
        hedged: set[tuple[int, str]] = set()
        for pair in self._shown(view, "evaluated", hedged):
            place = pair.place
            scores = {
                model: localisation(
                    heat,
                    place.pixels,
                    place.parts if self.settings.cnr == "each" else (),
                    self._threshold(fitted, place.truth, model),
                    self.settings.ties,
                )
                for model, heat in self._heats(pair, fitted).items()
            }
            scores["chance"] = uniform(place.pixels)
            table = tables.setdefault(place.truth, PairTable())
            table.add(pair.row, place.finding or table.UNNAMED, scores)
        if not tables:
            raise EvaluationError(
                f"{self.name}: no image of {split.name} has {' or '.join(self.truths)} of a finding that is "
                "there for certain and has prompts; build the dataset from a source that holds places "
                "(medvlp shards build --help)"
            )
        result, bootstrap = TaskResult(), view.bootstrap(split.patients)
        for truth in (name for name in self.truths if name in tables):
            for model, metrics in tables[truth].metrics(truth, bootstrap).items():
                result.models.setdefault(model, {}).update(metrics)
        result.notes = self._notes(view.facts, fitted, tables, split) | {"hedged": len(hedged)}
        return result

    def _notes(
        self, facts: Facts, fitted: Fitted, tables: Mapping[str, PairTable], split: Split
    ) -> dict[str, Any]:
        chosen, fixed = facts.roles.get("selection"), self.settings.threshold
        prompts = self._prompts(facts)
        listed = [
            {"finding": f"{name} ({truth})", "reason": f"in {count} image of {split.name}, needs 2"}
            for truth, table in tables.items()
            for name, count in table.few().items()
        ]
        if set(self.truths) != {"phrases"}:
            without = [name for name in facts.findings if name not in prompts]
            listed += [{"finding": name, "reason": "no prompts"} for name in without]
        return {
            "truths": {truth: table.counts(split.patients) for truth, table in tables.items()},
            "prompts": prompts,
            "thresholds": fitted.thresholds if fixed is None else fixed,
            "threshold_from": f"{fixed:g}" if fixed is not None else chosen and f"best on the split {chosen}",
            "not_evaluable": listed,
        }

    def _threshold(self, fitted: Fitted, truth: str, model: str) -> float | None:
        """What a map has to exceed; None: nothing could choose. The priors are in [0, 1] always."""
        fixed: float | None = self.settings.threshold
        return fitted.thresholds[truth].get(model) if fixed is None else fixed

    def _priors(self, view: View) -> dict[str, dict[str, Floats]]:
        """See `Fitted`; none without a training split."""
        sums: dict[str, dict[str, Floats]] = {truth: {} for truth in self.truths}
        counts: dict[tuple[str, str], int] = {}
        split = view.split("train")
        for batch in view.batches("train") if split is not None else ():
            assert split is not None
            for place in (pair.place for pair in self._pairs(view, batch, split, set())):
                for name in {place.finding or "", ""}:
                    total = sums[place.truth].setdefault(name, np.zeros(place.pixels.shape))
                    total += place.pixels
                    counts[place.truth, name] = counts.get((place.truth, name), 0) + 1
        return {
            truth: {name: total / counts[truth, name] for name, total in of.items()}
            for truth, of in sums.items()
        }

    def _heats(self, pair: Pair, fitted: Fitted) -> dict[str, Floats]:
        """Model -> its map [S, S] of a pair, as it is scored."""
        from medvlp.evaluation.places import upsampled

        settings, place = self.settings, pair.place
        heats = {
            model: upsampled(grid, len(place.pixels), settings.upsampling, settings.smoothing)
            for model, grid in pair.grids.items()
        }
        if settings.scale == "image":
            heats = {model: min_max(heat) for model, heat in heats.items()}
        priors = fitted.priors[place.truth]
        if "" in priors:
            heats["prior"] = min_max(priors[""])
            heats["finding-prior"] = min_max(priors.get(place.finding or "", priors[""]))
        return heats

    def _prompts(self, facts: Facts) -> dict[str, Sequence[str]]:
        """Finding -> its positive prompts, of those that have any."""
        found = {name: self.book.prompts(name) for name in facts.findings}
        return {name: of.positive for name, of in found.items() if of is not None}

    def _shown(self, view: View, role: Role, hedged: set[tuple[int, str]]) -> Iterator[Pair]:
        """The pairs of a split with the maps of all networks; a batch is held at a time."""
        split = view.split(role)
        assert split is not None
        prompts = self._prompts(view.facts)
        for batch in view.batches(role):
            pairs = self._pairs(view, batch, split, hedged)
            findings = [pair for pair in pairs if not pair.place.phrase and pair.place.finding in prompts]
            phrases = [pair for pair in pairs if pair.place.phrase]
            for model in view.models if findings else ():
                self._show_findings(view, model, batch, findings)
            for model in view.models if phrases else ():
                self._show_phrases(view, model, batch, phrases)
            yield from findings + phrases

    def _pairs(self, view: View, batch: Batch, split: Split, hedged: set[tuple[int, str]]) -> list[Pair]:
        """What is there for certain in the images of a batch; hedged findings go to `hedged` instead."""
        from medvlp.evaluation.places import places  # here: it imports torch (see `task.py`)

        names, findings = view.facts.index.label_names, set(view.facts.findings)
        known = {int(position): row for row, position in enumerate(split.arrays.sample)}
        pairs = []
        for i, position in enumerate(batch.sample.tolist()):
            row = known[position]
            held = (places(batch, i, truth, names, split.phrases[row]) for truth in self.truths)
            for place in chain.from_iterable(held):
                finding = place.finding
                if finding is not None and batch.labels[i, names.index(finding)] == -1:
                    hedged.add((row, finding))
                    continue
                # Asked for single labels, a phrase of no single finding is no part of the answer.
                wanted = finding in findings if finding is not None else findings == set(names)
                if wanted:
                    pairs.append(Pair(place, i, row))
        return pairs

    def _show_findings(self, view: View, model: str, batch: Batch, pairs: Sequence[Pair]) -> None:
        """The maps of findings: mean over a finding's prompts."""
        from medvlp.evaluation.places import highest  # here: it imports torch

        prompts, wanted = self._prompts(view.facts), sorted({pair.place.finding or "" for pair in pairs})
        sentences = [sentence for name in wanted for sentence in prompts[name]]
        # The batch's maximum is one over all its images, those without the finding too.
        whole = self.settings.scale == "batch_max"
        images = list(range(len(batch.image))) if whole else sorted({pair.image for pair in pairs})
        maps = _maps(view, model, batch.image[images], sentences)
        means, start = dict[str, Any](), 0
        for name in wanted:
            end = start + len(prompts[name])
            of, start = maps[:, start:end].mean(1), end
            means[name] = of / highest(model, of) if whole else of
        for pair in pairs:
            pair.grids[model] = means[pair.place.finding or ""][images.index(pair.image)]

    def _show_phrases(self, view: View, model: str, batch: Batch, pairs: Sequence[Pair]) -> None:
        """The maps of phrases."""
        from medvlp.evaluation.places import highest  # as above

        images = sorted({pair.image for pair in pairs})
        for some in (images[start : start + _TOGETHER] for start in range(0, len(images), _TOGETHER)):
            of = [pair for pair in pairs if pair.image in some]
            sentences = list(dict.fromkeys(pair.place.phrase for pair in of))
            maps = _maps(view, model, batch.image[some], sentences)
            for pair in of:
                pair.grids[model] = maps[some.index(pair.image), sentences.index(pair.place.phrase)]
        if self.settings.scale == "batch_max":
            divisor = highest(model, *(pair.grids[model] for pair in pairs))
            for pair in pairs:
                pair.grids[model] = pair.grids[model] / divisor


def _maps(view: View, model: str, image: Tensor, sentences: Sequence[str]) -> Tensor:
    """[B, N, rows, columns] maps of N sentences in B images, on the CPU.

    Raises:
        NotFiniteError: they are not finite.
    """
    import torch

    text = view.tokenised(sentences).to(view.device)
    with torch.no_grad():
        maps = view.models[model].ground(image.to(view.device), text).float().cpu()
    if not maps.isfinite().all():
        raise NotFiniteError(f"maps of the {model} network")
    return maps
