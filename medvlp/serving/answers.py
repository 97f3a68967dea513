"""Answers to questions about one snapshot, with or without a server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medvlp.losses.normalise import unit_norm
from medvlp.serving.cluster_report import TYPICAL, Members
from medvlp.serving.limits import Limits
from medvlp.serving.questions import (
    ClusterAnswer,
    ClustersAnswer,
    ClusterSummary,
    LabelShare,
    NearestAnswer,
    RequestError,
    TableAnswer,
    TypicalSample,
    UnknownClusterError,
    Wanted,
)
from medvlp.serving.run_model import RunModel
from medvlp.serving.snapshot import Snapshot

#: Rows searched between two looks at whether anybody still waits for the answer.
_BLOCK = 64
_DEFAULT = Wanted()
#: Most bytes in a reply: of an answered cluster, or sample without its key; of a summary without its
#: findings; of a finding without its name.
_ENTRY_BYTES, _SUMMARY_BYTES, _LABEL_BYTES = 20, 64, 16


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

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return int(self.snapshot.table.centroids.shape[1])

    def nearest(
        self, embeddings: Any, wanted: Wanted = _DEFAULT, wanted_still: Callable[[], bool] = _always
    ) -> NearestAnswer:
        """Nearest clusters and samples of embeddings.

        Args:
            embeddings: [n, D] numbers, brought to unit length here.
            wanted: how many.
            wanted_still: asked now and then; false ends the search (with what is there so far).

        Raises:
            RequestError: too many rows, another width, numbers that are not finite, a row of zeros.
        """
        values = np.asarray(embeddings)
        if values.ndim != 2 or values.shape[1] != self.width:
            raise RequestError(
                f"embeddings of shape {values.shape}: those of this run have {self.width} numbers each"
            )
        _check_count(len(values), self.limits.rows, "embeddings")
        values = values.astype(np.float32)
        # In float64, because squares of float32 can overflow.
        squares = np.square(values, dtype=np.float64).sum(1)
        usable = np.isfinite(squares) & (squares > 0)
        if not usable.all():
            bad = int(usable.argmin())
            raise RequestError(f"row {bad} is zero or not finite: send embeddings as the method gives them")
        unit = (values / np.sqrt(squares)[:, None]).astype(np.float32)
        return self._nearest(torch.from_numpy(unit), wanted, wanted_still)

    def nearest_text(self, texts: Sequence[str], wanted: Wanted = _DEFAULT) -> NearestAnswer:
        """The same for texts.

        Raises:
            RequestError: none, too many or too long texts, or texts the method cannot embed.
        """
        limits = self.limits
        _check_count(len(texts), limits.texts, "texts")
        for number, text in enumerate(texts):
            if len(text) > limits.text_characters:
                raise RequestError(
                    f"text {number} has {len(text)} characters: send at most {limits.text_characters}"
                )
        self._check_wanted(len(texts), wanted)
        return self._nearest(self.model().embed_texts(texts), wanted, _always)

    def nearest_image(self, files: Sequence[bytes], wanted: Wanted = _DEFAULT) -> NearestAnswer:
        """The same for image files.

        Raises:
            RequestError: none, too many or too large files, or files that are no images.
        """
        limits = self.limits
        _check_count(len(files), limits.images, "images")
        for number, file in enumerate(files):
            if len(file) > limits.image_bytes:
                raise RequestError(f"image {number} has {len(file)} bytes: send at most {limits.image_bytes}")
        self._check_wanted(len(files), wanted)
        rows = self.model().embed_images(files, self.snapshot.origin.stored_size, limits.image_pixels)
        return self._nearest(rows, wanted, _always)

    def clusters(self, first: int = 0, count: int = 0) -> ClustersAnswer:
        """A page of clusters from number `first` on (count 0, or more than a page holds: as many as that).

        Raises:
            UnknownClusterError: the page begins beyond the last cluster.
        """
        total = self._check_cluster(first)
        names = self.snapshot.origin.label_names
        summary = _SUMMARY_BYTES + sum(len(name.encode()) + _LABEL_BYTES for name in names)
        fitting = max(1, self.limits.reply_bytes // summary)
        count = min(count or self.limits.page, self.limits.page, fitting)
        page = range(first, min(total, first + count))
        return ClustersAnswer(*self._stamp, total, [self.summary(number) for number in page])

    def cluster(self, number: int) -> ClusterAnswer:
        """One cluster with its most typical images.

        Raises:
            UnknownClusterError: there is no such cluster.
        """
        self._check_cluster(number)
        cosines, snapshot = self.members.cosines["image"], self.snapshot
        typical = [
            TypicalSample(snapshot.key_of(row), int(snapshot.sample[row]), float(cosines[row]))
            for row in self.members.rows(number)[:TYPICAL].tolist()
        ]
        return ClusterAnswer(*self._stamp, self.summary(number), typical)

    def table(self) -> TableAnswer:
        """What is asked about, and the limits of questions."""
        snapshot, origin, limits = self.snapshot, self.snapshot.origin, self.limits
        return TableAnswer(
            *self._stamp,
            clusters=len(snapshot.table.centroids),
            width=self.width,
            source=origin.source,
            step=origin.step,
            samples=len(snapshot.sample),
            has_reports=snapshot.report is not None,
            split=origin.split,
            label_names=list(origin.label_names),
            max_rows=limits.rows,
            max_texts=limits.texts,
            max_images=limits.images,
            max_message_bytes=limits.message_bytes,
        )

    @property
    def _stamp(self) -> tuple[int, str]:
        """Version and fingerprint, with which every answer begins."""
        return self.snapshot.table.version, self.snapshot.table.fingerprint

    def _nearest(self, rows: Tensor, wanted: Wanted, wanted_still: Callable[[], bool]) -> NearestAnswer:
        clusters, samples = self._check_wanted(len(rows), wanted)
        answer = NearestAnswer(*self._stamp, len(rows), [], [], [], [], [])
        for block in torch.split(rows, _BLOCK) if samples else (rows,):
            if not wanted_still():
                break
            cosines, ids = self.snapshot.table.nearest(block, clusters)
            answer.clusters.extend(ids.flatten().tolist())
            answer.cosines.extend(cosines.flatten().tolist())
            if samples:
                near, places = self.indexes[wanted.of].search(block.numpy(), samples)
                flat = places.ravel()
                answer.sample_keys.extend(self.snapshot.key_of(row) for row in flat.tolist())
                answer.sample_positions.extend(self.snapshot.sample.numpy()[flat].tolist())
                answer.sample_cosines.extend(near.ravel().tolist())
        return answer

    def _check_wanted(self, rows: int, wanted: Wanted) -> tuple[int, int]:
        """Entries of each row, of clusters and of samples: never more than there are."""
        limits = self.limits
        if min(wanted.clusters, wanted.samples) < 0:
            raise RequestError("less than no clusters or samples cannot be answered")
        if max(wanted.clusters, wanted.samples) > limits.entries:
            raise RequestError(f"at most {limits.entries} clusters and samples are answered for a row")
        if rows * max(wanted.clusters, wanted.samples) > limits.answers:
            raise RequestError(f"that is more than {limits.answers} answers: send fewer rows at a time")
        if wanted.samples and wanted.of not in self.snapshot.embeddings():
            raise RequestError("the samples are stored with their images alone: ask for those (of: IMAGE)")
        clusters = min(wanted.clusters or 1, self.snapshot.table.centroids.shape[0])
        samples = min(wanted.samples, len(self.snapshot.sample))
        sample = _ENTRY_BYTES + self.snapshot.keys.shape[1]
        size = rows * (clusters * _ENTRY_BYTES + samples * sample)
        if size > limits.reply_bytes:
            raise RequestError(
                f"the answer could have {size} bytes (a sample up to {sample}), more than the "
                f"{limits.reply_bytes} that fit a reply: send fewer rows at a time, or ask for fewer samples"
            )
        return clusters, samples

    def _check_cluster(self, number: int) -> int:
        total = self.snapshot.table.centroids.shape[0]
        if not 0 <= number < total:
            raise UnknownClusterError(f"there is no cluster {number}: ids go from 0 to {total - 1}")
        return total

    def summary(self, number: int) -> ClusterSummary:
        """Size, purity and findings of a cluster."""
        members = self.members
        similarity, purity = float(members.similarity[number]), members.purity(number)
        return ClusterSummary(
            id=number,
            images=int(members.images[number]),
            reports=int(members.reports[number]),
            similarity=None if np.isnan(similarity) else _single(similarity),
            purity=None if purity is None else _single(purity),
            labels=[LabelShare(name, _single(share)) for name, share in members.label_mix(number).items()],
        )


def _single(number: float) -> float:
    """In float32's precision, which a server sends: an answer is the same from whomever it comes."""
    return float(np.float32(number))


def _check_count(count: int, most: int, what: str) -> None:
    if not 1 <= count <= most:
        raise RequestError(f"{count} {what}: send 1 to {most} in a request")
