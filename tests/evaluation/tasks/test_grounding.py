"""Grounding on maps whose answer is known, on phantoms from end to end, and against the published script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from medvlp.data.batch import Batch, Text
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate
from medvlp.evaluation.features import SplitArrays
from medvlp.evaluation.metrics.localisation import overlap, pointing
from medvlp.evaluation.places import places, upsampled
from medvlp.evaluation.session import View
from medvlp.evaluation.splits import Split
from medvlp.evaluation.task import EvaluationError, Facts, Role, Task, TaskResult
from medvlp.evaluation.tasks.grounding import Grounding, GroundingConfig
from medvlp.methods.medslip.method import fuse_anatomies, mean_attention
from medvlp.methods.medslip.modules import Decoded
from shards.errors import NotFiniteError
from shards.format import Index, SplitTotals
from tests.evaluation.prepared import NAMES, Prepared
from tests.golden_files import Golden, every
from tests.launcher.tiny_run import make_run, make_shards

SIZE, GRID, COUNT = 32, 8, 24
PROMPTS = "templates: {positive: ['{finding}']}"


def texts(sentences: Sequence[str]) -> Text:
    """Each sentence as the number of the finding it names, from 1; of other sentences 0."""
    found = [next((n for n, name in enumerate(NAMES, 1) if name in sentence), 0) for sentence in sentences]
    ids = torch.tensor(found)[:, None]
    return Text(ids, torch.ones_like(ids), ids, ids)


class Sees:
    """Finds a finding where the image says it is (bit n of its pixels); `worth` is the value there."""

    def __init__(self, worth: float = 1.0) -> None:
        self.worth, self.asked = worth, []

    def ground(self, image: Tensor, prompts: Text) -> Tensor:
        self.asked.append((len(image), len(prompts.input_ids)))
        bits = torch.cat([(image >> n) & 1 for n in prompts.input_ids[:, 0].tolist()], dim=1)
        return self.worth * torch.nn.functional.avg_pool2d(bits.float(), SIZE // GRID)


class Blind:
    """Sees the same everywhere."""

    def ground(self, image: Tensor, prompts: Text) -> Tensor:
        return torch.full((len(image), len(prompts.input_ids), GRID, GRID), 0.3)


def boxes_of(split: str, i: int) -> dict[int, list[float]]:
    """Finding -> its box on patch borders, of image `i` of a split: none, one or both."""
    rng = np.random.default_rng([i, len(split)])
    held = {n: (rng.integers(0, GRID - 2, 2) * 4).tolist() for n in range(2) if rng.random() < 0.7}
    return {n: [left, top, left + 8, top + 8] for n, (left, top) in held.items()}


class Placed(Prepared):
    """A session of images that hold two findings by boxes and masks, and a phrase of every box."""

    def __init__(self, splits: Sequence[str] = ("train", "valid", "test"), batch: int = 5) -> None:
        made = {name: self.made(name) for name in splits}
        super().__init__(made)
        totals = {name: SplitTotals(COUNT, 0, 0, 0, 0) for name in splits}
        self.reader = SimpleNamespace(index=Index("made", NAMES, totals, [], SIZE, None, "", {}))  # type: ignore[assignment]
        self.batch, self.networks = batch, {"trained": Sees(), "untrained": Blind()}
        self.hedged: set[tuple[str, int, int]] = set()

    @staticmethod
    def made(name: str) -> Split:
        phrases = [[f"some {NAMES[n]}" for n in boxes_of(name, i)] for i in range(COUNT)]
        patients = np.array([f"{name}-{i // 2}" for i in range(COUNT)])
        arrays = SplitArrays(np.arange(COUNT), np.zeros((COUNT, 1)))
        return Split(name, patients, [""] * COUNT, np.zeros((COUNT, 2)), arrays, phrases)

    def view(self, task: Task, roles: Sequence[Role], folder: Path | None) -> View:
        return PlacedView(self, task, self.facts(task), frozenset(roles), folder)


class PlacedView(View):
    def batches(self, role: Role) -> Iterator[Batch]:
        session: Any = self._session
        name = self._name(role)
        for start in range(0, COUNT if name else 0, session.batch):
            yield self.made(session, str(name), list(range(start, min(start + session.batch, COUNT))))

    def made(self, session: Any, name: str, rows: list[int]) -> Batch:
        image = torch.zeros(len(rows), 1, SIZE, SIZE, dtype=torch.uint8)
        labels = torch.zeros(len(rows), 2)
        masks = torch.zeros(len(rows), 2, SIZE, SIZE, dtype=torch.uint8)
        boxes, phrases = torch.full((len(rows), 2, 5), -1.0), torch.full((len(rows), 2, 6), -1.0)
        for i, row in enumerate(rows):
            for k, (n, box) in enumerate(boxes_of(name, row).items()):
                left, top, right, bottom = (int(v) for v in box)
                image[i, 0, top:bottom, left:right] += 2 << n
                masks[i, n, top:bottom, left:right] = 1
                labels[i, n] = -1 if (name, row, n) in session.hedged else 1
                boxes[i, k] = torch.tensor([n, *box])
                phrases[i, k] = torch.tensor([k, *box, n])
        fields = {"boxes": boxes, "masks": masks, "phrases": phrases}
        sample = torch.tensor(rows)
        text = texts([""] * len(rows))
        return Batch(image, text, sample, labels, [str(row) for row in rows], fields=fields)

    def tokenised(self, sentences: Sequence[str]) -> Text:
        return texts(sentences)

    @property
    def models(self) -> dict[str, Any]:
        return self._session.networks  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def grounding(tmp_path: Path, **settings: Any) -> Grounding:
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    return Grounding(GroundingConfig(prompts=str(tmp_path / "prompts.yaml"), **settings))


def run(tmp_path: Path, session: Placed | None = None, **settings: Any) -> TaskResult:
    return (session or Placed()).run(grounding(tmp_path, **settings))


@pytest.mark.parametrize("truth", ["boxes", "masks", "phrases"])
def test_a_map_that_sees_is_told_from_one_that_does_not(tmp_path: Path, truth: str) -> None:
    result = run(tmp_path, upsampling="nearest")
    seeing, blind, prior = (result.models[name] for name in ("trained", "untrained", "prior"))
    for measure in ("point", "iou", "dice", "auprc", "recall", "precision"):
        assert seeing[f"{measure}/{truth}/macro"].value == 1, measure
    assert seeing[f"empty/{truth}/macro"].value == 0
    assert blind[f"point/{truth}/macro"].value == blind[f"iou/{truth}/macro"].value == 0
    assert blind[f"empty/{truth}/macro"].value == 1
    area = 64 / SIZE**2
    assert blind[f"auprc/{truth}/macro"].value == pytest.approx(area)
    chance = result.models["chance"]
    assert chance[f"iou/{truth}/macro"].value == chance[f"point/{truth}/macro"].value == pytest.approx(area)
    assert chance[f"dice/{truth}/macro"].value == pytest.approx(2 * area / (1 + area))
    assert area < prior[f"auprc/{truth}/macro"].value < 0.5
    assert result.notes["truths"][truth]["pairs"] == sum(len(boxes_of("test", i)) for i in range(COUNT))
    assert result.notes["threshold_from"] == "best on the split valid"


def test_pairs_and_findings_are_averaged_apart_and_intervals_are_by_patient(tmp_path: Path) -> None:
    result = run(tmp_path, upsampling="bilinear")
    trained = result.models["trained"]
    counts = [sum(n in boxes_of("test", i) for i in range(COUNT)) for n in range(2)]
    values = [trained[f"iou/boxes/{name}"].value for name in NAMES]
    assert trained["iou/boxes/macro"].value == pytest.approx(np.mean(values))
    assert trained["iou/boxes/pairs"].value == pytest.approx(np.average(values, weights=counts))
    assert trained["iou/boxes/macro"].low <= values[0] or trained["iou/boxes/macro"].low <= values[1]
    assert counts[0] != counts[1]


@pytest.mark.parametrize("scale", ["image", "raw"])
def test_numbers_do_not_depend_on_the_batch(tmp_path: Path, scale: str) -> None:
    first = run(tmp_path, Placed(batch=1), scale=scale)
    second = run(tmp_path, Placed(batch=COUNT), scale=scale)
    assert first.notes == second.notes
    for model, metrics in first.models.items():
        assert {name: of.value for name, of in metrics.items()} == pytest.approx(
            {name: of.value for name, of in second.models[model].items()}, abs=1e-12
        )


def test_nothing_is_chosen_on_the_evaluated_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thresholds and the priors stay when the evaluated split holds something else."""
    session = Placed()
    task = grounding(tmp_path)
    before = task.fit(session.view(task, ("train", "selection"), None), task.units()[0])
    session.hedged = {("test", i, n) for i in range(COUNT) for n in range(2)}
    after = task.fit(session.view(task, ("train", "selection"), None), task.units()[0])
    assert before.thresholds == after.thresholds
    assert set(before.thresholds["masks"]) == {"trained", "untrained", "prior", "finding-prior"}
    with pytest.raises(ValueError, match="not evaluated"):
        list(task._shown(session.view(task, ("train", "selection"), None), "evaluated", set()))


