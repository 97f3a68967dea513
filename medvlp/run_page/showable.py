"""Which images and texts of samples may stand on a page: those of phantoms, and others on the user's word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import medvlp
from medvlp.library.dataset import Dataset
from shards.errors import MedvlpError
from shards.format import is_remote


class NotShownError(MedvlpError):
    """Something is left out of the page; the message says why and what to do."""


@dataclass(frozen=True)
class Asked:
    """What the user wants to see of samples.

    Attributes:
        samples: test images of a run; 0: no image and no report of any sample anywhere on the page.
        data: where the data are now; None: where the run says.
        include_samples: also data that are no phantoms.
    """

    samples: int = 4
    data: str | None = None
    include_samples: bool = False


def is_phantom(dataset: Dataset) -> bool:
    """Whether the images are drawn ones, which anybody may see."""
    source = dataset.arguments.get("source")
    return isinstance(source, dict) and source.get("name") == "phantom"


def showable(root: str, split: str, fingerprint: str, asked: Asked) -> Dataset:
    """The split of a dataset whose samples may stand on the page.

    Args:
        root: where the run says that it is; used if it is a folder. fingerprint: of the data that are meant.

    Raises:
        NotShownError: it is not there, is another one, or holds patients and nobody has said that it may.
    """
    if asked.samples == 0:
        raise NotShownError("images and reports of samples are left out (--samples 0)")
    if asked.data is None and (is_remote(root) or not Path(root).is_dir()):
        raise NotShownError(f"the data are not at {root}; --data says where")
    try:
        dataset = medvlp.open_dataset(asked.data or root, split)
    except MedvlpError as error:
        raise NotShownError(f"the data cannot be read: {error}") from error
    if dataset.fingerprint != fingerprint:
        raise NotShownError(f"{asked.data or root} is not what was evaluated")
    if not (asked.include_samples or is_phantom(dataset)):
        raise NotShownError("images and reports of patients stand in the page only with --include-samples")
    return dataset
