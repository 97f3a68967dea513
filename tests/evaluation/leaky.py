"""A dataset whose splits share patients and images, as VQA-RAD's published ones do."""

from __future__ import annotations

from dataclasses import replace

from shards.sources.phantom import PhantomSource
from shards.study import Study


class Twice(PhantomSource):
    """30 training images, of which every third stands in the test split, too; 6 for validation."""

    def __init__(self) -> None:
        super().__init__(studies=36, image_size=32, seed=3)

    def __len__(self) -> int:
        return 46

    def load(self, i: int) -> list[Study]:
        of, key = self._image(i), self.split_key(i)
        return [replace(study, study_id=f"{key}-{i}", patient_id=key) for study in super().load(of)]

    def split_key(self, i: int) -> str:
        return f"patient-{self._image(i)}"

    def prescribed_split(self, i: int) -> str:
        return "train" if i < 30 else "valid" if i < 36 else "test"

    def _image(self, i: int) -> int:
        return i if i < 36 else 3 * (i - 36)