def test_without_a_selection_split_there_is_no_iou_at_a_threshold(tmp_path: Path) -> None:
    result = run(tmp_path, Placed(["test"]))
    measures = {name.split("/")[0] for name in result.models["trained"]}
    assert measures == {"point", "auprc", "miou", "cnr", "cnr_signed"}
    assert set(result.models) == {"trained", "untrained", "chance"}
    assert any("no other split" in line for line in Grounding.reading.remarks(result.notes))
    fixed = run(tmp_path, Placed(["test"]), threshold=0.5)
    assert fixed.models["trained"]["recall/boxes/macro"].value > 0.5


def test_what_is_hedged_is_no_pair(tmp_path: Path) -> None:
    whole, session = run(tmp_path), Placed()
    session.hedged = {("test", i, 0) for i in range(12) if 0 in boxes_of("test", i)}
    part = run(tmp_path, session)
    assert part.notes["hedged"] == len(session.hedged) > 2
    for truth in ("boxes", "masks", "phrases"):
        lost = whole.notes["truths"][truth]["pairs"] - part.notes["truths"][truth]["pairs"]
        assert lost == len(session.hedged)


def test_a_finding_in_one_image_has_no_number_and_is_listed(tmp_path: Path) -> None:
    session = Placed()
    held = [i for i in range(COUNT) if 0 in boxes_of("test", i)]
    session.hedged = {("test", i, 0) for i in held[1:]}
    result = run(tmp_path, session, truth="masks")
    assert result.notes["not_evaluable"] == [
        {"finding": f"{NAMES[0]} (masks)", "reason": "in 1 image of test, needs 2"}
    ]
    trained = result.models["trained"]
    assert f"iou/masks/{NAMES[0]}" not in trained
    assert trained["iou/masks/macro"] == trained[f"iou/masks/{NAMES[1]}"]


