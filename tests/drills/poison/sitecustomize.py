"""Turns the image of one sample into NaN in the ranks of `medvlp pretrain`; Python imports this at its start.

A stored image cannot hold NaN: shards hold 8-bit pixels. So the fault is put in where the loader hands out a
batch, in every rank, for the sample whose key `MEDVLP_DRILL_POISON` names; all behind that is the real thing.
"""

import os

if "RANK" in os.environ and "MEDVLP_DRILL_POISON" in os.environ:
    from medvlp.data.dataset import TrainingDataset

    _load = TrainingDataset.__getitem__

    def _poisoned(self, request):
        batch = _load(self, request)
        key = os.environ["MEDVLP_DRILL_POISON"]
        if key in batch.keys:
            batch.image = batch.image.float() / 127.5 - 1
            batch.image[batch.keys.index(key)] = float("nan")
        return batch

    TrainingDataset.__getitem__ = _poisoned
