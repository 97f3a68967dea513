"""A trained model for notebooks: embeddings, similarities, zero-shot findings, places, neighbours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp.data.batch import Text
from medvlp.data.report import report_sentences
from medvlp.data.transforms import evaluation_crop
from medvlp.device import device_named
from medvlp.evaluation import prompts as prompt_files
from medvlp.evaluation.features import ModelArrays, exact_kernels
from medvlp.evaluation.heads.report import ReportObjective
from medvlp.evaluation.prompts import Prompts
from medvlp.evaluation.tasks.zero_shot import Ensemble, finding_scores, prompts_of
from medvlp.library.images import ImageLike, Seen, images_of, is_dicom, see, stacked
from medvlp.library.loading import Loaded, read_model
from shards.dicom_windows import Window
from shards.errors import NotFiniteError, UsageError
from shards.progress import tracked

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
#: Images of one forward pass.
BATCH = 32
#: Images or texts from which on their encoding shows how far it is.
SHOWN = 256


class Neighbour(NamedTuple):
    """One of the nearest: its position in what was searched, and its cosine to the query."""

    position: int
    similarity: float


@dataclass(frozen=True)
class Grounding:
    """Where in an image a phrase is seen.

    Attributes:
        image: [H, W] uint8 as it was given.
        map: [H, W] float32 over it, higher where the phrase is seen; NaN where the network saw nothing
            (outside the square crop). Compare inside a map, not between methods.
        phrase: what was asked.
    """

    image: NDArray[np.uint8]
    map: NDArray[np.float32]
    phrase: str

    @property
    def peak(self) -> tuple[int, int]:
        """(row, column) of the highest value, in pixels of the image.

        >>> found = model.ground(films[0], "cardiomegaly")
        >>> bool(found.map[found.peak] == found.map.max())
        True
        """
        row, column = np.unravel_index(np.nanargmax(self.map), self.map.shape)
        return int(row), int(column)

    def overlay(self) -> NDArray[np.uint8]:
        """[H, W, 3] RGB: the image, redder where the map is higher.

        >>> found = model.ground(films[0], "cardiomegaly")
        >>> found.overlay().shape == (*found.image.shape, 3)
        True
        """
        low, high = np.nanmin(self.map), np.nanmax(self.map)
        share = np.nan_to_num((self.map - low) / max(float(high - low), 1e-12))[..., None]
        gray = np.repeat(self.image[..., None], 3, 2).astype(np.float32)
        red = np.array([255.0, 40.0, 40.0], dtype=np.float32)
        blended: NDArray[np.uint8] = np.rint(gray * (1 - 0.6 * share) + red * 0.6 * share).astype(np.uint8)
        return blended


class Model:
    """A method with its weights; made by `medvlp.load`.

    All results are on the CPU in float32. Images are paths (JPEG, PNG, TIFF, DICOM), uint8 arrays [H, W] or
    [H, W, 3], uint8 tensors [H, W], [1, H, W] or [B, 1, H, W]: one, or a sequence of any of them.

    Attributes:
        name: of the run. config: of the run. method: the network. device: where it runs.

    >>> model.name, model.width
    ('first', 8)
    """

    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        """See `medvlp.load`."""
        self.name, self.config, self._tokenizer = loaded.name, loaded.config, loaded.tokenizer
        self.method, self.device, self._stored = loaded.method.to(device), device, loaded.stored
        self._objective = None if loaded.objective is None else loaded.objective.to(device)
        self._moved, self._window = loaded.moved, loaded.window

    @classmethod
    def load(cls, place: str | Path, device: str | None = None, window: str | None = None) -> Self:
        """See `medvlp.load`."""
        if window is not None and window not in get_args(Window):
            raise UsageError(f"window {window}: there are {', '.join(get_args(Window))}")
        chosen, loaded = device_named(device or "auto"), read_model(Path(place))
        return cls(loaded if window is None else replace(loaded, window=cast("Window", window)), chosen)

    @property
    def width(self) -> int:
        """D of the embeddings.

        >>> model.width
        8
        """
        return int(self.encode_image(np.zeros((8, 8), dtype=np.uint8)).shape[1])

    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Images -> [B, D] unit-norm embeddings, in the space of the texts'.

        Of a run that has taught its encoder a task: comparable with each other, no longer with texts.

        Raises:
            UsageError: the method embeds no images, or an image that is none.
            DataError: a file that cannot be read.
            NotFiniteError: the network has diverged, here and wherever it is asked.

        >>> model.encode_image(films).shape
        torch.Size([2, 8])
        """
        if not self.method.embeds_images:
            raise UsageError(
                f"{self.name} embeds no images (a backbone alone, or no loss shaped embeddings): use "
                "image_features"
            )
        return self._of_images(images, self.method.encode_image)

    def image_features(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Images -> [B, F] features of the backbone before any projection, for probes.

        >>> model.image_features(films[0]).shape
        torch.Size([1, 64])
        """
        if not self.method.has_image_features:
            raise UsageError(f"{self.name} has no image encoder")
        return self._of_images(images, self.method.image_features)

    def encode_text(self, texts: str | Sequence[str], clean: bool = True) -> Tensor:
        """Texts -> [N, D] unit-norm embeddings.

        Args:
            texts: one, or several.
            clean: cut into sentences and cleaned as the reports of the training were; false: as they stand,
                which zero-shot evaluation does with prompts.

        Raises:
            UsageError: the method embeds no reports, or a text has no words it reads.

        >>> model.encode_text(["no pleural effusion", "the heart is enlarged"]).shape
        torch.Size([2, 8])
        """
        if not self.method.embeds_reports:
            instead = "similarity, or zero_shot" if self.method.scores_prompts else "image_features"
            raise UsageError(f"the method {self.config.method.name} embeds no reports: use {instead}")
        given = [texts] if isinstance(texts, str) else list(texts)
        data = self.config.data
        reports = [
            report_sentences({"findings": text}, ["findings"], data.cleaning) if clean else [text]
            for text in given
        ]
        for number, sentences in enumerate(reports):
            if not any(sentence.strip() for sentence in sentences):
                raise UsageError(
                    f"text {number} has no words that the method reads (data.cleaning={data.cleaning}): say "
                    "more, or clean=False for a short prompt"
                )
        return self._in_batches(reports, lambda rows: self.method.encode_text(self._tokens(rows)))

    def similarity(
        self, images: ImageLike | Sequence[ImageLike], prompts: str | Sequence[str]
    ) -> NDArray[np.float32]:
        """[B, N] scores of images with prompts as they stand, as the method scores them (higher: more alike).

        Raises:
            UsageError: the method scores none, or the run has taught its encoders a task.

        >>> model.similarity(films, ["pneumothorax", "no pneumothorax"]).shape
        (2, 2)
        """
        if not self.method.scores_prompts:
            raise UsageError(
                f"{self.name} scores no prompts (a backbone alone, or no loss taught it to): use "
                "image_features"
            )
        self._check_aligned("similarity")
        texts = self._tokens([[text] for text in ([prompts] if isinstance(prompts, str) else prompts)])
        scores = self._of_images(images, lambda views: self.method.score(views, texts))
        found: NDArray[np.float32] = scores.numpy()
        return found

    def zero_shot(
        self,
        images: ImageLike | Sequence[ImageLike],
        findings: str | Sequence[str] | Mapping[str, Prompts],
        prompts: str | Path | None = None,
    ) -> pd.DataFrame:
        """Scores of findings as `medvlp evaluate --task zero-shot` has them: stated against denied.

        Scores order images by a finding; they are no probabilities, and no threshold is chosen here.

        Args:
            images: see the class.
            findings: one name, several, or name -> `medvlp.Prompts` of one's own.
            prompts: YAML file of prompts (see `medvlp.evaluation.prompts`); default: templates.

        Returns:
            A row for each image (its path, or its position), a column for each finding.

        Raises:
            UsageError: a name for which there are no prompts; or see `similarity`.

        >>> model.zero_shot(films, ["cardiomegaly", "effusion"]).columns.tolist()
        ['cardiomegaly', 'effusion']
        """
        import pandas as pd

        self._check_aligned("zero_shot")
        names = [findings] if isinstance(findings, str) else list(findings)
        if isinstance(findings, Mapping):
            chosen = dict(findings)
        else:
            chosen = prompts_of(prompt_files.read(prompts), names)
        if without := [name for name in names if name not in chosen]:
            raise UsageError(f"no prompts for {without[0]!r}: name a finding, or give its prompts")
        ensemble, given = Ensemble.of(chosen), images_of(images)
        if self.method.scores_by_embedding:
            arrays = ModelArrays(image=self.encode_image(given).numpy())
            texts: Any = self.encode_text(ensemble.sentences, clean=False).numpy()
        else:
            own = self.similarity(given, ensemble.sentences)
            arrays, texts = ModelArrays(scores={tuple(ensemble.sentences): own}), None
        scores = finding_scores(arrays, texts, ensemble, list(chosen))
        rows = pd.Index(_names(given), name="image", dtype=object)  # pandas' own texts hold UTF-8 names only
        return pd.DataFrame(scores, index=rows, columns=list(chosen))

    def ground(self, image: ImageLike, phrase: str) -> Grounding:
        """Where in one image a phrase is seen.

        Raises:
            UsageError: the method gives no such map, or the run has taught its encoders a task.

        >>> found = model.ground(films[0], "left pleural effusion")
        >>> found.map.shape == found.image.shape
        True
        """
        if not self.method.grounds:
            raise UsageError(
                f"the method {self.config.method.name} gives no map of a text as it is configured"
            )
        self._check_aligned("ground")
        seen = self._seen(image)
        with torch.no_grad(), exact_kernels():
            maps = self.method.ground(stacked([seen]).to(self.device), self._tokens([[phrase]]))
        grid = self._finite(maps[0, 0].float().cpu()).numpy()
        return Grounding(seen.pixels, seen.laid_out(grid), phrase)

    def report(self, images: ImageLike | Sequence[ImageLike]) -> list[str]:
        """The reports that a network writes of images, after `medvlp finetune RUN task=report`.

        Machine-written text, for research: it may state what is not there.

        Raises:
            UsageError: the network has not learned it.

        >>> model.report(films[0])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        shards.errors.UsageError: first has not learned to write reports: medvlp finetune RUN task=report ...
        """
        if not isinstance(self._objective, ReportObjective):
            raise UsageError(
                f"{self.name} has not learned to write reports: medvlp finetune RUN task=report "
                "run.dir=DIR teaches it, then load DIR"
            )
        # A search among words goes on where their probabilities are NaN: only the weights tell.
        for value in self._objective.state_dict().values():
            self._finite(value)
        with torch.no_grad(), exact_kernels():
            return [
                text
                for rows in _batches(images_of(images))
                for text in self._objective.write(stacked([self._seen(one) for one in rows]).to(self.device))
            ]

    def nearest(self, query: Tensor | str | ImageLike, among: Tensor, count: int = 5) -> list[Neighbour]:
        """The nearest of many embeddings to a text, an image, or an embedding.

        Args:
            query: a text (a string that is no file), an image (a path or array), or an embedding [D].
            among: [N, D] from `encode_image`, `encode_text` or a file of `medvlp embed`.
            count: how many.

        Raises:
            UsageError: widths differ, or a text is asked of a run that has taught its encoders a task.

        >>> [place.position for place in model.nearest(films[1], model.encode_image(films), 1)]
        [1]
        """
        if isinstance(query, Tensor) and query.is_floating_point():
            wanted = query.reshape(-1)
        elif isinstance(query, str) and not _is_file(query):
            self._check_aligned("nearest with a text")
            wanted = self.encode_text(query, clean=False)[0]
        else:
            wanted = self.encode_image(query)[0]
        if wanted.shape != among.shape[1:]:
            raise UsageError(f"a query of width {len(wanted)} among embeddings of shape {list(among.shape)}")
        cosines = torch.nn.functional.normalize(among.float(), dim=1) @ torch.nn.functional.normalize(
            wanted, dim=0
        )
        best = cosines.topk(min(count, len(among)))
        return [Neighbour(int(row), float(value)) for value, row in zip(*best, strict=True)]

    def _of_images(
        self, images: ImageLike | Sequence[ImageLike], forward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return self._in_batches(
            images_of(images),
            lambda rows: forward(stacked([self._seen(one) for one in rows]).to(self.device)),
        )

    def _in_batches(self, items: Sequence[Item], forward: Callable[[Sequence[Item]], Tensor]) -> Tensor:
        if not items:
            raise UsageError("nothing was given: give at least one image or text")
        batches: Iterable[Sequence[Item]] = _batches(items)
        if len(items) > SHOWN:
            batches = tracked(batches, "encoding", len(items), size=len)
        with torch.no_grad(), exact_kernels():
            return self._finite(torch.cat([forward(rows).float().cpu() for rows in batches]))

    def _finite(self, values: Tensor) -> Tensor:
        if not values.isfinite().all():
            raise NotFiniteError(f"numbers of the network of {self.name}")
        return values

    def _check_aligned(self, what: str) -> None:
        """Refuse to compare images with texts after a training that has left their common space."""
        if self._moved:
            task, run = self.config.task, self.config.finetune.run
            raise UsageError(
                f"{self.name} has learned task {task}, which moved its encoders away from the texts, so that "
                f"{what} would compare what is not comparable: load the pre-training ({run}), or measure the "
                f"task with medvlp evaluate {run} --task {task}"
            )

    def _seen(self, image: ImageLike) -> Seen:
        data = self.config.data
        if self._window is None and isinstance(image, str | Path) and is_dicom(Path(image)):
            self._window = "auto"
            logger.warning(
                "%s does not say how the DICOM films of its training were shown: their own windows are used "
                "(another way: window, of `medvlp.load`, or --window)",
                self.name,
            )
        crop = evaluation_crop(data.transform)
        return see(image, self._stored, data.image_size, crop, self._window or "auto")

    def _tokens(self, reports: Sequence[Sequence[str]]) -> Text:
        data = self.config.data
        return self._tokenizer.tokenize(reports, data.max_tokens, data.pad_to_max).to(self.device)


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _is_file(text: str) -> bool:
    """Whether a text names a file; a report is longer than any name."""
    try:
        return Path(text).is_file()
    except OSError:
        return False


def _names(images: Sequence[ImageLike]) -> list[str]:
    return [str(one) if isinstance(one, str | Path) else str(number) for number, one in enumerate(images)]