def test_where_nothing_is_placed_the_task_says_so(tmp_path: Path) -> None:
    session = Placed()
    session.hedged = {("test", i, n) for i in range(COUNT) for n in range(2)}
    with pytest.raises(
        EvaluationError, match=r"no image of test has boxes or masks or phrases.*shards build"
    ):
        run(tmp_path, session)


def test_a_version_1_dataset_is_refused_with_the_remedy(tmp_path: Path) -> None:
    index = Index("old", NAMES, {}, [], SIZE, None, "", {}, version=1)
    reason = grounding(tmp_path).unavailable_on(Facts(index, ["test"], {"evaluated": "test"}, NAMES))
    assert reason is not None
    assert re.search("format version 1.*build it again with medvlp shards build", reason)


def test_a_method_without_maps_is_not_available(tmp_path: Path) -> None:
    task = grounding(tmp_path)
    assert task.unavailable_with(SimpleNamespace(grounds=True)) is None  # type: ignore[arg-type]
    assert task.unavailable_with(SimpleNamespace(grounds=False)) is not None  # type: ignore[arg-type]


def test_maps_of_a_batch_alone_are_held(tmp_path: Path) -> None:
    """No map outlives its batch, and only images that hold something are shown to the network."""
    session = Placed(batch=4)
    run(tmp_path, session, truth="masks")
    assert max(images for images, _ in session.networks["trained"].asked) <= 4
    shown = sum(images for images, _ in session.networks["trained"].asked)
    assert shown == sum(bool(boxes_of(name, i)) for name in ("valid", "test") for i in range(COUNT))


