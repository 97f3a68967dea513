"""A dataset of format version 1, written byte by byte as its description said, by no code of this project."""

import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

SIZE = 32
LABELS = ["mass", "edema", "nodule"]
REPORT = "There is a mass. No edema."
#: Overlapping findings: the nodule (3) lies on the mass (1), whose pixels there the index mask has lost.
MASK = np.zeros((SIZE, SIZE), np.uint8)
MASK[4:20, 6:12] = 1
MASK[8:11, 9:18] = 3
BOX = {"label": "mass", "x": 6.0, "y": 4.0, "width": 6.0, "height": 16.0}


def write_version_one(root: Path, tokenizer: bytes, masks: bool = True) -> Path:
    """Splits train (6 samples) and test (3), a shard each; all but the second sample have mask and box."""
    root.mkdir()
    shards, splits = [], {}
    for split, first, count in (("train", 0, 6), ("test", 6, 3)):
        samples = [(f"{record:08d}-0", _members(record, masks)) for record in range(first, first + count)]
        tar, idx = _tar(samples)
        (root / f"{split}-000000.tar").write_bytes(tar)
        (root / f"{split}-000000.idx").write_bytes(idx)
        shards.append(
            {
                "file": f"{split}-000000.tar", "split": split, "samples": count, "bytes": len(tar),
                "hash": f"xxh3:{xxhash.xxh3_128_hexdigest(tar)}",
                "index_hash": f"xxh3:{xxhash.xxh3_128_hexdigest(idx)}",
            }
        )  # fmt: skip
        splits[split] = dict.fromkeys(("samples", "patients", "studies"), count)
        splits[split] |= {"shards": 1, "bytes": len(tar)}
    (root / "tokenizer.json").write_bytes(tokenizer)
    (root / "rejected.jsonl").write_bytes(b"")
    listed = "".join(f"{shard['file']} {shard['hash']}\n" for shard in shards).encode()
    index = {
        "name": "old", "label_names": LABELS, "splits": splits, "shards": shards, "image_size": SIZE,
        "tokenizer": f"xxh3:{xxhash.xxh3_128_hexdigest(tokenizer)}",
        "fingerprint": f"blake2b:{hashlib.blake2b(listed, digest_size=16).hexdigest()}",
        "arguments": {"source": {"name": "old"}}, "version": 1, "tool": "medvlp 0.1.0",
    }  # fmt: skip
    (root / "index.json").write_text(json.dumps(index))
    return root


def _members(record: int, masks: bool) -> dict[str, bytes]:
    shown = record != 1
    pixels = np.random.default_rng(record).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    metadata: dict[str, Any] = {
        "study_id": f"s{record}", "patient_id": f"p{record}", "view": "PA",
        "sections": {"findings": REPORT}, "sentences": ["There is a mass.", "No edema."],
        "labels": {"mass": int(shown), "edema": 0, "nodule": None},
        "entities": [["lung", "mass", 1]], "boxes": [BOX] if shown else [], "source": "old", "license": "",
        "extra": {"kept": record},
    }  # fmt: skip
    members = {"png": _png(pixels), "json": json.dumps(metadata).encode()}
    if shown and masks:
        members["mask.png"] = _png(MASK)
    return members


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _tar(samples: list[tuple[str, dict[str, bytes]]]) -> tuple[bytes, bytes]:
    """Tar and `.idx`: magic, length of the header, padded header, (offset, size) of each member."""
    buffer = io.BytesIO()
    extensions = ["json", "mask.png", "png"]
    spans = np.full((len(samples), len(extensions), 2), -1, "<i8")
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row, (key, members) in enumerate(samples):
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                spans[row, extensions.index(extension)] = (archive.offset + 512, len(data))
                archive.addfile(member, io.BytesIO(data))
    header = json.dumps({"extensions": extensions, "keys": [key for key, _ in samples]}).encode()
    header += b" " * (-(12 + len(header)) % 8)
    return buffer.getvalue(), b"MVLPIDX1" + struct.pack("<I", len(header)) + header + spans.tobytes()
