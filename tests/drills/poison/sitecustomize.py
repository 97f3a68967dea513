"""Faults in the loader of `medvlp pretrain` that no stored file can have; Python imports this at its start.

They are put in where the dataset hands out a batch; all behind that is the real thing.

- `MEDVLP_DRILL_POISON=KEY`: the image of that sample is NaN, in every rank (shards hold 8-bit pixels);
  `*`: one of every batch.
- `MEDVLP_DRILL_FAIL=POSITION`: reading that position of the split fails with a MemoryError, once the file
  `MEDVLP_DRILL_FAILED` (if given) tells when.
"""

import os
from pathlib import Path

if "RANK" in os.environ and "MEDVLP_DRILL_POISON" in os.environ:
    from medvlp.data.dataset import TrainingDataset

    _load = TrainingDataset.__getitem__

    def _poisoned(self, request):
        batch = _load(self, request)
        key = os.environ["MEDVLP_DRILL_POISON"]
        key = batch.keys[0] if key == "*" else key
        if key in batch.keys:
            batch.image = batch.image.float() / 127.5 - 1
            batch.image[batch.keys.index(key)] = float("nan")
        return batch

    TrainingDataset.__getitem__ = _poisoned

if "MEDVLP_DRILL_FAIL" in os.environ:
    from medvlp.data.dataset import TrainingDataset

    _read = TrainingDataset.__getitem__

    def _failing(self, request):
        if int(os.environ["MEDVLP_DRILL_FAIL"]) in request[1]:
            if "MEDVLP_DRILL_FAILED" in os.environ:
                Path(os.environ["MEDVLP_DRILL_FAILED"]).touch()
            raise MemoryError
        return _read(self, request)

    TrainingDataset.__getitem__ = _failing