def test_values_that_are_not_finite_end_the_task(tmp_path: Path) -> None:
    session = Placed()
    session.networks["trained"] = Sees(float("nan"))
    with pytest.raises(NotFiniteError, match="maps of the trained network are NaN or infinite"):
        run(tmp_path, session)
    session.networks["trained"] = Sees(7.0)
    with pytest.raises(EvaluationError, match=r"a value outside -1.0 to 1.0: set evaluation.tasks.grounding"):
        run(tmp_path, session, scale="raw")


class TestQuirks:
    """Each switch moves the number the way the published mistake does."""

    area: ClassVar[float] = 64 / SIZE**2

    def test_tied_maxima_all_hit(self, tmp_path: Path) -> None:
        assert run(tmp_path).models["untrained"]["point/boxes/macro"].value == 0
        assert run(tmp_path, ties="any").models["untrained"]["point/boxes/macro"].value == 1

    def test_raw_values_above_0_call_every_pixel(self, tmp_path: Path) -> None:
        blind = run(tmp_path, scale="raw", threshold=0.0).models["untrained"]
        assert blind["iou/boxes/macro"].value == pytest.approx(self.area), "the area share, for every network"
        assert blind["recall/boxes/macro"].value == 1

    def test_a_batch_maximum_depends_on_the_company(self, tmp_path: Path) -> None:
        found = []
        for batch in (1, COUNT):
            session = Placed(batch=batch)
            session.networks["trained"] = Uneven()
            found.append(run(tmp_path, session, scale="batch_max", threshold=0.5).models["trained"])
        assert found[0]["iou/boxes/macro"].value > found[1]["iou/boxes/macro"].value + 0.1

    @pytest.mark.parametrize("truth", ["boxes", "phrases"])
    @pytest.mark.parametrize("worth", [-1.0, 0.0])
    def test_a_batch_maximum_that_is_not_above_0_is_refused(
        self, truth: str, worth: float, tmp_path: Path
    ) -> None:
        """Divided by it, the lowest places would have become the highest, or no numbers."""
        session = Placed()
        session.networks["trained"] = Below(worth)
        with pytest.raises(
            EvaluationError, match=r"trained network.*scale=batch_max divides: set evaluation"
        ):
            run(tmp_path, session, scale="batch_max", truth=truth, threshold=0.5)

    def test_the_sign_of_contrast(self, tmp_path: Path) -> None:
        session = Placed()
        session.networks["trained"] = Sees(-1.0)
        inverted = run(tmp_path, session).models["trained"]
        assert inverted["cnr_signed/boxes/macro"].value < 0 < inverted["cnr/boxes/macro"].value

    def test_smoothing_and_upsampling_blur(self, tmp_path: Path) -> None:
        sharp, soft, softer = (
            run(tmp_path, **settings).models["trained"]["cnr_signed/boxes/macro"].value
            for settings in ({"upsampling": "nearest"}, {}, {"smoothing": 1.5})
        )
        # Without noise in- and outside the ratio is 0 by definition; a blurred map has a finite one.
        assert sharp == 0
        assert soft > softer > 0


class Uneven(Sees):
    """Brighter images give higher maps."""

    def ground(self, image: Tensor, prompts: Text) -> Tensor:
        share = (image > 0).float().mean((1, 2, 3))
        return super().ground(image, prompts) * (share / 0.2 + 0.01)[:, None, None, None]


