"""Answers to questions about one snapshot, as messages of `prototypes.proto`; with or without a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp.losses.normalise import unit_norm
from medvlp.serving.cluster_report import TYPICAL, Members
from medvlp.serving.errors import RequestError, UnknownClusterError
from medvlp.serving.limits import Limits
from medvlp.serving.messages import FORMATS
from medvlp.serving.run_model import RunModel
from medvlp.serving.snapshot import Snapshot
from medvlp.serving.wire import prototypes_pb2 as wire

_MODALITIES: dict[int, str] = {wire.IMAGE: "image", wire.REPORT: "report"}
#: Rows searched between two looks at whether anybody still waits for the answer.
_BLOCK = 64

Reply = TypeVar("Reply", wire.NearestReply, wire.ClustersReply, wire.ClusterReply, wire.TableReply)


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Answers:
    """Answers from one snapshot; safe to share by threads, but for texts and images (see `RunModel`).

    Attributes:
        snapshot: what is asked about.
        model: gives what embeds texts and images as the snapshot's samples were.
        limits: sizes that are refused.
    """

    snapshot: Snapshot
    model: Callable[[], RunModel]
    limits: Limits = Limits()

    @cached_property
    def members(self) -> Members:
        """The cluster of every sample."""
        return Members.of(self.snapshot)

    @cached_property
    def indexes(self) -> dict[str, Any]:
        """Modality -> FAISS index of the samples' embeddings."""
        import faiss

        found = {}
        for name, rows in self.snapshot.embeddings().items():
            found[name] = faiss.IndexFlatIP(rows.shape[1])
            found[name].add(unit_norm(rows.float()).numpy())
        return found

    def prepare(self) -> None:
        """Compute what the first questions would wait for."""
        assert self.members.classes is not None
        assert self.indexes

    def nearest(
        self, request: wire.NearestRequest, wanted_still: Callable[[], bool] = _always
    ) -> wire.NearestReply:
        """Nearest clusters and samples of embeddings.

        Args:
            request: see `prototypes.proto`.
            wanted_still: asked now and then; false ends the search (with what is there so far).

        Raises:
            RequestError: too many rows, another width, numbers that are not finite, a row of zeros.
        """
        width = self.snapshot.table.centroids.shape[1]
        if not 1 <= request.rows <= self.limits.rows:
            raise RequestError(f"{request.rows} rows: send 1 to {self.limits.rows} embeddings in a request")
        if request.format not in FORMATS:
            raise RequestError(f"format {request.format} is neither FLOAT32 nor FLOAT16")
        dtype = FORMATS[request.format]
        if len(request.embeddings) != request.rows * width * dtype.itemsize:
            raise RequestError(
                f"{len(request.embeddings)} bytes for {request.rows} rows: the embeddings of this run have "
                f"{width} numbers of {dtype.itemsize} bytes"
            )
        values = np.frombuffer(request.embeddings, dtype).reshape(request.rows, width).astype(np.float32)
        # In float64, because squares of float32 can overflow.
        squares = np.square(values, dtype=np.float64).sum(1)
        usable = np.isfinite(squares) & (squares > 0)
        if not usable.all():
            bad = int(usable.argmin())
            raise RequestError(f"row {bad} is zero or not finite: send embeddings as the method gives them")
        unit = (values / np.sqrt(squares)[:, None]).astype(np.float32)
        return self._nearest(torch.from_numpy(unit), request.wanted, wanted_still)

    def nearest_text(self, request: wire.NearestTextRequest) -> wire.NearestReply:
        """The same for texts.

        Raises:
            RequestError: none, too many or too long texts, or texts the method cannot embed.
        """
        texts, limits = request.texts, self.limits
        _check_count(len(texts), limits.texts, "texts")
        for number, text in enumerate(texts):
            if len(text) > limits.text_characters:
                raise RequestError(
                    f"text {number} has {len(text)} characters: send at most {limits.text_characters}"
                )
        self._check_wanted(len(texts), request.wanted)
        return self._nearest(self.model().embed_texts(texts), request.wanted, _always)

    def nearest_image(self, request: wire.NearestImageRequest) -> wire.NearestReply:
        """The same for image files.

        Raises:
            RequestError: none, too many or too large files, or files that are no images.
        """
        files, limits = request.images, self.limits
        _check_count(len(files), limits.images, "images")
        for number, file in enumerate(files):
            if len(file) > limits.image_bytes:
                raise RequestError(f"image {number} has {len(file)} bytes: send at most {limits.image_bytes}")
        self._check_wanted(len(files), request.wanted)
        rows = self.model().embed_images(files, self.snapshot.origin.stored_size, limits.image_pixels)
        return self._nearest(rows, request.wanted, _always)

    def clusters(self, request: wire.ClustersRequest) -> wire.ClustersReply:
        """A page of clusters.

        Raises:
            UnknownClusterError: the page begins beyond the last cluster.
        """
        total = self._check_cluster(request.first)
        count = min(request.count or self.limits.page, self.limits.page)
        page = range(request.first, min(total, request.first + count))
        reply = wire.ClustersReply(total=total, clusters=[self.summary(number) for number in page])
        return self._stamped(reply)

    def cluster(self, request: wire.ClusterRequest) -> wire.ClusterReply:
        """One cluster with its most typical images.

        Raises:
            UnknownClusterError: there is no such cluster.
        """
        self._check_cluster(request.id)
        cosines, typical = self.members.cosines["image"], []
        for row in self.members.rows(request.id)[:TYPICAL].tolist():
            position = int(self.snapshot.sample[row])
            typical.append(
                wire.TypicalSample(
                    key=self.snapshot.key_of(row), position=position, cosine=float(cosines[row])
                )
            )
        return self._stamped(wire.ClusterReply(cluster=self.summary(request.id), typical=typical))

    def table(self, request: wire.TableRequest) -> wire.TableReply:
        """What is asked about, and the limits of questions."""
        snapshot, origin, limits = self.snapshot, self.snapshot.origin, self.limits
        count, width = snapshot.table.centroids.shape
        return self._stamped(
            wire.TableReply(
                clusters=count,
                width=width,
                source=origin.source,
                step=origin.step,
                samples=len(snapshot.sample),
                has_reports=snapshot.report is not None,
                split=origin.split,
                label_names=origin.label_names,
                max_rows=limits.rows,
                max_texts=limits.texts,
                max_images=limits.images,
                max_message_bytes=limits.message_bytes,
            )
        )

    def _nearest(
        self, rows: Tensor, wanted: wire.Wanted, wanted_still: Callable[[], bool]
    ) -> wire.NearestReply:
        clusters, samples = self._check_wanted(len(rows), wanted)
        reply = wire.NearestReply(rows=len(rows))
        for block in torch.split(rows, _BLOCK) if samples else (rows,):
            if not wanted_still():
                break
            cosines, ids = self.snapshot.table.nearest(block, clusters)
            reply.clusters.extend(ids.flatten().tolist())
            reply.cosines.extend(cosines.flatten().tolist())
            if samples:
                near, places = self.indexes[_MODALITIES[wanted.of]].search(block.numpy(), samples)
                self._add_samples(reply, near, places)
        return self._stamped(reply)

    def _add_samples(
        self, reply: wire.NearestReply, cosines: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> None:
        flat = rows.ravel()
        reply.sample_keys.extend([self.snapshot.key_of(row) for row in flat.tolist()])
        reply.sample_positions.extend(self.snapshot.sample.numpy()[flat].tolist())
        reply.sample_cosines.extend(cosines.ravel().tolist())

    def _check_wanted(self, rows: int, wanted: wire.Wanted) -> tuple[int, int]:
        """Entries of each row, of clusters and of samples: never more than there are."""
        limits = self.limits
        if max(wanted.clusters, wanted.samples) > limits.entries:
            raise RequestError(f"at most {limits.entries} clusters and samples are answered for a row")
        if rows * max(wanted.clusters, wanted.samples) > limits.answers:
            raise RequestError(f"that is more than {limits.answers} answers: send fewer rows at a time")
        if wanted.samples and _MODALITIES.get(wanted.of) not in self.snapshot.embeddings():
            raise RequestError("the samples are stored with their images alone: ask for those (of: IMAGE)")
        clusters = min(wanted.clusters or 1, self.snapshot.table.centroids.shape[0])
        return clusters, min(wanted.samples, len(self.snapshot.sample))

    def _check_cluster(self, number: int) -> int:
        total = self.snapshot.table.centroids.shape[0]
        if number >= total:
            raise UnknownClusterError(f"there is no cluster {number}: ids go from 0 to {total - 1}")
        return total

    def summary(self, number: int) -> wire.ClusterSummary:
        """Size, purity and findings of a cluster."""
        members = self.members
        similarity = float(members.similarity[number])
        mix = members.label_mix(number)
        return wire.ClusterSummary(
            id=number,
            images=int(members.images[number]),
            reports=int(members.reports[number]),
            similarity=None if np.isnan(similarity) else similarity,
            purity=members.purity(number),
            labels=[wire.LabelShare(name=name, share=share) for name, share in mix.items()],
        )

    def _stamped(self, reply: Reply) -> Reply:
        """With version and fingerprint, so that answers of two versions are never mixed up."""
        reply.version = self.snapshot.table.version
        reply.fingerprint = self.snapshot.table.fingerprint
        return reply


def _check_count(count: int, most: int, what: str) -> None:
    if not 1 <= count <= most:
        raise RequestError(f"{count} {what}: send 1 to {most} in a request")
