"""Clusters on the page: the most typical images of the largest, what lies in all, NMI over the refreshes."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

from medvlp.run_page.charts import line_chart
from medvlp.run_page.examples import Picture
from medvlp.run_page.history import History, without_places
from medvlp.run_page.pictures import data_url
from medvlp.run_page.showable import Asked, NotShownError, showable
from medvlp.run_page.tables import Cell, TableOf
from medvlp.serving.cluster_report import Members, overall
from medvlp.serving.layout import SNAPSHOT, PrototypeFilesError, folder_of
from medvlp.serving.snapshot import Snapshot
from shards.errors import DataError

#: Clusters with images, images of each, and their side in pixels; clusters in the table.
_SHOWN, _IMAGES, _SIDE, _LISTED = 6, 6, 96, 100
#: Metrics of a refresh that say how well clusters agree with labels.
AGREEMENT = {
    "prototypes/nmi": "NMI with sets of findings",
    "prototypes/nmi_findings": "NMI with single findings, mean",
    "prototypes/purity": "purity",
}
#: Metrics over all clusters that the table calls otherwise than `report.json` does.
_NAMES = {"nmi": AGREEMENT["prototypes/nmi"], "same_cluster": "image and report in one cluster"}


@dataclass(frozen=True)
class ShownCluster:
    """One cluster: what is in it, and its images nearest to the centre."""

    heading: str
    facts: str
    pictures: list[Picture]


@dataclass
class ClusterPart:
    """The clusters of one run: `remarks` say what is missing and why."""

    run: str
    charts: list[tuple[str, Markup]] = field(default_factory=list)
    tables: list[TableOf] = field(default_factory=list)
    shown: list[ShownCluster] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def cluster_part(history: History, asked: Asked) -> ClusterPart:
    """What the folder of a run has of its clusters."""
    part = ClusterPart(history.name)
    curves = {said: history.curves[name] for name, said in AGREEMENT.items() if name in history.curves}
    if curves:
        heading = "clusters and findings, by refresh"
        # matplotlib escapes every text it writes.
        part.charts.append((heading, Markup(line_chart(heading, curves, history.restarts))))
    else:
        part.remarks.append("No curve of NMI: no refresh of a prototype service measured it in this run.")
    try:
        members = Members.of(Snapshot.read(folder_of(history.folder) / SNAPSHOT))
    except PrototypeFilesError as error:
        part.remarks.append(f"No gallery: {without_places(str(error))}")
        return part
    part.tables = [_overall(members), _listed(members)]
    try:
        part.shown = _shown(members, str(history.config.get("data.root")), asked)
    except (NotShownError, DataError) as error:
        part.remarks.append(f"No images: {without_places(str(error))}")
    return part


def _overall(members: Members) -> TableOf:
    origin, said = members.snapshot.origin, overall(members)
    rows = [
        [Cell(_NAMES.get(name, name.replace("_", " "))), Cell(f"{value:.3f}", value)]
        for name, value in said.items()
        if isinstance(value, float)
    ]
    rows += [
        [Cell(f"NMI with {finding}"), Cell(f"{value:.3f}", value)]
        for finding, value in said["nmi_by_finding"].items()
    ]
    caption = (
        f"{len(members.snapshot.table.centroids)} clusters ({origin.source}) of {origin.checkpoint}, "
        f"{len(members.snapshot.sample):,} samples of {origin.split}"
    )
    return TableOf(caption, ["agreement with findings", "value"], rows)


def _listed(members: Members) -> TableOf:
    rows = []
    for number in _largest(members)[:_LISTED]:
        purity, images = members.purity(number), int(members.images[number])
        rows.append([
            Cell(str(number)), Cell(f"{images:,}", images),
            Cell(f"{members.reports[number]:,}", float(members.reports[number])),
            Cell("–") if purity is None else Cell(f"{purity:.2f}", purity),
            Cell(_findings(members, number, 5)),
        ])  # fmt: skip
    return TableOf("clusters, the largest first", ["cluster", "images", "reports", "purity", "findings"],
                   rows, folded=f"the {len(rows)} largest clusters")  # fmt: skip


def _shown(members: Members, root: str, asked: Asked) -> list[ShownCluster]:
    origin, positions = members.snapshot.origin, members.snapshot.sample
    dataset = showable(root, origin.split, origin.data, asked)
    shown = []
    for number in _largest(members)[:_SHOWN]:
        pictures = []
        for row in members.rows(number)[:_IMAGES].tolist():
            position = int(positions[row])
            if not 0 <= position < len(dataset):
                raise NotShownError("its samples are not those of the dataset")
            sample = dataset[position]
            present = ", ".join(name for name, value in sample.labels.items() if value == 1) or "no finding"
            pictures.append(Picture(data_url(sample.image, _SIDE), "", f"Sample {sample.key}: {present}"))
        purity = members.purity(number)
        facts = [f"{members.images[number]:,} images", _findings(members, number, 3)]
        facts += [] if purity is None else [f"purity {purity:.2f}"]
        shown.append(ShownCluster(f"Cluster {number}", "; ".join(facts), pictures))
    return shown


def _largest(members: Members) -> list[int]:
    """Numbers of the clusters that hold an image, the largest first."""
    return [number for number in (-members.images).argsort(kind="stable").tolist() if members.images[number]]


def _findings(members: Members, number: int, most: int) -> str:
    mix = list(members.label_mix(number).items())[:most]
    return ", ".join(f"{name} {share:.0%}" for name, share in mix) or "no finding"
