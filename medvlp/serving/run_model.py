"""A run's method as the server and the builder use it: texts and images of anybody to embeddings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medvlp.config import Config
from medvlp.data.report import report_sentences
from medvlp.data.text import Tokenizer
from medvlp.data.transforms import evaluation_crop, evaluation_view
from medvlp.methods.base import Method
from medvlp.runs import saved_run
from medvlp.runs.saved_run import SavedRun
from medvlp.serving.layout import PrototypeFilesError
from medvlp.serving.questions import RequestError, check_texts
from medvlp.serving.snapshot import Origin
from shards.errors import DataError
from shards.images import MAX_PIXELS, decode_image, fit_square


class RunModel:
    """The method with the weights of one checkpoint, in evaluation mode, float32; for one thread at a time.

    Args:
        source: run and checkpoint.
        device: where to run.
        data: dataset folder or URL in place of the run's own.
        reads_data: whether samples of it are read (only the builder does).

    Raises:
        PrototypeFilesError: its method embeds no images.
        MedvlpError: config, tokenizer or weights cannot be read.
    """

    def __init__(
        self, source: SavedRun, device: torch.device, data: str | None = None, reads_data: bool = True
    ) -> None:
        self.source, self.device = source, device
        self.config: Config = saved_run.load_config(source, [], data, reads_data)
        if reads_data:
            saved_run.check_place(source, self.config, data is not None)
        self.tokenizer: Tokenizer = saved_run.load_tokenizer(source, self.config)
        self.method: Method = saved_run.load_method(source, self.config, self.tokenizer).to(device)
        if not self.method.embeds_images:
            raise PrototypeFilesError(
                f"{source.run}: the method {self.config.method.name} embeds no images (no loss shaped "
                "embeddings), so there is nothing to cluster or to look up"
            )

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """n texts -> [n, D] float32 unit-norm embeddings on the CPU.

        They are cut into sentences and cleaned as the reports of the training were.

        Raises:
            RequestError: the method embeds no reports, or a text is not UTF-8 or has no words.
        """
        if not self.method.embeds_reports:
            raise RequestError(
                f"the method {self.config.method.name} embeds no reports: ask with an image or an embedding"
            )
        check_texts(texts)
        data = self.config.data
        reports = [report_sentences({"findings": text}, ["findings"], data.cleaning) for text in texts]
        for number, sentences in enumerate(reports):
            if not sentences:
                raise RequestError(f"text {number} has no words that the method reads; say more")
        tokens = self.tokenizer.tokenize(reports, data.max_tokens, data.pad_to_max)
        return self.method.encode_text(tokens.to(self.device)).float().cpu()

    @torch.no_grad()
    def embed_images(self, files: Sequence[bytes], stored_size: int, max_pixels: int = MAX_PIXELS) -> Tensor:
        """n image files -> [n, D] float32 unit-norm embeddings on the CPU.

        Args:
            files: JPEG, PNG or TIFF.
            stored_size: side of the square the dataset stores images in; files are fitted into it first.
            max_pixels: larger images are refused before they are decoded.

        Raises:
            RequestError: a file cannot be decoded or is too large.
        """
        size = self.config.data.image_size
        views = np.empty((len(files), 1, size, size), dtype=np.uint8)
        crop = evaluation_crop(self.config.data.transform)
        for number, file in enumerate(files):
            try:
                square, *_ = fit_square(decode_image(file, max_pixels), stored_size)
            except DataError as error:
                raise RequestError(f"image {number}: {error}; send a smaller or whole file") from error
            views[number, 0] = evaluation_view(square, size, crop)[0]
        return self.method.encode_image(torch.from_numpy(views).to(self.device)).float().cpu()


def checkpoint_of(run: Path, origin: Origin) -> SavedRun:
    """The checkpoint that a snapshot was made of.

    Raises:
        PrototypeFilesError: it has been deleted, or replaced by that of another training.
        CheckpointError: it is damaged.
    """
    folder = run / "checkpoints" / origin.checkpoint
    if not folder.is_dir():
        raise PrototypeFilesError(
            f"{folder} is gone, so nothing can be embedded as the stored prototypes were; "
            "make them anew: medvlp prototypes build RUN"
        )
    found = saved_run.locate(folder)
    if origin.weights not in ("", found.weights):
        raise PrototypeFilesError(
            f"{folder} holds other weights than the stored prototypes were made with: make them anew: "
            "medvlp prototypes build RUN"
        )
    return found
