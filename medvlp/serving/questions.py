"""Questions about a run's clusters and their answers, with or without a server. Needs no protobuf."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shards.errors import MedvlpError

#: Whether samples are compared by their images or by their reports.
Modality = Literal["image", "report"]


class RequestError(MedvlpError, ValueError):
    """A question that cannot be answered as it is asked: wrong size, width, format or range."""

    exit_code = 2


class UnknownClusterError(RequestError):
    """There is no cluster of that number."""


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what is no Unicode text, as words of a terminal in another encoding are.

    Raises:
        RequestError: says which.
    """
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text {number} is not UTF-8: write it so, or set the terminal to it"
            ) from error


@dataclass(frozen=True)
class Wanted:
    """What to answer for every row of a question.

    Attributes:
        clusters: of each row, most similar first; 0 means 1.
        samples: of each row, most similar first; 0: none.
        of: what of the samples is compared.
    """

    clusters: int = 1
    samples: int = 0
    of: Modality = "image"


@dataclass(frozen=True)
class Answer:
    """What every answer says of the clusters it is about, so that those of two versions are never mixed up.

    Fields of all answers are those of the replies in `wire/prototypes.proto`, which says more of them;
    numbers that are no integers have float32's precision.

    Attributes:
        version, fingerprint: of the table.
    """

    version: int
    fingerprint: str


@dataclass(frozen=True)
class NearestAnswer(Answer):
    """Clusters and samples near to n rows, flat and row-major: entry j of row i stands at i * k + j.

    Attributes:
        rows: n.
        clusters, cosines: n x k ids and cosines.
        sample_keys, sample_positions, sample_cosines: n x s; the position is that in the split.
    """

    rows: int
    clusters: list[int]
    cosines: list[float]
    sample_keys: list[str]
    sample_positions: list[int]
    sample_cosines: list[float]


@dataclass(frozen=True)
class LabelShare:
    """A finding, and the share in [0, 1] of a cluster's labelled samples with it."""

    name: str
    share: float


@dataclass(frozen=True)
class ClusterSummary:
    """One cluster.

    Attributes:
        id: its number.
        images, reports: samples whose image, and whose report, lies in it.
        similarity: mean cosine between its embeddings and the centroid; None: it is empty.
        purity: share of the labelled samples with its most frequent set of findings; None without any.
        labels: findings that are there, most frequent first.
    """

    id: int
    images: int
    reports: int
    similarity: float | None
    purity: float | None
    labels: list[LabelShare]


@dataclass(frozen=True)
class ClustersAnswer(Answer):
    """A page of clusters; `total`: clusters there are in all."""

    total: int
    clusters: list[ClusterSummary]


@dataclass(frozen=True)
class TypicalSample:
    """A sample near to its cluster's centroid."""

    key: str
    position: int
    cosine: float


@dataclass(frozen=True)
class ClusterAnswer(Answer):
    """One cluster; `typical`: its images nearest to the centroid."""

    cluster: ClusterSummary
    typical: list[TypicalSample]


@dataclass(frozen=True)
class TableAnswer(Answer):
    """What is asked about, and the limits of questions.

    Attributes:
        clusters, width: K and D of the table. source: "service", "learned" or "kmeans".
        step: finished steps of the checkpoint. samples: embedded ones. has_reports: with their reports.
        split, label_names: of the dataset.
        max_rows, max_texts, max_images, max_message_bytes: largest questions.
    """

    clusters: int
    width: int
    source: str
    step: int
    samples: int
    has_reports: bool
    split: str
    label_names: list[str]
    max_rows: int
    max_texts: int
    max_images: int
    max_message_bytes: int
