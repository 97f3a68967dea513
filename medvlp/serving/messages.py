"""Arrays as requests: needs numpy and protobuf only, so that a client needs no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from medvlp.serving.wire import prototypes_pb2 as wire

#: Number formats of embeddings on the wire.
FORMATS: dict[int, np.dtype[Any]] = {wire.FLOAT32: np.dtype("<f4"), wire.FLOAT16: np.dtype("<f2")}


def as_request(
    embeddings: Any, clusters: int = 1, samples: int = 0, of: wire.Modality = wire.IMAGE
) -> wire.NearestRequest:
    """[n, D] numbers as a request; a float16 array travels as it is, everything else as float32."""
    array = np.asarray(embeddings)
    number_format = wire.FLOAT16 if array.dtype == np.float16 else wire.FLOAT32
    return wire.NearestRequest(
        embeddings=np.ascontiguousarray(array, dtype=FORMATS[number_format]).tobytes(),
        format=number_format,
        rows=len(array),
        wanted=wire.Wanted(clusters=clusters, samples=samples, of=of),
    )
