"""Pre-training of medical vision-language models on image-report pairs.

In a notebook:

    import medvlp

    model = medvlp.load("runs/first")
    model.zero_shot(["film.png"], ["pleural effusion", "pneumothorax"])
    dataset = medvlp.open_dataset("shards/")

Importing this package imports no torch; the first call does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvlp.evaluation.prompts import Prompts as Prompts
    from medvlp.library.dataset import Dataset as Dataset
    from medvlp.library.model import Model as Model

#: Name -> module that has it.
_LAZY = {
    "Dataset": "medvlp.library.dataset",
    "Model": "medvlp.library.model",
    "Prompts": "medvlp.evaluation.prompts",
}

__all__ = ["Dataset", "Model", "Prompts", "load", "open_dataset"]


def load(place: str | Path, device: str | None = None, window: str | None = None) -> Model:
    """A trained model from a run folder, a checkpoint folder or a folder of `medvlp export`.

    Checksums are verified and no code in it is run. One process, no distributed set-up.

    Args:
        place: the folder.
        device: "auto" (the default: CUDA where there is one), "cpu" or "cuda".
        window: how DICOM films are shown: "auto", "max" or "equalize"; None: as those of the training were.

    Raises:
        MedvlpError: no such folder or device, or a damaged folder; the message says what to do.

    >>> medvlp.load(run).encode_image(films).shape
    torch.Size([2, 8])
    """
    from medvlp.library.model import Model

    return Model.load(place, device, window)


def open_dataset(root: str | Path, split: str | None = None) -> Dataset:
    """The samples of a dataset of shards.

    Args:
        root: dataset folder or URL prefix.
        split: one split; default: all, one after the other.

    Raises:
        DataError: no dataset there, or no such split.

    >>> medvlp.open_dataset(folder, "train")[0].report != ""
    True
    """
    from medvlp.library.dataset import Dataset

    return Dataset(root, split)


def __getattr__(name: str) -> Any:
    """The classes, imported when they are first asked for."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'medvlp' has no attribute {name!r}")
