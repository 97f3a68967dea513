from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Format(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLOAT32: _ClassVar[Format]
    FLOAT16: _ClassVar[Format]

class Modality(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE: _ClassVar[Modality]
    REPORT: _ClassVar[Modality]
FLOAT32: Format
FLOAT16: Format
IMAGE: Modality
REPORT: Modality

class Wanted(_message.Message):
    __slots__ = ("clusters", "samples", "of")
    CLUSTERS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    clusters: int
    samples: int
    of: Modality
    def __init__(self, clusters: _Optional[int] = ..., samples: _Optional[int] = ..., of: _Optional[_Union[Modality, str]] = ...) -> None: ...

class NearestRequest(_message.Message):
    __slots__ = ("embeddings", "format", "rows", "wanted")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    embeddings: bytes
    format: Format
    rows: int
    wanted: Wanted
    def __init__(self, embeddings: _Optional[bytes] = ..., format: _Optional[_Union[Format, str]] = ..., rows: _Optional[int] = ..., wanted: _Optional[_Union[Wanted, _Mapping]] = ...) -> None: ...

class NearestTextRequest(_message.Message):
    __slots__ = ("texts", "wanted")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    wanted: Wanted
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., wanted: _Optional[_Union[Wanted, _Mapping]] = ...) -> None: ...

class NearestImageRequest(_message.Message):
    __slots__ = ("images", "wanted")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    wanted: Wanted
    def __init__(self, images: _Optional[_Iterable[bytes]] = ..., wanted: _Optional[_Union[Wanted, _Mapping]] = ...) -> None: ...

class NearestReply(_message.Message):
    __slots__ = ("version", "fingerprint", "rows", "clusters", "cosines", "sample_keys", "sample_positions", "sample_cosines")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CLUSTERS_FIELD_NUMBER: _ClassVar[int]
    COSINES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_KEYS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COSINES_FIELD_NUMBER: _ClassVar[int]
    version: int
    fingerprint: str
    rows: int
    clusters: _containers.RepeatedScalarFieldContainer[int]
    cosines: _containers.RepeatedScalarFieldContainer[float]
    sample_keys: _containers.RepeatedScalarFieldContainer[str]
    sample_positions: _containers.RepeatedScalarFieldContainer[int]
    sample_cosines: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., rows: _Optional[int] = ..., clusters: _Optional[_Iterable[int]] = ..., cosines: _Optional[_Iterable[float]] = ..., sample_keys: _Optional[_Iterable[str]] = ..., sample_positions: _Optional[_Iterable[int]] = ..., sample_cosines: _Optional[_Iterable[float]] = ...) -> None: ...

class LabelShare(_message.Message):
    __slots__ = ("name", "share")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    name: str
    share: float
    def __init__(self, name: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class ClusterSummary(_message.Message):
    __slots__ = ("id", "images", "reports", "similarity", "purity", "labels")
    ID_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    PURITY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    id: int
    images: int
    reports: int
    similarity: float
    purity: float
    labels: _containers.RepeatedCompositeFieldContainer[LabelShare]
    def __init__(self, id: _Optional[int] = ..., images: _Optional[int] = ..., reports: _Optional[int] = ..., similarity: _Optional[float] = ..., purity: _Optional[float] = ..., labels: _Optional[_Iterable[_Union[LabelShare, _Mapping]]] = ...) -> None: ...

class ClustersRequest(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class ClustersReply(_message.Message):
    __slots__ = ("version", "fingerprint", "total", "clusters")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    CLUSTERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    fingerprint: str
    total: int
    clusters: _containers.RepeatedCompositeFieldContainer[ClusterSummary]
    def __init__(self, version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., total: _Optional[int] = ..., clusters: _Optional[_Iterable[_Union[ClusterSummary, _Mapping]]] = ...) -> None: ...

class ClusterRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    def __init__(self, id: _Optional[int] = ...) -> None: ...

class TypicalSample(_message.Message):
    __slots__ = ("key", "position", "cosine")
    KEY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    key: str
    position: int
    cosine: float
    def __init__(self, key: _Optional[str] = ..., position: _Optional[int] = ..., cosine: _Optional[float] = ...) -> None: ...

class ClusterReply(_message.Message):
    __slots__ = ("version", "fingerprint", "cluster", "typical")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_FIELD_NUMBER: _ClassVar[int]
    version: int
    fingerprint: str
    cluster: ClusterSummary
    typical: _containers.RepeatedCompositeFieldContainer[TypicalSample]
    def __init__(self, version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., cluster: _Optional[_Union[ClusterSummary, _Mapping]] = ..., typical: _Optional[_Iterable[_Union[TypicalSample, _Mapping]]] = ...) -> None: ...

class TableRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TableReply(_message.Message):
    __slots__ = ("version", "fingerprint", "clusters", "width", "source", "step", "samples", "has_reports", "split", "label_names", "max_rows", "max_texts", "max_images", "max_message_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CLUSTERS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    HAS_REPORTS_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    LABEL_NAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_TEXTS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: int
    fingerprint: str
    clusters: int
    width: int
    source: str
    step: int
    samples: int
    has_reports: bool
    split: str
    label_names: _containers.RepeatedScalarFieldContainer[str]
    max_rows: int
    max_texts: int
    max_images: int
    max_message_bytes: int
    def __init__(self, version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., clusters: _Optional[int] = ..., width: _Optional[int] = ..., source: _Optional[str] = ..., step: _Optional[int] = ..., samples: _Optional[int] = ..., has_reports: _Optional[bool] = ..., split: _Optional[str] = ..., label_names: _Optional[_Iterable[str]] = ..., max_rows: _Optional[int] = ..., max_texts: _Optional[int] = ..., max_images: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...