class Below(Sees):
    """`worth` and less everywhere, highest where the finding is."""

    def ground(self, image: Tensor, prompts: Text) -> Tensor:
        seen = torch.nn.functional.avg_pool2d(image.float(), SIZE // GRID) - image.max()
        return self.worth + self.worth * -seen.expand(-1, len(prompts.input_ids), -1, -1)


def test_places_of_a_batch_are_those_stored(tmp_path: Path) -> None:
    session = Placed()
    task = grounding(tmp_path)
    view: Any = session.view(task, ("evaluated",), None)
    batch = next(view.batches("evaluated"))
    for i in range(5):
        stored = boxes_of("test", i)
        for truth in ("boxes", "masks", "phrases"):
            found = list(places(batch, i, truth, NAMES, session.split("test").phrases[i]))
            assert [place.finding for place in found] == [NAMES[n] for n in stored]
            assert [bool(place.phrase) for place in found] == [truth == "phrases"] * len(stored)
            for place, (left, top, right, bottom) in zip(found, stored.values(), strict=True):
                expected = np.zeros((SIZE, SIZE), dtype=bool)
                expected[int(top) : int(bottom), int(left) : int(right)] = True
                np.testing.assert_array_equal(place.pixels, expected)
    batch.fields["phrases"][:, :, 5] = -1
    assert {place.finding for place in places(batch, 0, "phrases", NAMES, ["a", "b"])} <= {None}


@every("medslip_grounding_*.npz")
def test_the_published_numbers(golden: Golden) -> None:
    """MeDSLIP's script: batch maximum, nearest, any tied maximum, a fixed threshold, positive images."""
    query, labels, seg = int(golden("query")), golden("labels")[:, 0].numpy(), golden("seg").numpy() > 0
    pathology = mean_attention(Decoded(torch.empty(0), golden("attn_pathology")[:, :, query : query + 1]))
    anatomy = mean_attention(Decoded(torch.empty(0), golden("attn_anatomy")))
    settings = {name.removesuffix("_iou") for name in golden.names("use") if name.endswith("_iou")}
    assert settings
    for setting in settings:
        threshold = float(setting.split("_thr")[1])
        maps = fuse_anatomies(pathology, anatomy) if setting.startswith("use1") else pathology
        grids = maps[:, 0].unflatten(1, (14, 14)) / maps.max()
        np.testing.assert_allclose(grids, golden(f"{setting}_heat14"), rtol=1e-5, atol=1e-7)
        rows = np.flatnonzero(labels == 1)
        heats = [upsampled(grids[row], seg.shape[-1], "nearest", 0) for row in rows]
        found = [overlap(heat, seg[row], threshold) for heat, row in zip(heats, rows, strict=True)]
        points = [pointing(heat, seg[row], "any") for heat, row in zip(heats, rows, strict=True)]
        assert len(rows) == int(golden(f"{setting}_num"))
        assert sum(points) == int(golden(f"{setting}_point"))
        for measure in ("iou", "dice"):
            np.testing.assert_allclose(
                [of[measure] for of in found], golden(f"{setting}_{measure}").numpy(), rtol=1e-6
            )


def test_a_run_on_phantoms_from_end_to_end(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "phantom")
    options = EvaluationOptions(make_run(shards, tmp_path / "run"), str(shards), ["grounding"])
    found = evaluate(options, lambda line: None)
    models = found.results["grounding"]
    assert list(models) == ["trained", "untrained", "prior", "finding-prior", "chance"]
    notes = found.notes["grounding"]
    assert set(notes["truths"]) == {"boxes", "masks", "phrases"}
    assert set(notes["thresholds"]["phrases"]) == {"trained", "untrained", "prior", "finding-prior"}
    for truth in notes["truths"]:
        chance, prior = (models[name][f"auprc/{truth}/macro"].value for name in ("chance", "finding-prior"))
        assert prior > chance + 0.05
        assert 0 < models["trained"][f"iou/{truth}/macro"].value < 1
