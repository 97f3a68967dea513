"""What tells a sample again in another dataset: hashes of its ids, pixels and report, and of how it looks.

Two perceptual hashes, both signs of the lowest frequencies of the image against their median (pHash): 8 x 8
of them find candidates, 16 x 16 tell films of different patients apart, which look alike. Measured on 1,000
films of NIH ChestX-ray14: copies at another size and JPEG quality differ in at most 2 of 64 and 6 of 256
bits; of 499,500 pairs of different films 3 differ in at most 4 of 64 bits, and those in at least 64 of 256.
Histogram equalisation moves more bits than that: such copies are not found.
"""

from pathlib import Path

import cv2
import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format import IMAGE_EXTENSIONS, Index, Shard
from shards.images import decode_image
from shards.progress import tracked
from shards.reader import scan_shard
from shards.workers import run_tasks

#: One sample; 0 stands for "has none" of ids and report.
FINGERPRINT = np.dtype(
    [(name, "<u8") for name in ("patient", "study", "pixels", "report", "coarse")] + [("fine", "<u8", (4,))]
)
#: Most differing bits of two copies of one image.
COARSE_BITS, FINE_BITS = 4, 24

Fingerprints = NDArray[np.void]


def fingerprints(root: Path, workers: int = 1) -> dict[str, Fingerprints]:
    """Split -> [samples] of `FINGERPRINT`, in the order of the split.

    Raises:
        DataError: the dataset cannot be read; names shard and key.
    """
    index = Index.load(root)
    hashed = run_tasks(_of_shard, (root, index), index.shards, workers)
    found = dict(tracked(hashed, f"hashing images of {root}", len(index.shards)))
    empty = np.zeros(0, FINGERPRINT)
    return {
        split: np.concatenate([empty, *(found[shard.file] for shard in index.split_shards(split))])
        for split in index.splits
    }


def pixel_hash(image: NDArray[np.uint8]) -> int:
    """64 bits that are equal for equal pixels [height, width]."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(image).data, seed=image.shape[1])


def perceptual_hash(image: NDArray[np.uint8], side: int) -> NDArray[np.uint64]:
    """[side * side / 64] words of bits of an image [height, width]: pHash with side x side frequencies.

    Hand-written: these lines are all of it, and the package ImageHash would bring PyWavelets along.
    """
    small = cv2.resize(image, (4 * side, 4 * side), interpolation=cv2.INTER_AREA).astype(np.float32)
    waves = cv2.dct(small)[:side, :side].ravel()
    # The first is the mean brightness, which says nothing about what is seen.
    return np.packbits(waves > np.median(waves[1:])).view("<u8")


def _of_shard(shared: tuple[Path, Index], shard: Shard) -> tuple[str, Fingerprints]:
    root, index = shared
    rows = np.zeros(shard.samples, FINGERPRINT)
    samples = scan_shard(root, shard, index.label_names, version=index.version)
    for row, (key, members, metadata) in zip(rows, samples, strict=True):
        try:
            image = decode_image(next((members[kind] for kind in IMAGE_EXTENSIONS if kind in members), b""))
        except DataError as error:
            raise DataError(f"{shard.file}: sample {key}: {error}") from error
        row["patient"], row["study"] = _text_hash(metadata["patient_id"]), _text_hash(metadata["study_id"])
        row["report"] = _text_hash(" ".join(" ".join(metadata["sentences"]).lower().split()))
        row["pixels"] = pixel_hash(image)
        row["coarse"], row["fine"] = perceptual_hash(image, 8)[0], perceptual_hash(image, 16)
    return shard.file, rows


def _text_hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) if text else 0
