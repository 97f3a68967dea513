"""What the importers of MIMIC-CXR and of the sets on its images share: paths, ids, phrases, anatomy."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from shards.archives.files import ArchiveFiles
from shards.archives.records import Record
from shards.archives.texts import ArchiveTexts, Table
from shards.errors import DataError
from shards.strict_json import JsonError, parse_json
from shards.study import Box, Phrase

LICENSE = "PhysioNet Credentialed Health Data License 1.5.0"
ACCESS = "credentialed"
JPG_ORIGIN = "https://physionet.org/content/mimic-cxr-jpg/"
REPORTS_ORIGIN = "https://physionet.org/content/mimic-cxr/ (mimic-cxr-reports.zip)"
MS_CXR_ORIGIN = "https://physionet.org/content/ms-cxr/"
IMAGENOME_ORIGIN = "https://physionet.org/content/chest-imagenome/"

MS_CXR_TABLES = ("MS_CXR_Local_Alignment_v1.1.0.csv", "MS_CXR_Local_Alignment_v1.0.0.csv")
#: Image-phrase pairs that are published.
MS_CXR_PHRASES = 1_162
_MS_CXR_COLUMNS = (
    "dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h", "image_width", "image_height",
)  # fmt: skip

_SIDED = (
    "lung", "upper lung zone", "mid lung zone", "lower lung zone", "apical zone", "hilar structures",
    "costophrenic angle", "hemidiaphragm", "clavicle",
)  # fmt: skip
#: Regions of Chest ImaGenome; its attributes name some others, which have no boxes worth the name.
REGIONS = frozenset(
    [f"{side} {region}" for side in ("right", "left") for region in _SIDED]
    + ["trachea", "spine", "aortic arch", "mediastinum", "upper mediastinum", "svc", "cardiac silhouette",
       "cavoatrial junction", "right atrium", "carina", "abdomen"]
)  # fmt: skip
_SCENE_GRAPH_LIMIT = 1 << 24
#: Images of each list that are tried before scene graphs are said to be missing altogether.
_TRIED = 20

#: Height and width of an image in pixels.
Shape = tuple[float, float]


def image_path(subject: str, study: str, dicom: str) -> str:
    """Where an image lies; the tables hold bare numbers, paths have "p" and "s"."""
    return f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"


def report_path(subject: str, study: str) -> str:
    """Where a report lies: beside the study's folder, not in it."""
    return f"files/p{subject[:2]}/p{subject}/s{study}.txt"


def bare_number(name: str) -> str:
    """ "p10000001" or "s50000001" without its letter; anything else as it is."""
    return name[1:] if name[:1] in ("p", "s") and name[1:].isdecimal() else name


def ms_cxr_table(texts: ArchiveTexts) -> Table:
    """MS-CXR's table, one row a box; version 1.1.0 has splits."""
    return texts.table(*MS_CXR_TABLES, columns=_MS_CXR_COLUMNS, optional=["split"])


def ms_cxr_place(record: Record) -> tuple[str, str, str]:
    """Numbers of patient and study, and DICOM id, of the path "files/p10/p10000001/s50000001/<dicom>.jpg".

    Raises:
        RejectedRecord: it is another path.
    """
    subject, study, file = ["", "", "", *record["path"].replace("\\", "/").split("/")][-3:]
    subject, study = bare_number(subject), bare_number(study)
    if not (subject.isdecimal() and study.isdecimal()):
        raise record.error("column 'path' is no path like files/p10/p10000001/s50000001/x.jpg")
    return subject, study, file.rpartition(".")[0]


def phrases(rows: list[Record], shape: Shape) -> list[Phrase]:
    """Phrases of one image with their boxes, in pixels of an image of this shape.

    Raises:
        RejectedRecord: a cell is wrong.
    """
    boxes: dict[str, list[Box]] = {}
    for row in rows:
        drawn_on = (row.number("image_height"), row.number("image_width"))
        if min(drawn_on) <= 0:
            raise row.error("column 'image_width' or 'image_height' is not positive")
        box = row.box(row.text("category_name"), "x", "y", "w", "h")
        boxes.setdefault(row.text("label_text"), []).append(_scaled(box, drawn_on, shape))
    return [Phrase(text, tuple(places)) for text, places in boxes.items()]


def imagenome_root(folder: Path) -> Path:
    """Where Chest ImaGenome's splits and scene graphs lie, these often in a zip."""
    silver = folder / "silver_dataset"
    return silver if silver.is_dir() else folder


def check_scene_graphs(texts: ArchiveTexts) -> None:
    """Fail at once where there are no scene graphs at all.

    Raises:
        DataError: none of the first images in the lists of Chest ImaGenome has one.
    """
    for split in ("train", "valid", "test"):
        table = texts.table(f"splits/{split}.csv", columns=["dicom_id"])
        for record in islice(table, _TRIED):
            if not record.problem and texts.files.find(_scene_graph(record["dicom_id"])) is not None:
                return
    raise DataError(
        f"{texts.files.root} has none of the scene graphs (scene_graph/<dicom_id>_SceneGraph.json, or "
        f"scene_graph.zip with that folder in it); get them from {IMAGENOME_ORIGIN}"
    )


def _scene_graph(dicom: str) -> str:
    return f"scene_graph/{dicom}_SceneGraph.json"


def anatomy(files: ArchiveFiles, dicom: str, drawn_on: Shape, shape: Shape) -> list[Box]:
    """Regions of an image by its scene graph, in pixels of an image of `shape`; none where there is no graph.

    Args:
        drawn_on: shape of the original image. The graph does not name it: its `original_width` and
            `original_height` are those of a box.

    Raises:
        DataError: the graph is not of the known form.
    """
    path = _scene_graph(dicom)
    if files.find(path) is None:
        return []
    try:
        objects = parse_json(files.read(path, _SCENE_GRAPH_LIMIT), _SCENE_GRAPH_LIMIT)["objects"]
        return [_region(item, drawn_on, shape) for item in objects if item["bbox_name"] in REGIONS]
    except JsonError as error:
        raise DataError(f"scene graph of the image: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else "a field of another type"
        raise DataError(f"scene graph of the image: {reason}") from error


def _region(item: Mapping[str, Any], drawn_on: Shape, shape: Shape) -> Box:
    # Not x1 to y2, which are places in a padded copy of 224 pixels.
    left, top, right, bottom = (float(item[f"original_{side}"]) for side in ("x1", "y1", "x2", "y2"))
    name: str = item["bbox_name"]
    first, _, rest = name.partition(" ")
    side = first if rest in _SIDED else ""  # a right atrium is not one of a pair
    box = Box(name, left, top, max(right - left, 0.0), max(bottom - top, 0.0), side)
    return _scaled(box, drawn_on, shape)


def _scaled(box: Box, drawn_on: Shape, shape: Shape) -> Box:
    down, across = shape[0] / drawn_on[0], shape[1] / drawn_on[1]
    place = (box.x * across, box.y * down, box.width * across, box.height * down)
    return Box(box.label, *place, box.side, box.reader)
